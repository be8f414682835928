"""Make one captioned folder of several, each with train/ and test/ and a metadata.jsonl in them.

python scripts/combine_folders.py OUT DIR DIR ...
python scripts/train_t2i.py --config configs/emoji.yaml --data.root=OUT \
    --data.caption_column=captions --model.vae=latentdiff-vae
"""

import argparse
import sys

from latentdiff.data.merge_folders import merge_folders


def main() -> int:
    """Combine, say how many images came from where; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", help="the new folder")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a folder with train/ and test/")
    args = parser.parse_args()
    try:
        counts = merge_folders(args.out, args.folders)
    except (ValueError, OSError) as error:
        print(f"combine_folders.py: {error}", file=sys.stderr)
        return 2
    for name, splits in counts.items():
        print(f"{name}: " + ", ".join(f"{count:,} {split}" for split, count in splits.items()))
    print(
        f"wrote {args.out}; its column captions has every caption (--data.caption_column=captions)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
