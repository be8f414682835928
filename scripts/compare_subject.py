r"""Measure a fine-tuned subject: similarity to its photographs, drift on unrelated prompts.

python scripts/compare_subject.py BASE runs/mine/pipeline --photos DIR --features DIR \
    --prompt "a photo of sks dog" --out eval
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("compare"))
