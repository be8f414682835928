"""Write a model small: in half precision, in shards, without a path of this machine.

python scripts/pack_model.py runs/mini/pipeline --out latentdiff/assets/mini --card card.md
"""

import argparse
import sys
from pathlib import Path

from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, pack, list the files; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or float32")
    parser.add_argument("--max_file_mb", type=float, default=14.0, help="of any one file")
    parser.add_argument("--max_total_mb", type=float, default=45.0, help="of all files together")
    parser.add_argument("--guidance_scale", type=float, help="what calls take by default")
    parser.add_argument("--card", type=Path, help="its README.md; made of its facts by default")
    args = vars(parser.parse_args())
    quieten_libraries()
    from latentdiff.sampling.release import MB, pack_model

    out = args["out"]
    try:
        sizes = pack_model(args.pop("model"), args.pop("out"), **args)
    except (ValueError, OSError) as error:
        print(f"pack_model.py: {error}", file=sys.stderr)
        return 2
    for name, size in sizes.items():
        print(f"{size / MB:8.2f} MB  {name}")
    print(f"{sum(sizes.values()) / MB:8.2f} MB  {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
