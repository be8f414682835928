"""The plan's memory of an SDXL run in each memory mode, next to the measured peak of its steps.

    python benchmarks/training_memory.py [--width 160] [--side_px 256] [--out FILE.json]
    python benchmarks/training_memory.py --sdxl [--side_px 1024] [--out FILE.json]

The first trains a U-Net of SDXL's layout, smaller, for three steps of each mode on this machine,
and prints one JSON line a mode: `estimate` is the plan's, `measured` the growth of the process's
resident memory from before the model is loaded to the peak of the steps. The second states the real
U-Net's (2.57 billion parameters) without computing anything.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    rows = [
        estimate_sdxl(mode, side_px=options.side_px) if options.sdxl else _child(mode, options)
        for mode in MODES
    ]
    for row in rows:
        print(json.dumps(row))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _child(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--mode", mode, "--width", f"{options.width}"]
    command += ["--side_px", f"{options.side_px}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(mode: str, *, width: int, side_px: int) -> dict[str, Any]:
    """Train three steps in a mode; return the plan's estimate and the measured peak, in bytes."""
    _train(mode, width=32, side_px=32)  # what every run loads and keeps, whatever its size
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    plan, peak = _train(mode, width=width, side_px=side_px)
    estimate = sum(value or 0 for name, value in plan.items() if name != "host_averages")
    measured = peak - before
    return {
        "mode": mode,
        "estimate": estimate,
        "measured": measured,
        "ratio": round(estimate / measured, 3),
        "parts": plan,
    }


def _train(mode: str, *, width: int, side_px: int) -> tuple[dict[str, int], int]:
    """Train three steps; return the plan's memory, and the process's peak within the steps."""
    from accelerate.state import AcceleratorState

    from latentdiff.config.io import parse_arguments
    from latentdiff.config.text_to_image import Config
    from latentdiff.training.text_to_image import train_t2i
    from latentdiff.training.text_to_image.train_step import TrainStep

    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_world(folder, width=width, side_px=side_px)
        arguments = {
            "model.pretrained": folder / "base",
            "data.root": folder / "data",
            "data.cache_dir": folder / "cache",
            "data.resolution": side_px,
            "data.heldout_fraction": 0,
            "output_dir": folder / "run",
            "train.max_steps": 3,
            "train.batch_size": 1,
            "train.ema": "false",
            "train.mixed_precision": "bf16",
            "train.gradient_checkpointing": "true",
            "preview.num_steps": 1,
            "preview.num_nearest": 0,
        } | MODES[mode]
        config = parse_arguments(Config, [f"--{key}={value}" for key, value in arguments.items()])
        peak, step = 0, TrainStep.step

        def watched(self: TrainStep, *given: Any, **settings: Any) -> Any:
            nonlocal peak
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the heap holds back
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            result = step(self, *given, **settings)
            peak = max(peak, _resident("VmHWM"))
            return result

        TrainStep.step = watched  # type: ignore[method-assign]
        try:
            train_t2i.train(config)
        finally:
            TrainStep.step = step  # type: ignore[method-assign]
        plan = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))["memory"]
    return plan, peak


def _write_world(folder: Path, *, width: int, side_px: int) -> None:
    """Write a model of SDXL's layout with random weights, and a few images."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fakes"))
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


def _resident(entry: str) -> int:
    """Return a figure of /proc/self/status in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def estimate_sdxl(mode: str, *, side_px: int) -> dict[str, Any]:
    """State the memory of the real U-Net with gradient checkpointing, one image at once, in GB.

    The text encoders and the VAE are on the host: captions and latents are cached.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model

    from latentdiff.config.train import TrainConfig
    from latentdiff.models.conditioning import Conditioning
    from latentdiff.models.unet.guidance_embedding import predict
    from latentdiff.training.finetune.methods import TRAINABLE
    from latentdiff.training.optim.optimizer import parameter_groups
    from latentdiff.training.text_to_image.memory import (
        estimate_activations,
        num_bytes,
        optimizer_bytes,
    )
    from latentdiff.training.text_to_image.memory_modes import cast_weights

    settings = MODES[mode]
    is_lora = settings.get("finetune.method") == "lora"
    train = TrainConfig(
        full_bf16=settings.get("train.full_bf16") == "true",
        frozen_dtype=settings.get("train.frozen_dtype", "fp32"),
    )

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel(**SDXL)
            if is_lora:
                targets = ["to_q", "to_k", "to_v", "to_out.0"]
                lora = LoraConfig(r=16, lora_alpha=16, target_modules=targets)
                inject_adapter_in_model(lora, self.unet)
            self.unet.enable_gradient_checkpointing()

        def forward(self, zt: Any, t: Any, conditioning: Any) -> Any:
            return predict(self.unet, zt, t, conditioning)

    with torch.device("meta"):
        model = Model().train()
    model.to_empty(device="cpu")  # pages that nothing writes to take no memory
    method = "lora" if is_lora else "full"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINABLE[method](name))
    cast_weights(model, train)

    def inputs() -> tuple[Any, ...]:
        text = torch.empty(1, 77, 2048), torch.empty(1, 1280)
        sizes = torch.empty(1, 6, dtype=torch.int64)
        side = side_px // 8
        zt = torch.empty(1, 4, side, side)
        t = torch.empty(1, dtype=torch.int64)
        return zt, t, Conditioning(*text, time_ids=sizes)

    trained = [p for p in model.parameters() if p.requires_grad]
    name: Any = settings.get("train.optimizer", "adamw")
    groups = parameter_groups(model, weight_decay=0.01, name=name)
    sizes = [num_bytes([p]) for p in trained]
    fused = settings.get("train.fused_backward_pass") == "true"
    activations = estimate_activations(
        model,
        inputs,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=not fused),
    )
    parts = {
        "weights": num_bytes(model.parameters()),
        "gradients": max(sizes) if fused else sum(sizes),
        "optimizer": optimizer_bytes(groups, name=name),
        "activations": activations,
    }
    gigabytes = {key: round(value / 1e9, 2) for key, value in parts.items()}
    total = round(sum(parts.values()) / 1e9, 2)
    return {"mode": mode, "side_px": side_px, "total_gb": total, "parts_gb": gigabytes}


if __name__ == "__main__":
    main()
