"""Write a model small: in half precision, in shards, without a path of this machine.

python scripts/pack_model.py runs/mini/pipeline --out latentdiff/assets/mini --card card.md
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("export pack"))
