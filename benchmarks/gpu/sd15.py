"""Shared by the GPU benchmarks: options, a model of Stable Diffusion 1.5's size, batches, a clock.

Weights, latents and captions are random and made here, so nothing is read but this repository.
`--device cpu --tiny` runs the same code with a model of a few thousand parameters, to find mistakes
before a GPU is at hand; its figures mean nothing.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

sys.path.append(str(Path(__file__).parents[1]))
import common

from latentdiff.config.io import load_config
from latentdiff.models.build import build_text_encoder, make_ddpm_scheduler
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import train_tokenizer
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.text_to_image.setup import build_train_step

CAPTIONS = ["a red circle on a blue background", "two small green stars on a table"] * 8
SIZES = {  # by --tiny: of the U-Net, the VAE and the text encoder, and pixels of an image
    False: {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {"width": 768, "num_layers": 12, "num_heads": 12},
        "px": 512,
        "tokens": 77,
    },
    True: {
        "unet": {"block_out_channels": (8, 8, 16, 16), "attention_head_dim": 2},
        "vae": {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1},
        "text": {"width": 16, "num_layers": 1, "num_heads": 2},
        "px": 64,
        "tokens": 16,
    },
}


def parser_of(description):
    """Return a parser with the options that every GPU benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    return parser


def run(name, measure, args):
    """Print one JSON line of what `measure` yields, (key, figure) by turns; return the exit status.

    A figure that cannot be had does not lose those before it: the line then has its error, and the
    status is 1.
    """
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run takes the GPU that it sees
    figures = {"benchmark": f"gpu_{name}", "tiny": args.tiny, "device": args.device}
    try:
        for key, value in measure(args):
            figures[key] = value
            print(f"{key}: {json.dumps(value)}", file=sys.stderr, flush=True)
    except Exception as error:
        traceback.print_exc()
        figures["error"] = f"{type(error).__name__}: {error}"[:2000]
    line = json.dumps(figures | common.machine())
    print(line, flush=True)
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    return 1 if "error" in figures else 0


def make_components(*, tiny, device, dtype=torch.float32):
    """Return a model of Stable Diffusion 1.5's shape, random, in eval mode on a device."""
    size = SIZES[tiny]
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=640, max_length=size["tokens"])
    groups = {"norm_num_groups": 4 if tiny else 32}
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=size["px"] // 8,
            cross_attention_dim=size["text"]["width"],
            **groups,
            **size["unet"],
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=size["px"],
            **groups,
            **size["vae"],
        )
        text = build_text_encoder(tokenizer, hidden_act="quick_gelu", **size["text"])
    for part in (unet, vae, text):
        if dtype != torch.float32:
            part.to(dtype)
        part.to(device).eval()
    return Components(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=make_ddpm_scheduler(),
    )


def make_batch(components, size, *, tiny, device):
    """Return a training batch of random latents and prompt embeddings on a device."""
    side = SIZES[tiny]["px"] // 8
    width = components.text_encoder.config.hidden_size
    with torch.device(device):
        return {
            "z0": torch.randn(size, 4, side, side),
            "eps": torch.randn(size, 4, side, side),
            "prompt_embeds": torch.randn(size, SIZES[tiny]["tokens"], width),
            "u": torch.rand(size, dtype=torch.float64),
            "dropped": torch.rand(size) < 0.1,
            "weight": torch.ones(size),
            "stratum": torch.arange(size),
            "index": torch.arange(size, device="cpu"),
        }


def make_train_step(args, components, *options):
    """Return the train step of a run with a config's options such as "--train.ema=false"."""
    size = SIZES[args.tiny]
    given = {"data": {"resolution": size["px"]}, "model": {"pretrained": "random weights"}}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.json"
        path.write_text(json.dumps(given))
        config = load_config(path, options)
    accelerator = start_accelerator(config)
    embeds = torch.zeros(1, size["tokens"], components.text_encoder.config.hidden_size)
    data = SimpleNamespace(
        null_text=Conditioning(embeds.to(args.device)), source=None, condition_encoder=None
    )
    return build_train_step(config, components, data, accelerator), config, data


def step_of(train_step, batch):
    """Return a function that does one optimiser step on a batch."""
    count = len(batch["z0"])
    return lambda: train_step.step(iter([batch]), step=0, count=count, accumulation=1)


def seconds_of(work, *, device, times=3):
    """Return the seconds of one of `times` calls in a row, the device's included."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / times


def synchronize(device):
    """Wait for a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_gb(device, work):
    """Return the most memory, in GB, that a device held during a call; None on the CPU."""
    if torch.device(device).type != "cuda":
        work()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


@contextlib.contextmanager
def counted_syncs(device):
    """Count, in the list that it gives, the waits of the host for a GPU that torch knows of."""
    found = []
    if torch.device(device).type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
