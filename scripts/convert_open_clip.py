"""Convert the text encoder of an open_clip model to a text_encoder and a tokenizer folder.

python scripts/convert_open_clip.py ViT-H-14 open_clip_model.safetensors OUT
"""

import argparse
import sys
from pathlib import Path

from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, convert, write; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the model's name in open_clip, for example ViT-H-14")
    parser.add_argument("weights", type=Path, help="its weights, a .safetensors file")
    parser.add_argument("out", type=Path, help="folder for text_encoder/ and tokenizer/")
    args = parser.parse_args()
    quieten_libraries()
    from latentdiff.models.open_clip import load_open_clip

    try:
        text_encoder, tokenizer = load_open_clip(args.name, args.weights)
        text_encoder.save_pretrained(args.out / "text_encoder")
        tokenizer.save_pretrained(args.out / "tokenizer")
    except (ValueError, OSError) as error:
        print(f"convert_open_clip.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}/text_encoder (width {text_encoder.config.hidden_size}) and tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
