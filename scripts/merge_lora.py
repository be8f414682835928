"""Merge one or several LoRA files into a model's folder.

python scripts/merge_lora.py BASE runs/mine/lora --out merged
python scripts/merge_lora.py BASE style.safetensors subject.safetensors --weights 0.6 1 --out merged
"""

import argparse
import sys
from pathlib import Path

from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, merge, say where it is; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("loras", nargs="+", help="LoRA files or folders, diffusers' or kohya's")
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="one a LoRA; 1 each")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    quieten_libraries()
    from latentdiff.sampling.conversion import merge_loras

    try:
        print(f"wrote {merge_loras(args.base, args.loras, args.out, weights=args.weights)}")
    except (ValueError, OSError) as error:
        print(f"merge_lora.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
