"""The attention kernels of training, xformers' among them: seconds, memory and agreement.

    python benchmarks/gpu/attention.py [--batch_size 8] [--out attention.json]

A forward and backward pass of a U-Net of Stable Diffusion 1.5's size at 512 px under bf16
autocast, by each of train.attention's kernels, and by each of those that PyTorch's chooses from.
`error`: the mean difference of the output to that of the plain kernel in float32, relative to its
mean size. A kernel that is not installed, or does not run here, has its reason.
"""

import sys
from contextlib import nullcontext

import torch
from sd15 import make_batch, make_components, parser_of, peak_gb, run, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentdiff.training.text_to_image.model import check_attention, set_attention

KERNELS = {
    "plain": ("plain", None),
    "sdpa": ("sdpa", None),
    "sdpa_flash": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": ("sdpa", SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_cudnn": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "xformers": ("xformers", None),
}


def measure(args):
    """Yield each kernel's figures."""
    parts, device = make_components(tiny=args.tiny, device=args.device), torch.device(args.device)
    unet = parts.unet.train().to(memory_format=torch.channels_last)
    batch = make_batch(parts, args.batch_size, tiny=args.tiny, device=args.device)
    inputs = batch["z0"], torch.full((args.batch_size,), 500, device=device), batch["prompt_embeds"]
    pixels = batch["z0"].shape[-1] ** 2
    set_attention(unet, "plain", num_latent_pixels=pixels, device=device)
    with torch.no_grad():
        exact = unet(*inputs, return_dict=False)[0]
    for kernel, (name, backend) in KERNELS.items():
        try:
            check_attention(name, device)
            set_attention(unet, name, num_latent_pixels=pixels, device=device)
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                figures = _figures(unet, inputs, exact, args)
            yield kernel, figures
        except (ValueError, RuntimeError) as error:  # not installed, or not for these shapes
            yield kernel, {"skipped": str(error)[:300]}


def _figures(unet, inputs, exact, args):
    def work():
        with torch.autocast(args.device, torch.bfloat16):
            output = unet(*inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)
        return output.detach()

    error = (work().float() - exact).abs().mean() / exact.abs().mean()
    return {
        "s": round(seconds_of(work, device=args.device), 4),
        "peak_gb": peak_gb(args.device, work),
        "error": round(float(error), 5),
    }


def main():
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch_size", type=int, default=8)
    return run("attention", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
