"""Measure a fine-tuned subject: similarity to its photographs, drift on unrelated prompts.

python scripts/compare_subject.py BASE runs/mine/pipeline --photos DIR --features DIR \
    --prompt "a photo of sks dog" --out eval
"""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.config.evaluation import CompareSubjectOptions
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, draw, measure, print the figures; exit 0 done, 2 bad usage or input."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=str, help="the model before: a folder or a hub id")
    parser.add_argument("tuned", type=str, help="the model after: a folder")
    for name in ("photos", "features", "out"):
        parser.add_argument(f"--{name}", type=str, required=True)
    parser.add_class_arguments(CompareSubjectOptions)
    given = parser.parse_args().as_dict()
    base, tuned, photos, features, out = (
        given.pop(name) for name in ("base", "tuned", "photos", "features", "out")
    )
    quieten_libraries()
    from latentdiff.evaluation.compare_subject import compare_subject

    options = CompareSubjectOptions(**given)
    try:
        report = compare_subject(base, tuned, photos, Path(out), features=features, options=options)
    except (ValueError, OSError) as error:
        print(f"compare_subject.py: {error}", file=sys.stderr)
        return 2
    before, after, drift = report.similarity_before, report.similarity_after, report.drift
    print(f"similarity to {report.num_photos} photographs: {before:.4f} -> {after:.4f}")
    print(f"gain over {report.gain.difference.num_samples} seeds: {report.gain}")
    print(
        f"drift over {drift.num_samples} unrelated prompts: {drift.estimate:.4f} "
        f"[{drift.low:.4f}, {drift.high:.4f}]; unlike prompts: {report.unlike:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
