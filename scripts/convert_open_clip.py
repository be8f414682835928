"""Convert the text encoder of an open_clip model.

python scripts/convert_open_clip.py ViT-H-14 open_clip_model.safetensors OUT
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("convert open-clip"))
