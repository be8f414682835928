"""Report a captioned folder's content and its problems.

python scripts/inspect_data.py FOLDER [--json] [--html PAGE]
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("inspect"))
