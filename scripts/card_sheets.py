r"""Write the sheets of a model's card and a test for readers, or score their answers.

python scripts/card_sheets.py MODEL --data DIR DIR --seen 40 8 --unseen 20 4 --questions 18 6 \
    --out sheets
python scripts/card_sheets.py --score sheets/key.json answers.json
"""

import sys

from latentdiff.cli.main import run_as_script

if __name__ == "__main__":
    sys.exit(run_as_script("export card-sheets"))
