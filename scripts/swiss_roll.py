"""Train on a swiss roll in the plane; plot the chain and the bound.

python scripts/swiss_roll.py --out docs
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("demo swiss-roll"))
