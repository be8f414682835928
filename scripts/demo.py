"""The demo: write coloured shapes, train on them from scratch, draw prompts never seen together.

python scripts/demo.py        (or: make demo, which installs first)
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

from latentdiff.config_file import load_config
from latentdiff.console import quieten_libraries

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
FOLDER = Path("demo-run")


def train() -> int:
    """Train in a process for each half of a CPU's cores, or in one on a GPU; return its status.

    So small a model gains more from two processes than from two threads.
    """
    import torch

    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    num_processes = 1 if torch.accelerator.is_available() else min(2, num_cores)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc_per_node", str(num_processes), str(ROOT / "scripts" / "train_t2i.py")]
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // num_processes))}
    command = [*launcher, *script, "--config", str(CONFIG)]
    return subprocess.run(command, env=os.environ | threads, check=False).returncode


def main() -> int:
    """Write the data, train with configs/demo.yaml, write the sheet, say what to do next."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quieten_libraries()
    from latentdiff.data.shapes import split_scenes, write_shapes
    from latentdiff.pipeline.sample_options import SampleOptions
    from latentdiff.pipeline.sampling import sample

    root = write_shapes(FOLDER / "shapes", num_train=2000, num_test=100)
    config = load_config(CONFIG)
    if status := train():
        return status
    prompts = [scene.caption for scene in split_scenes()[1]][::3][:16]
    sheet = FOLDER / "sheet.png"
    options = SampleOptions(out=str(sheet), steps=25, guidance_scale=3.0, seed=0)
    model = Path(config.output_dir) / "pipeline"
    for record in sample(str(model), prompts, options):
        print(f"wrote {record['kind']} {record['path']}")
    print(
        f"\n{sheet} shows {len(prompts)} captions whose combination was never in {root}/train.\n"
        f'Another picture:   .venv/bin/python scripts/sample.py {model} "a large red star on a '
        'pink background" --out star.png\n'
        "Your own folder:   .venv/bin/python scripts/inspect_data.py DIR\n"
        "                   .venv/bin/accelerate launch scripts/train_t2i.py "
        "--config configs/emoji.yaml --data.root=DIR --model.vae=latentdiff-vae"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
