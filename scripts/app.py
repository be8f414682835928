"""Serve a web UI that makes images with a model.

python scripts/app.py MODEL
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("app"))
