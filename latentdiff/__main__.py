"""`python -m latentdiff COMMAND ...`; latentdiff/cli/main.py has the commands."""

import sys

from latentdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
