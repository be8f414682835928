"""Train from scratch on coloured shapes: make demo-scratch, which installs first.

python scripts/demo_scratch.py
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("demo scratch"))
