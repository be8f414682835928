"""Train a small CLIP on captioned folders.

python scripts/train_clip.py --config configs/clip_small.yaml --roots='[DIR, DIR]'
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("train-clip"))
