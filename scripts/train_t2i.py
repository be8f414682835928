"""Train or fine-tune a text-to-image latent diffusion model on a captioned folder.

python scripts/train_t2i.py --config configs/emoji.yaml --data.root=DIR
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("train"))
