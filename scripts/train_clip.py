"""Train a small CLIP on captioned folders and report its recall on held-out pairs.

python scripts/train_clip.py --config configs/clip_small.yaml --roots='[DIR, DIR]'
"""

import sys

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import parse_arguments
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, train, say where the CLIP is; exit 0 done, 2 bad usage or input."""
    config = parse_arguments(ClipConfig, description=(__doc__ or "").splitlines()[0])
    quieten_libraries()
    from latentdiff.training.clip.train_clip import train_clip

    try:
        report = train_clip(config)
    except (ValueError, OSError) as error:
        print(f"train_clip.py: {error}", file=sys.stderr)
        return 2
    for name, value in report.items():
        if not name.endswith(("/low", "/high")):
            print(f"{name}: {value:.4g}")
    print(f"wrote {config.output_dir}/clip (the judge), text_encoder and tokenizer (for a U-Net)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
