"""Write one file of SDXL's real shapes and read it back, bit for bit, offline.

    python benchmarks/sdxl_real_size.py [FOLDER]

U-Net (2.57 billion parameters), VAE and both text encoders hold noise in bfloat16. The file is
written as `latentdiff export single-file` does and opened as `latentdiff convert single-file` does,
and every weight is compared; one JSON line says how long that took and how much memory. Needs 16 GB
of memory, 7 GB of disk in FOLDER (by default the temporary folder), and no network.
"""

import gc
import json
import os
import resource
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor, nn

from latentdiff import LatentDiffPipeline
from latentdiff.models.open_clip import clip_tokenizer_from_open_clip
from latentdiff.pipeline.files.single_file import (
    bundled_configs,
    empty_modules,
    save_single_file,
)

NOISE = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")


def weight(name: str, like: Tensor) -> Tensor:
    """Return noise in a weight's shape, which follows from its name."""
    start = zlib.crc32(name.encode()) % len(NOISE)
    count = -(-like.numel() // len(NOISE)) + 1
    return NOISE.roll(-start).repeat(count)[: like.numel()].clone().view(like.shape)


def make_pipeline() -> LatentDiffPipeline:
    """Build SDXL of real size from the configs that ship."""
    configs = bundled_configs("sdxl")
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


def measure(path: Path) -> dict[str, Any]:
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
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(prefix="sdxl-", dir=where) as folder:
        print(json.dumps(measure(Path(folder) / "sdxl.safetensors")), flush=True)


if __name__ == "__main__":
    main()
