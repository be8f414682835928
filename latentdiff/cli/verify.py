"""The command that proves or refutes what a model was made of."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from os.path import expanduser
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from latentdiff.cli.command import log_to_terminal, quieten_libraries

if TYPE_CHECKING:  # reading a folder takes seconds to import
    from latentdiff.audit.verify import Finding, Given

MAX_NAMES = 20  # images listed before the rest is counted


def verify_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Compare a model with its bill of materials; exit code 1 where anything differs.

    Checks every file of an export, or of all exports of a run, every stated root, and what else is
    given. It proves that nothing was changed since, not who made it.
    """
    _add_options(parser)
    args = parser.parse_args(arguments)
    if args.rerun and not args.data:
        raise ValueError("--rerun needs --data, the folder to train on again")
    from latentdiff.audit.verify import Given, verify

    given = Given(
        data=args.data,
        bases=_by_role(args.base),
        class_images=args.class_images,
        root=args.root,
    )
    verdict = verify(args.model, given, progress=_show_progress)
    for name, root in verdict.roots.items():
        print(f"{root}  {name}")
    for finding in verdict.findings:
        _print_finding(finding, None if args.all else MAX_NAMES)
    is_proven, not_checked = verdict.is_proven, verdict.not_checked
    if is_proven and args.rerun:
        status, findings = _rerun(args, given)
        if status:
            return status
        is_proven = all(one.answer == "same" for one in findings)
    rest = f"; not checked: {', '.join(not_checked)}" if not_checked else ""
    print(f"proven: nothing that was checked differs{rest}" if is_proven else "refuted")
    return 0 if is_proven else 1


def _add_options(parser: ArgumentParser) -> None:
    where = "its folder, a run's folder for all that it exported, or a .safetensors file"
    parser.add_argument("model", type=expanduser, help=f"the model: {where}")
    parser.add_argument(
        "--data",
        type=expanduser,
        nargs="+",
        default=[],
        metavar="DIR",
        help="the data folder, or one for each source, after the model; every file is read",
    )
    parser.add_argument(
        "--base",
        nargs="+",
        default=[],
        metavar="[ROLE=]PATH",
        help="the model that training started from; others by their role, as text_encoder=PATH",
    )
    parser.add_argument(
        "--class_images", type=expanduser, default="", help="the folder of prior preservation"
    )
    parser.add_argument(
        "--root", type=str, default="", help="the root as it was published, 64 hex digits"
    )
    parser.add_argument(
        "--rerun", action="store_true", help="train again, and compare the weights; needs --data"
    )
    parser.add_argument(
        "--bound",
        type=float,
        default=0.05,
        help="--rerun: distance of the weights over what was learned, allowed on another machine",
    )
    parser.add_argument("--all", action="store_true", help="list every image that differs")


def _by_role(bases: Sequence[str]) -> Mapping[str, str]:
    """Return paths by role, "" for one without; a path that has = and exists is no role's."""
    found: dict[str, str] = {}
    for text in bases:
        role, equals, path = text.partition("=")
        is_role = bool(equals) and role.isidentifier()
        key = role if is_role else ""
        if key in found:
            raise ValueError(f"--base names {key or 'the base'} twice; give others as ROLE=PATH")
        found[key] = expanduser(path if is_role else text)
    return found


def _show_progress(done: int, num: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {num:,} files", end="\r", file=sys.stderr, flush=True)


def _rerun(args: Namespace, given: Given) -> tuple[int, list[Finding]]:
    """Return the exit code of a rerun that was stopped, else 0 and what it found."""
    quieten_libraries()
    log_to_terminal()
    from latentdiff.audit.rerun import RerunStoppedError, rerun

    try:
        findings = rerun(args.model, given, bound=args.bound)
    except RerunStoppedError as stopped:
        print(f"latentdiff verify: {stopped}", file=sys.stderr)
        return stopped.status, []
    for finding in findings:
        _print_finding(finding, MAX_NAMES)
    return 0, findings


def _print_finding(finding: Finding, max_names: int | None) -> None:
    """Print a part's answer and what it rests on, a line each."""
    details, is_other = finding.details, finding.answer == "differs"
    note = f" ({details[0]})" if details and not is_other else ""
    print(f"{finding.part:9} {finding.answer}{note}")
    for line in (details if is_other else [])[:max_names]:
        print(f"  {line}")
    if is_other and max_names and len(details) > max_names:
        print(f"  and {len(details) - max_names:,} more; --all lists them")
