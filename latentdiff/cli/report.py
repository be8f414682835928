"""The command that reports runs: curves, sheets and settings on one page."""

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser


def report_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write one HTML page on a training run, or compare several: curves, sheets, data, settings."""
    parser.add_argument(
        "runs", type=expanduser, nargs="+", metavar="RUN", help="run folders, running or ended"
    )
    parser.add_argument(
        "--out",
        type=expanduser,
        help="the page to write; by default report.html, or for several runs comparison.html, in "
        "the first run's folder",
    )
    args = parser.parse_args(arguments)
    from latentdiff.training.report.report import write_run_report

    print(f"wrote {write_run_report(args.runs, Path(args.out) if args.out else None)}", flush=True)
    return 0
