"""CPU seconds of a guided step of Stable Diffusion 1.5's size at 512 px: ours, stock, OpenVINO.

    OMP_NUM_THREADS=1 python benchmarks/sample_sd15.py [--rounds 3] [--latent_size 64] [--no_decode]

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
from sample_latency import fast_pass, take_cpu_turns
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.cpu.fast_sampling import FastCPU
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


def inputs(latent_size):
    """Return latents (2, 4, latent_size, latent_size), a timestep, prompt embeds (2, 77, 768).

    As in a guided step the latents are the same twice, and the prompt embeds are of two captions.
    """
    torch.manual_seed(1)
    x = torch.randn(1, 4, latent_size, latent_size, dtype=torch.bfloat16).repeat(2, 1, 1, 1)
    return x, torch.tensor(500), torch.randn(2, 77, 768, dtype=torch.bfloat16)


def openvino_pass(unet, example):
    """Return OpenVINO's forward pass of the U-Net at bf16, on as many threads as torch has."""

    class Traced(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, x, t, prompt_embeds):
            return self.unet(x, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]

    x, t, prompt_embeds = example
    example = (x.float(), t, prompt_embeds.float())
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


def error_ratio(unet, fast, *, latent_size):
    """Return how far our bf16 pass is from the float32 one, over how far the stock bf16 pass is."""
    x, t, prompt_embeds = inputs(latent_size)
    ours = fast_pass(fast, unet, x, t, prompt_embeds).float()
    stock = unet(x, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0].float()
    exact = copy.deepcopy(unet).float()(
        x.float(), t, encoder_hidden_states=prompt_embeds.float(), return_dict=False
    )[0]
    errors = [float((one - exact).abs().mean()) for one in (ours, stock)]
    return errors[0] / errors[1], errors[1] / float(exact.abs().mean())


@torch.no_grad()
def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latent_size", type=int, default=64)
    parser.add_argument("--no_decode", action="store_true")
    args = parser.parse_args()
    unet = make_unet()
    x, t, prompt_embeds = inputs(args.latent_size)
    fast = FastCPU()
    fast.is_on = True
    channels_last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    works = {
        "ours": lambda: fast_pass(fast, unet, x, t, prompt_embeds),
        "stock": lambda: unet(x, t, encoder_hidden_states=prompt_embeds),
        "stock_cl": lambda: channels_last(x, t, encoder_hidden_states=prompt_embeds),
    }
    with FlopCounterMode(display=False) as counter:
        works["stock"]()
    teraflop, peak = counter.get_total_flops() / 1e12, peak_tflops()
    error, relative = error_ratio(unet, fast, latent_size=args.latent_size // 2)
    fast.invalidate()  # to be packed for the whole size
    memory = {"before_openvino": peak_gb()}
    if openvino is not None:
        works["openvino"] = openvino_pass(copy.deepcopy(unet).float(), (x, t, prompt_embeds))
        memory["with_openvino"] = peak_gb()
    times = take_cpu_turns(works, rounds=args.rounds)
    seconds = medians(times)
    decode = None if args.no_decode else decode_seconds(args.latent_size)
    figures = {
        "benchmark": "sample_sd15",
        "latent_size": args.latent_size,
        "ratio_to_channels_last": ratio(times, "stock_cl", "ours"),
        "ratio_to_contiguous": ratio(times, "stock", "ours"),
        "ratio_to_openvino": ratio(times, "openvino", "ours") if openvino else None,
        "step_cpu_seconds": seconds,
        "decode_cpu_seconds": decode,
        "call_cpu_seconds": decode and {n: STEPS * s + decode for n, s in seconds.items()},
        "teraflop_per_step": round(teraflop, 3),
        "part_of_peak": {n: round(teraflop / s / peak, 3) for n, s in seconds.items()},
        "error_ratio": round(error, 3),
        "stock_relative_error": round(relative, 4),
        "peak_memory_gb": memory,
        "openvino": openvino and openvino.__version__,
    }
    print(json.dumps(figures | machine()), flush=True)


def peak_gb():
    """Return the peak memory of this process, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def decode_seconds(latent_size):
    """Return the CPU seconds of one decoding, 8 pixels a latent pixel."""
    codec = LatentCodec(make_vae())
    z = torch.randn(1, 4, latent_size, latent_size)
    started = time.process_time()
    codec.decode(z)
    return round(time.process_time() - started, 2)


if __name__ == "__main__":
    main()
