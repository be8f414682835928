"""From scratch: write coloured shapes, train on them, draw prompts never seen together.

python scripts/demo_scratch.py        (or: make demo-scratch, which installs first)
"""

import argparse
import logging
import sys
from pathlib import Path

from latentdiff.config.io import load_config
from latentdiff.terminal import quieten_libraries

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo_scratch.yaml"
FOLDER = Path("demo-scratch-run")


def main() -> int:
    """Write the data, train with configs/demo_scratch.yaml, write the sheet, say what is next."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quieten_libraries()
    from latentdiff.config.sampling import SampleOptions
    from latentdiff.data.shapes import split_scenes, write_shapes
    from latentdiff.sampling.sample import sample
    from latentdiff.training.distributed import launch

    root = write_shapes(FOLDER / "shapes", num_train=3000, num_test=100)
    config = load_config(CONFIG)
    if status := launch(ROOT / "scripts" / "train_t2i.py", ["--config", str(CONFIG)]):
        return status
    prompts = [scene.caption for scene in split_scenes()[1]][::3][:16]
    sheet = FOLDER / "sheet.png"
    options = SampleOptions(out=str(sheet), steps=25, guidance_scale=3.0, seed=0)
    model = Path(config.output_dir) / "pipeline"
    for record in sample(str(model), prompts, options):
        print(f"wrote {record['kind']} {record['path']}")
    print(
        f"\n{sheet} shows {len(prompts)} captions whose combination was never in {root}/train.\n"
        f'Another image:   .venv/bin/python scripts/sample.py {model} "a large red star on a '
        'pink background" --out star.png\n'
        "Your own folder:   .venv/bin/python scripts/inspect_data.py DIR\n"
        "                   .venv/bin/accelerate launch scripts/train_t2i.py "
        "--config configs/emoji.yaml --data.root=DIR --model.vae=latentdiff-vae"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
