"""Write a run's model with the weights' average of any width, from the snapshots in power_ema/.

python scripts/reconstruct_ema.py runs/mine --width 0.08 --out runs/mine/pipeline-0.08
"""

import argparse
import sys
from pathlib import Path

from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, rebuild, write; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run", type=Path, help="the folder of a run with train.posthoc_ema_sigma_rel"
    )
    parser.add_argument("--width", type=float, required=True, help="sigma_rel, such as 0.08")
    parser.add_argument("--step", type=int, help="a snapshot's step; by default the last")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    quieten_libraries()
    from latentdiff.training.export import export_reconstructed

    try:
        export_reconstructed(args.run, args.out, width=args.width, step=args.step)
    except (ValueError, OSError) as error:
        print(f"reconstruct_ema.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out} with the average of width {args.width}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
