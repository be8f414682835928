"""Merge captioned folders into one.

python scripts/combine_folders.py OUT DIR DIR ...
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("convert merge-folders"))
