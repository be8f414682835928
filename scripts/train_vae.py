"""Train an AutoencoderKL on folders of images.

python scripts/train_vae.py --config configs/vae_small.yaml --roots='[DIR, DIR]'
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("train-vae"))
