"""Merge one or several LoRA files into a model's folder.

python scripts/merge_lora.py BASE style.safetensors subject.safetensors --weights 0.6 1 --out merged
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("export merge"))
