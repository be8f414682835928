"""CPU seconds of a guided step of Stable Diffusion 1.5's size at 512 px: ours, stock, OpenVINO.

    OMP_NUM_THREADS=1 python benchmarks/sample_sd15.py [--rounds 3] [--cells 64] [--no_decode]

One U-Net of 860 M parameters with random weights in bf16, batch 2 (both captions of one image),
takes turns: diffusers' forward pass, contiguous and in channels_last, and the packed one of
LatentDiffPipeline; OpenVINO's bf16 pass of the same weights where `openvino` is installed. A step
is nearly all of a call, so 20 steps are 20 of these and one decoding by the VAE, which is timed
too. Prints one JSON line. Seconds are the process' CPU time, which on one thread is what the clock
shows on an idle machine. `error_ratio`: mean error of our pass to the float32 one over that of
the stock pass in bf16, of half the size, to be below 1.1.
"""

import argparse
import copy
import json
import resource
import time

import torch
from common import machine, medians, peak_tflops, ratio
from diffusers import AutoencoderKL, UNet2DConditionModel
from sample_latency import take_cpu_turns
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.cpu.packed_unet import PackedUNet
from latentdiff.models.latents import LatentCodec

try:
    import openvino
except ImportError:
    openvino = None

STEPS = 20


def make_unet():
    """Return the U-Net in bf16, its weights random and scaled to keep activations near one."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        )
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    noise = torch.randn(2**22, dtype=torch.bfloat16)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            values = noise.repeat(-(-weight.numel() // len(noise)))[: weight.numel()]
            weight.data = (values * fan_in**-0.5).view(weight.shape)
        else:
            weight.data = torch.full_like(weight, float(name.endswith("weight")), device="cpu")
    return unet.requires_grad_(False)


def make_vae():
    """Return a VAE of Stable Diffusion 1.5's shape in bf16 and channels_last."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    return vae.eval().to(torch.bfloat16).to(memory_format=torch.channels_last)


def inputs(cells):
    """Return latents (2, 4, cells, cells), a timestep and text states (2, 77, 768) in bf16.

    As in a guided step the latents are the same twice, and the states of two captions.
    """
    torch.manual_seed(1)
    x = torch.randn(1, 4, cells, cells, dtype=torch.bfloat16).repeat(2, 1, 1, 1)
    return x, torch.tensor(500), torch.randn(2, 77, 768, dtype=torch.bfloat16)


def openvino_pass(unet, example):
    """Return OpenVINO's forward pass of the U-Net at bf16, on as many threads as torch has."""

    class Traced(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, x, t, states):
            return self.unet(x, t, encoder_hidden_states=states, return_dict=False)[0]

    x, t, states = example
    example = (x.float(), t, states.float())
    converted = openvino.convert_model(
        Traced(unet), example_input=example, input=[one.shape for one in example]
    )
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    arrays = [one.numpy() for one in example]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def error_ratio(unet, packed, *, cells):
    """Return how far our bf16 pass is from the float32 one, over how far the stock bf16 pass is."""
    x, t, states = inputs(cells)
    ours = packed(x[:1], t, states).float()
    stock = unet(x, t, encoder_hidden_states=states, return_dict=False)[0].float()
    exact = copy.deepcopy(unet).float()(
        x.float(), t, encoder_hidden_states=states.float(), return_dict=False
    )[0]
    errors = [float((one - exact).abs().mean()) for one in (ours, stock)]
    return errors[0] / errors[1], errors[1] / float(exact.abs().mean())


@torch.no_grad()
def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--no_decode", action="store_true")
    args = parser.parse_args()
    unet = make_unet()
    x, t, states = inputs(args.cells)
    packed = PackedUNet(unet, x.shape)
    channels_last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    works = {
        "ours": lambda: packed(x[:1], t, states),
        "stock": lambda: unet(x, t, encoder_hidden_states=states),
        "stock_cl": lambda: channels_last(x, t, encoder_hidden_states=states),
    }
    with FlopCounterMode(display=False) as counter:
        works["stock"]()
    teraflop, peak = counter.get_total_flops() / 1e12, peak_tflops()
    off, relative = error_ratio(unet, packed, cells=args.cells // 2)
    memory = {"before_openvino": peak_gb()}
    if openvino is not None:
        works["openvino"] = openvino_pass(copy.deepcopy(unet).float(), (x, t, states))
        memory["with_openvino"] = peak_gb()
    times = take_cpu_turns(works, rounds=args.rounds)
    seconds = medians(times)
    decode = None if args.no_decode else decode_seconds(args.cells)
    figures = {
        "benchmark": "sample_sd15",
        "cells": args.cells,
        "ratio_to_channels_last": ratio(times, "stock_cl", "ours"),
        "ratio_to_contiguous": ratio(times, "stock", "ours"),
        "ratio_to_openvino": ratio(times, "openvino", "ours") if openvino else None,
        "step_cpu_seconds": seconds,
        "decode_cpu_seconds": decode,
        "call_cpu_seconds": decode and {n: STEPS * s + decode for n, s in seconds.items()},
        "teraflop_per_step": round(teraflop, 3),
        "part_of_peak": {n: round(teraflop / s / peak, 3) for n, s in seconds.items()},
        "error_ratio": round(off, 3),
        "stock_relative_error": round(relative, 4),
        "peak_memory_gb": memory,
        "openvino": openvino and openvino.__version__,
    }
    print(json.dumps(figures | machine()), flush=True)


def peak_gb():
    """Return the most memory that this process has held, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def decode_seconds(cells):
    """Return the CPU seconds of one decoding, 8 pixels a cell."""
    codec = LatentCodec(make_vae())
    z = torch.randn(1, 4, cells, cells)
    started = time.process_time()
    codec.decode(z)
    return round(time.process_time() - started, 2)


if __name__ == "__main__":
    main()
