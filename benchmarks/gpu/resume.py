"""Does a run on this device that is stopped and resumed end as the one that never stopped?

    python benchmarks/gpu/resume.py [--steps 12] [--out resume.json]

Three runs of a small U-Net from noise, in bf16, on shapes that are written here: two whole ones,
whose difference is what the device's own kernels leave open, and one that is stopped half-way and
resumed. `difference` is the largest of any weight, average or optimiser state at the end, relative
to that tensor's largest value; 0 is bit for bit. The losses logged are compared alike.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from sd15 import parser_of, run

from latentdiff.config.io import load_config
from latentdiff.data.shapes import write_shapes
from latentdiff.training.text_to_image.train_t2i import train

UNETS = {
    False: {"block_out_channels": "[128,192,192]", "attention_levels": "[true,true,true]"},
    True: {"block_out_channels": "[32,32]", "attention_levels": "[false,true]"},
}


def train_to(folder, name, steps, args):
    """Train a run of that name to a number of steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unet = {f"model.unet.{key}": value for key, value in UNETS[args.tiny].items()}
    settings = unet | {
        "data.root": folder / "shapes",
        "data.cache_dir": folder / "cache",
        "data.num_workers": 0,
        "model.vae": "latentdiff-vae",
        "model.text.width": 64,
        "model.text.num_layers": 1,
        "train.max_steps": steps,
        "train.batch_size": 8,
        "train.log_every_steps": 1,
        "train.checkpoint_every_steps": steps,
        "train.mixed_precision": "bf16",
        "train.report_to": "none",
        "preview.num_steps": 1,
        "preview.num_nearest": 0,
        "preview.every_steps": 0,
        "eval.every_steps": 0,
        "output_dir": folder / name,
    }
    config = load_config("demo_scratch", [f"--{key}={value}" for key, value in settings.items()])
    if train(config) != 0:
        raise RuntimeError(f"the run {name} did not end")


def state_of(folder, steps):
    """Return all tensors of a checkpoint, by file and name."""
    checkpoint = folder / "checkpoints" / f"step-{steps:09d}"
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.stem}/{n}": x for file in files for n, x in load_file(file).items()}


def losses_of(folder):
    """Return the logged loss by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def difference(first, second):
    """Return the largest relative difference of two states, and where it is."""
    if first.keys() != second.keys():
        raise ValueError(f"the states differ in {sorted(first.keys() ^ second.keys())[:8]}")
    worst = (0.0, "")
    for name, x in first.items():
        scale = float(x.double().abs().max()) or 1.0
        worst = max(worst, (float((x.double() - second[name].double()).abs().max()) / scale, name))
    return {"difference": worst[0], "at": worst[1] if worst[0] else None, "tensors": len(first)}


def measure(args):
    """Yield the figures."""
    torch.backends.cudnn.benchmark = False
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        folder = Path(name)
        write_shapes(folder / "shapes", num_train=32, num_test=4, size_px=32 if args.tiny else 64)
        train_to(folder, "whole", args.steps, args)
        train_to(folder, "again", args.steps, args)
        train_to(folder, "stopped", args.steps // 2, args)
        train_to(folder, "stopped", args.steps, args)
        whole = state_of(folder / "whole", args.steps)
        yield "steps", args.steps
        for other in ("again", "stopped"):
            yield other, difference(whole, state_of(folder / other, args.steps))
            own, others = losses_of(folder / "whole"), losses_of(folder / other)
            yield f"{other}_losses", max(abs(own[step] - others[step]) for step in own)


def main():
    """Train, compare, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    return run("resume", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
