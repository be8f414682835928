"""Measure a model on held-out captioned images; writes metrics.json and report.html.

python scripts/evaluate.py MODEL --data DIR --out eval
python scripts/evaluate.py MODEL --data DIR --out eval --features DIR --clip DIR --compare OTHER
python scripts/evaluate.py MODEL --data DIR --out eval --bound --guidance_sweep [1,2,4,8]
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from latentdiff.config.evaluation import (
    BoundOptions,
    EvalModelOptions,
    EvaluationOptions,
    SweepOptions,
)
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, measure, say where it is; exit 0 done, 1 failed numbers, 2 bad usage or input."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--out", type=str, required=True, help="the folder for the results")
    parser.add_argument("--bound", action="store_true", help="the variational bound in bits")
    for options in (EvalModelOptions, EvaluationOptions, BoundOptions, SweepOptions):
        parser.add_class_arguments(options)
    given = parser.parse_args().as_dict()
    quieten_libraries()
    from latentdiff.evaluation.evaluate import evaluate

    try:
        report = evaluate(
            given["model"],
            Path(given["out"]),
            data=chosen(EvalModelOptions, given),
            options=chosen(EvaluationOptions, given),
            bound=chosen(BoundOptions, given) if given["bound"] else None,
            sweep=chosen(SweepOptions, given),
        )
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    print(f"wrote {report.with_name('metrics.json')} and {report}", flush=True)
    return 0


def chosen(kind: Any, given: dict[str, Any]) -> Any:
    """Return a section's options from the command line."""
    return kind(**{field.name: given[field.name] for field in fields(kind)})


if __name__ == "__main__":
    sys.exit(main())
