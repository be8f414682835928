"""The command that proves or refutes what a model was made of."""

import sys
from collections.abc import Sequence
from os.path import expanduser

from jsonargparse import ArgumentParser

from latentdiff.cli.command import log_to_terminal, quieten_libraries

MAX_NAMES = 20  # images listed before the rest is counted


def verify_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Compare a model with its bill of materials; exit code 1 where anything differs.

    Checks weights, configs, settings and every stated root, and what else is given. It proves that
    nothing was changed since, not who made it.
    """
    where = "its folder, a run's folder, or a .safetensors file"
    parser.add_argument("model", type=expanduser, help=f"the model: {where}")
    parser.add_argument(
        "--data",
        type=expanduser,
        nargs="+",
        default=[],
        metavar="DIR",
        help="the data folder, or one for each source; every file is read",
    )
    parser.add_argument("--base", type=expanduser, help="the model that training started from")
    parser.add_argument("--root", type=str, help="the root as it was published, 64 hex digits")
    parser.add_argument(
        "--rerun", action="store_true", help="train again, and compare the weights; needs --data"
    )
    parser.add_argument(
        "--bound",
        type=float,
        default=0.01,
        help="--rerun: distance of the weights over their norm that another machine may give",
    )
    parser.add_argument("--all", action="store_true", help="list every image that differs")
    args = parser.parse_args(arguments)
    if args.rerun and not args.data:
        raise ValueError("--rerun needs --data, the folder to train on again")
    from latentdiff.audit.verify import Finding, verify

    verdict = verify(args.model, data=args.data, base=args.base, root=args.root)
    print(f"root      {verdict.root}")
    for finding in verdict.findings:
        _print_finding(finding, None if args.all else MAX_NAMES)
    is_proven = verdict.is_proven
    if is_proven and args.rerun:
        quieten_libraries()
        log_to_terminal()
        from latentdiff.audit.rerun import RerunStoppedError, rerun

        try:
            again: Finding = rerun(args.model, data=args.data, base=args.base, bound=args.bound)
        except RerunStoppedError as stopped:
            print(f"latentdiff verify: {stopped}", file=sys.stderr)
            return stopped.status
        _print_finding(again, MAX_NAMES)
        is_proven = again.answer == "same"
    print("proven: nothing that was checked differs" if is_proven else "refuted")
    return 0 if is_proven else 1


def _print_finding(finding: object, max_names: int | None) -> None:
    """Print a part's answer and what it rests on, a line each."""
    part, answer, details = (getattr(finding, name) for name in ("part", "answer", "details"))
    print(f"{part:9} {answer}" + (f" ({details[0]})" if answer != "differs" and details else ""))
    for line in (details if answer == "differs" else [])[:max_names]:
        print(f"  {line}")
    if answer == "differs" and max_names and len(details) > max_names:
        print(f"  and {len(details) - max_names:,} more; --all lists them")
