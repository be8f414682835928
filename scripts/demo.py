"""Fine-tune the bundled model on shapes with a face: make demo, which installs first.

python scripts/demo.py [--train.max_steps=100]
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("demo"))
