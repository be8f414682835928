"""The plan's memory of an SDXL run in each memory mode, next to the measured peak of its steps.

    python benchmarks/training_memory.py [--width 160] [--side_px 256] [--out FILE.json]
    python benchmarks/training_memory.py --sdxl [--side_px 1024] [--out FILE.json]

The first trains a U-Net of SDXL's layout, smaller, for three steps of each mode on this machine,
and prints one JSON line a mode. `estimate` is the plan's. `allocated` is PyTorch's own record: the
tensors alive before the third step, and the most that it allocates on top, as a GPU's
max_memory_allocated; the memory of libraries, and of kernels within themselves, is not in it. The
second states the real U-Net's (2.57 billion parameters) without computing anything.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fakes"))
MODES: dict[str, dict[str, Any]] = {
    "AdamW in float32": {"train.optimizer": "adamw"},
    "LoRA on a bf16 base": {
        "finetune.method": "lora",
        "train.frozen_dtype": "bf16",
    },
    "fused backward pass, Adafactor": {
        "train.optimizer": "adafactor",
        "train.fused_backward_pass": "true",
        "train.max_grad_norm": 0,
    },
    "bf16 weights, fused, Adafactor": {
        "train.optimizer": "adafactor",
        "train.fused_backward_pass": "true",
        "train.full_bf16": "true",
        "train.max_grad_norm": 0,
    },
}
SDXL = {  # stabilityai/stable-diffusion-xl-base-1.0's U-Net
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def main() -> None:
    """Measure each mode in a process of its own, or state SDXL's memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=160, help="channels of the finest level")
    parser.add_argument("--side_px", type=int, default=256)
    parser.add_argument("--mode", choices=list(MODES), help="one mode, in this process")
    parser.add_argument("--sdxl", action="store_true", help="state the real U-Net's memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options.mode, width=options.width, side_px=options.side_px)))
        return
    rows = []
    for mode in MODES:
        side_px = options.side_px
        row = estimate_sdxl(mode, side_px=side_px) if options.sdxl else _child(mode, options)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _child(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--mode", mode, "--width", f"{options.width}"]
    command += ["--side_px", f"{options.side_px}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(mode: str, *, width: int, side_px: int) -> dict[str, Any]:
    """Train three steps in a mode; return the plan's estimate and what was measured, in bytes."""
    from latentdiff.training.distributed import start_accelerator
    from latentdiff.training.text_to_image.memory import estimate_memory
    from latentdiff.training.text_to_image.setup import setup

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_world(folder, width=width, side_px=side_px)
        config = _config(mode, folder, side_px=side_px)
        accelerator = start_accelerator(config)
        before = _live_bytes()
        run = setup(config, folder, accelerator)
        plan = estimate_memory(run)
        batches = run.train_data.batches(
            run.layout, first_step=0, last_step=3, accelerator=accelerator, seed=0
        )
        step = partial(run.train_step.step, batches, count=1, accumulation=1)
        for index in range(2):
            step(step=index)
        allocated = _allocated(partial(step, step=2)) - before
    return {
        "mode": mode,
        "width": width,
        "side_px": side_px,
        "estimate": plan.on_device,
        "allocated": allocated,
        "ratio": round(plan.on_device / allocated, 3),
        "parts": asdict(plan),
    }


def _config(mode: str, folder: Path, *, side_px: int) -> Any:
    from latentdiff.config.io import parse_arguments
    from latentdiff.config.text_to_image import Config

    arguments = {
        "model.pretrained": folder / "base",
        "data.root": folder / "data",
        "data.cache_dir": folder / "cache",
        "data.resolution": side_px,
        "data.heldout_fraction": 0,
        "output_dir": folder,
        "train.max_steps": 3,
        "train.batch_size": 1,
        "train.ema": "false",
        "train.mixed_precision": "bf16",
        "train.gradient_checkpointing": "true",
        "preview.num_nearest": 0,
    } | MODES[mode]
    return parse_arguments(Config, [f"--{key}={value}" for key, value in arguments.items()])


def _allocated(work: Callable[[], Any]) -> int:
    """Do a step; return the bytes of all tensors at its peak."""
    from fakes_memory import allocated_peak

    return _live_bytes() + allocated_peak(work)


def _live_bytes() -> int:
    """Return the bytes of the tensors that Python knows of."""
    import torch

    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _write_world(folder: Path, *, width: int, side_px: int) -> None:
    """Write a model of SDXL's layout with random weights, and a few images."""
    from fakes_sdxl import POOLED, WIDTHS, sdxl_components, sdxl_unet

    from latentdiff.data.shapes import write_shapes
    from latentdiff.pipeline import LatentDiffPipeline

    widths = (width, 2 * width, 4 * width)
    unet = sdxl_unet(
        **SDXL
        | {
            "sample_size": side_px // 4,
            "block_out_channels": widths,
            "attention_head_dim": tuple(value // 32 for value in widths),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": sum(WIDTHS),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": POOLED + 6 * 8,
            "layers_per_block": 2,
            "norm_num_groups": 32,
        }
    )
    LatentDiffPipeline(**sdxl_components(unet=unet)).save_pretrained(folder / "base")
    write_shapes(folder / "data", num_train=4, num_test=1, size_px=side_px)


def estimate_sdxl(mode: str, *, side_px: int) -> dict[str, Any]:
    """State the memory of the real U-Net with gradient checkpointing, one image at once, in GB.

    The text encoders and the VAE are on the host: captions and latents are cached.
    """
    import torch

    from latentdiff.config.train import TrainConfig
    from latentdiff.models.conditioning import Conditioning
    from latentdiff.training.optim.memory import num_bytes, optimizer_bytes, update_bytes
    from latentdiff.training.optim.optimizer import parameter_groups
    from latentdiff.training.text_to_image.memory import Update, estimate_activations

    settings = MODES[mode]
    fused = settings.get("train.fused_backward_pass") == "true"
    name: Any = settings.get("train.optimizer", "adamw")
    train = TrainConfig(
        full_bf16=settings.get("train.full_bf16") == "true",
        frozen_dtype=settings.get("train.frozen_dtype", "fp32"),
    )
    model = _sdxl_model(train, method=settings.get("finetune.method", "full"))

    def inputs() -> tuple[Any, ...]:
        text = torch.empty(1, 77, 2048), torch.empty(1, 1280)
        sizes = torch.empty(1, 6, dtype=torch.int64)
        zt = torch.empty(1, 4, side_px // 8, side_px // 8)
        return zt, torch.empty(1, dtype=torch.int64), Conditioning(*text, time_ids=sizes)

    sizes = [num_bytes([p]) for p in model.parameters() if p.requires_grad]
    parts = {
        "weights": num_bytes(model.parameters()),
        "gradients": max(sizes) if fused else sum(sizes),
        "optimizer": optimizer_bytes(
            parameter_groups(model, weight_decay=0.01, name=name), name=name
        ),
        "activations": estimate_activations(
            model,
            inputs,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=not fused),
            update=Update(partial(update_bytes, name=name), is_fused=fused),
        ),
    }
    gigabytes = {key: round(value / 1e9, 2) for key, value in parts.items()}
    total = round(sum(parts.values()) / 1e9, 2)
    return {"mode": mode, "side_px": side_px, "total_gb": total, "parts_gb": gigabytes}


def _sdxl_model(train: Any, *, method: Any) -> Any:
    """Return the real U-Net without contents, in the dtypes of a memory mode."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model

    from latentdiff.models.unet.guidance_embedding import predict
    from latentdiff.training.finetune.methods import TRAINABLE
    from latentdiff.training.text_to_image.memory_modes import cast_weights

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel(**SDXL)
            if method == "lora":
                targets = ["to_q", "to_k", "to_v", "to_out.0"]
                lora = LoraConfig(r=16, lora_alpha=16, target_modules=targets)
                inject_adapter_in_model(lora, self.unet)
            self.unet.enable_gradient_checkpointing()

        def forward(self, zt: Any, t: Any, conditioning: Any) -> Any:
            return predict(self.unet, zt, t, conditioning)

    with torch.device("meta"):
        model = Model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINABLE[method](name))
    cast_weights(model, train)
    return model.to_empty(device="cpu")  # pages that nothing writes to take no memory


if __name__ == "__main__":
    main()
