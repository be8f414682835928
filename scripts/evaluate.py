"""Measure a model on held-out captioned images; write metrics.json and report.html.

python scripts/evaluate.py MODEL --data DIR --out eval
python scripts/evaluate.py MODEL --data DIR --out eval --features DIR --clip DIR --compare OTHER
python scripts/evaluate.py MODEL --data DIR --out eval --bound --guidance_sweep [1,2,4,8]
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("evaluate"))
