"""Write a run's model with the weights' EMA of any width.

python scripts/reconstruct_ema.py runs/mine --width 0.08 --out runs/mine/pipeline-0.08
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("export ema"))
