"""Measure a model on held-out captioned pictures; writes metrics.json, plots and sheets.

python scripts/evaluate.py MODEL --data DIR --out eval --bound
python scripts/evaluate.py MODEL --data DIR --out eval --guidance_sweep [1,2,4,8]
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from latentdiff.console import quieten_libraries
from latentdiff.evaluation.bound_data import SubjectOptions, open_subject
from latentdiff.evaluation.bound_report import BoundOptions, bound_report, write_metrics
from latentdiff.evaluation.guidance_sweep import SweepOptions, sweep_report


def main() -> int:
    """Parse, measure, say where it is; exit 0 done, 1 failed numbers, 2 bad usage or input."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--out", type=str, required=True, help="the folder for the results")
    parser.add_argument("--bound", action="store_true", help="the variational bound in bits")
    for options in (SubjectOptions, BoundOptions, SweepOptions):
        parser.add_class_arguments(options)
    given = parser.parse_args().as_dict()
    quieten_libraries()
    try:
        print(f"wrote {measure(given, Path(given['out']))}", flush=True)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    return 0


def measure(given: dict[str, Any], out: Path) -> Path:
    """Measure each section that is asked for; return the path of the figures."""
    if not given["bound"] and not given["guidance_sweep"]:
        raise ValueError("nothing to measure; ask for --bound or --guidance_sweep [1,2,4]")
    subject = open_subject(given["model"], chosen(SubjectOptions, given))
    metrics: dict[str, Any] = {"model": given["model"], "data": given["data"]}
    if given["bound"]:
        metrics["bound"] = bound_report(subject, out, chosen(BoundOptions, given))
    if given["guidance_sweep"]:
        metrics["guidance"] = sweep_report(subject, out, chosen(SweepOptions, given))
    return write_metrics(out, metrics)


def chosen(kind: Any, given: dict[str, Any]) -> Any:
    """Return a section's options from the command line."""
    return kind(**{field.name: given[field.name] for field in fields(kind)})


if __name__ == "__main__":
    sys.exit(main())
