"""SDXL at its real size, offline: one file written and read back bit for bit, three LoRA steps.

    python benchmarks/sdxl_real_size.py file [--folder FOLDER] [--out FILE.json]
    python benchmarks/sdxl_real_size.py lora [--side_px 256] [--out FILE.json]

U-Net (2.57 billion parameters), VAE and both text encoders hold noise in bfloat16. The file is
written as `latentdiff export single-file` does and opened as `latentdiff convert single-file` does,
and every weight is compared. The LoRA of rank 16 is trained on the frozen U-Net in bf16, with
gradient checkpointing, as `latentdiff train` does it from its caches. One JSON line says how long
that took and how much memory. The file needs 16 GB of memory, and 7 GB of disk in FOLDER (by
default the temporary folder); the LoRA 10 GB of memory.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import tempfile
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor, nn

from latentdiff import LatentDiffPipeline
from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.data.shapes import write_shapes
from latentdiff.models.components import Components
from latentdiff.models.open_clip import clip_tokenizer_from_open_clip
from latentdiff.pipeline.files.single_file import (
    bundled_configs,
    empty_modules,
    save_single_file,
)
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.text_to_image import setup as text_to_image
from latentdiff.training.text_to_image.memory import estimate_memory

NOISE = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
TRAINED_ON = (*MODELS, "tokenizer", "tokenizer_2", "scheduler")
LORA = {
    "finetune.method": "lora",
    "finetune.lora_rank": 16,
    "data.heldout_fraction": 0,
    "data.num_workers": 0,
    "train.frozen_dtype": "bf16",
    "train.mixed_precision": "bf16",
    "train.gradient_checkpointing": "true",
    "train.batch_size": 1,
    "train.max_steps": 3,
    "train.ema": "false",
    "preview.num_nearest": 0,
}


def weight(name: str, like: Tensor) -> Tensor:
    """Return noise in a weight's shape, which follows from its name."""
    start = zlib.crc32(name.encode()) % len(NOISE)
    count = -(-like.numel() // len(NOISE)) + 1
    return NOISE.roll(-start).repeat(count)[: like.numel()].clone().view(like.shape)


def make_pipeline(*, text_layers: int | None = None) -> LatentDiffPipeline:
    """Build SDXL of real size from the configs that ship; text_layers: fewer, for less memory."""
    configs = bundled_configs("sdxl")
    for name in ("text_encoder", "text_encoder_2") if text_layers else ():
        configs[name] = configs[name] | {"num_hidden_layers": text_layers}
    modules: dict[str, Any] = empty_modules({name: configs[name] for name in MODELS})
    for part, module in modules.items():
        state = {key: weight(f"{part}.{key}", x) for key, x in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
    tokenizers = {f"tokenizer{end}": clip_tokenizer_from_open_clip() for end in ("", "_2")}
    scheduler = EulerDiscreteScheduler.from_config(configs["scheduler"])
    return LatentDiffPipeline(**modules, **tokenizers, scheduler=scheduler)


def num_different(part: str, module: nn.Module) -> int:
    """Count the weights that are not those that were written."""
    return sum(
        not torch.equal(value, weight(f"{part}.{key}", value))
        for key, value in module.state_dict().items()
    )


def measure_file(path: Path) -> dict[str, Any]:
    """Write, open and compare."""
    pipe = make_pipeline()
    started = time.perf_counter()
    save_single_file(pipe, path)
    written = time.perf_counter() - started
    del pipe  # both would not fit into little memory
    gc.collect()
    with safe_open(path, "pt") as file:
        num_tensors = len(file.keys())
    started = time.perf_counter()
    pipe = LatentDiffPipeline.from_single_file(path, dtype=torch.bfloat16)
    opened = time.perf_counter() - started
    different = sum(num_different(part, getattr(pipe, part)) for part in MODELS)
    assert different == 0, f"{different} weights differ"
    return {
        "benchmark": "sdxl_real_size",
        "unet_billions": round(sum(p.numel() for p in pipe.unet.parameters()) / 1e9, 2),
        "file_gb": round(path.stat().st_size / 1e9, 2),
        "tensors": num_tensors,
        "write_seconds": round(written, 1),
        "open_seconds": round(opened, 1),
        "weights_different": different,
        "peak_memory_gb": peak_gb(),
    }


def peak_gb() -> float:
    """Return the most memory that this process had, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def resident_gb(entry: str) -> float:
    """Return a figure of /proc/self/status: VmRSS, now, or VmHWM, at most since it was reset."""
    value = Path("/proc/self/status").read_text(encoding="utf-8").split(f"{entry}:")[1]
    return int(value.split()[0]) * 1024 / 1e9


@torch.no_grad()
def calm(module: nn.Module) -> None:
    """Scale weights so that activations keep their size, as those of a trained model do."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float(name.endswith("weight")))


def measure_lora(folder: Path, *, side_px: int) -> dict[str, Any]:
    """Train three steps of a LoRA on images of shapes.

    estimate_gb: the plan's; steps_gb: the growth from before the model is made to their peak.
    """
    write_shapes(folder / "data", num_train=2, num_test=1, size_px=side_px)
    (folder / "run").mkdir()
    given = LORA | {
        "model.pretrained": folder,
        "data.root": folder / "data",
        "data.cache_dir": folder / "cache",
        "data.resolution": side_px,
        "output_dir": folder / "run",
    }
    config = parse_arguments(Config, [f"--{name}={value}" for name, value in given.items()])
    before = resident_gb("VmRSS")
    parts = make_pipeline(text_layers=2).components  # their states are cached
    for name in MODELS:
        calm(parts[name])
    parts["vae"].float()  # images are encoded in float32
    components = Components(**{name: parts[name] for name in TRAINED_ON})
    text_to_image.pretrained_components = lambda config: components
    accelerator = start_accelerator(config)
    run = text_to_image.setup(config, folder / "run", accelerator)
    batches = run.train_data.batches(
        run.layout, first_step=0, last_step=3, accelerator=accelerator, seed=0
    )
    estimate = estimate_memory(run)
    seconds, losses, peak = [], [], peak_gb()
    ctypes.CDLL(None).malloc_trim(0)  # what encoding has freed
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for step in range(3):
        started = time.perf_counter()
        result = run.train_step.step(batches, step=step, count=1, accumulation=1)
        losses.append(round(float(result.loss), 4))
        seconds.append(round(time.perf_counter() - started, 1))
    unet = components.unet
    return {
        "benchmark": "sdxl_real_size_lora",
        "side_px": side_px,
        "unet_billions": round(sum(p.numel() for p in unet.parameters()) / 1e9, 2),
        "trained_millions": round(sum(p.numel() for p in run.train_step.parameters.values()) / 1e6),
        "losses": losses,
        "seconds": seconds,
        "estimate_gb": round(estimate.on_device / 1e9, 2),
        "estimate_by_part_gb": {
            name: round((value or 0) / 1e9, 2) for name, value in asdict(estimate).items()
        },
        "steps_gb": round(resident_gb("VmHWM") - before, 2),
        "peak_memory_gb": max(peak, peak_gb()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["file", "lora"])
    parser.add_argument("--folder", help="where the files are written, for as long as it takes")
    parser.add_argument("--side_px", type=int, default=256, help="side of the LoRA's images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="sdxl-", dir=options.folder) as scratch:
        if options.part == "file":
            row = measure_file(Path(scratch) / "sdxl.safetensors")
        else:
            row = measure_lora(Path(scratch), side_px=options.side_px)
    print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
