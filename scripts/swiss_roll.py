"""A swiss roll in the plane: its chain forth and back, its bound against its known entropy.

python scripts/swiss_roll.py --out docs
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.atomic import write_text
from latentdiff.config.evaluation import RollOptions


def main() -> int:
    """Parse, train, bound, sample; write swiss_roll.png and .json; exit 0 done, 2 bad input."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=str, default="docs", help="the folder for both files")
    parser.add_class_arguments(RollOptions)
    given = parser.parse_args().as_dict()
    options = RollOptions(**{field.name: given[field.name] for field in fields(RollOptions)})
    out = Path(given["out"])
    from latentdiff.evaluation.report.plots import check_matplotlib, plot_clouds
    from latentdiff.evaluation.swiss_roll import swiss_roll

    try:
        check_matplotlib()
        figures, clouds = swiss_roll(options)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "swiss_roll.json", json.dumps(figures, indent=2) + "\n")
        print(f"wrote {plot_clouds(clouds, figures, out / 'swiss_roll.png')}", flush=True)
    except (ValueError, OSError) as error:
        print(f"swiss_roll.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
