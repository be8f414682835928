"""Make images from prompts: a labelled sheet, or a folder of images.

python scripts/sample.py MODEL "a red heart" "a green apple" --out sheet.png
python scripts/sample.py MODEL --prompt_file prompts.txt --out images --json
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("sample"))
