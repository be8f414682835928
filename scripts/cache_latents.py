"""Build, verify or prune the cache of a config's encoded images and captions.

python scripts/cache_latents.py [build] --config configs/emoji.yaml --data.root=DIR --model.vae=DIR
python scripts/cache_latents.py verify --config runs/emoji/config.yaml
python scripts/cache_latents.py prune --config A.yaml [--also B.yaml C.yaml] [--delete]
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("cache"))
