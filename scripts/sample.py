"""Make images from prompts: a labelled sheet, or a folder of images that can be resumed.

python scripts/sample.py MODEL "a red heart" "a green apple" --out sheet.png
python scripts/sample.py MODEL --prompt_file prompts.txt --out images --json
"""

from __future__ import annotations

import json
import sys
from functools import partial

from jsonargparse import ArgumentParser

from latentdiff.config.sampling import SampleOptions
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, sample, say what was written; exit 0 done, 2 bad usage or input."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("prompts", type=str, nargs="*", help="what to draw")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each file")
    parser.add_class_arguments(SampleOptions)
    given = parser.parse_args().as_dict()
    quieten_libraries()
    from latentdiff.sampling.sample import sample

    log = partial(print, file=sys.stderr, flush=True)

    model, prompts, as_json = given.pop("model"), given.pop("prompts"), given.pop("json")
    try:
        for record in sample(model, prompts, SampleOptions(**given), log=log):
            line = json.dumps(record) if as_json else f"wrote {record['kind']} {record['path']}"
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
