"""Write a Stable Diffusion 1.x folder as one .safetensors file.

python scripts/export_single_file.py runs/mine/pipeline --out mine.safetensors --dtype float16
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("export single-file"))
