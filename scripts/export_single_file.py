"""Write a Stable Diffusion 1.x folder as one .safetensors file for ComfyUI and A1111.

python scripts/export_single_file.py runs/mine/pipeline --out mine.safetensors --dtype float16
"""

import argparse
import sys
from pathlib import Path

from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, convert, say where it is; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    args = parser.parse_args()
    quieten_libraries()
    from latentdiff.sampling.conversion import export_single_file

    try:
        print(f"wrote {export_single_file(args.model, args.out, dtype=args.dtype)}")
    except (ValueError, OSError) as error:
        print(f"export_single_file.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
