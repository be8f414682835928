"""What torch.compile gains a U-Net of Stable Diffusion 1.5's size on one GPU, and what it costs.

    python benchmarks/gpu/compile.py [--batch_size 16] [--parts sample,train] [--out compile.json]

`sample`: a bf16 pass of batch 2 at 512 px, plain, with its repeated blocks compiled, and whole, as
`latentdiff sample --compile true` does. `train`: a run's own step, plain and with repeated blocks
compiled. `compile_s` is the first call; `ratio` says how many times as fast later ones are.
"""

import sys

import torch
from sd15 import (
    make_batch,
    make_components,
    make_train_step,
    parser_of,
    run,
    seconds_of,
    step_of,
)


def measure(args):
    """Yield the figures of each part and way."""
    parts = {"sample": measure_sampling, "train": measure_training}
    for name in args.parts.split(","):
        for way, figures in parts[name](args):
            yield f"{name}_{way}", figures


@torch.no_grad()
def measure_sampling(args):
    """Yield the seconds of a pass by way."""
    parts = make_components(tiny=args.tiny, device=args.device, dtype=torch.bfloat16)
    unet = parts.unet.to(memory_format=torch.channels_last)
    batch = make_batch(parts, 2, tiny=args.tiny, device=args.device)
    x, embeds = batch["z0"].bfloat16(), batch["prompt_embeds"].bfloat16()
    t = torch.tensor(500, device=args.device)

    def work():
        return unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0]

    plain = _timed(work, args)
    yield "plain", plain
    unet.compile_repeated_blocks(fullgraph=True, backend=args.backend)
    yield "blocks", _compared(work, args, plain)
    torch._dynamo.reset()
    unet.compile(dynamic=False, backend=args.backend)
    yield "whole", _compared(work, args, plain)


def measure_training(args):
    """Yield the seconds of a step by way."""
    components = make_components(tiny=args.tiny, device=args.device)
    train_step, _, _ = make_train_step(args, components, f"--train.batch_size={args.batch_size}")
    work = step_of(
        train_step, make_batch(components, args.batch_size, tiny=args.tiny, device=args.device)
    )
    plain = _timed(work, args)
    yield "plain", plain
    components.unet.compile_repeated_blocks(backend=args.backend)
    yield "blocks", _compared(work, args, plain)


def _timed(work, args):
    first = seconds_of(work, device=args.device, times=1)
    work()
    return {"first_s": round(first, 3), "s": round(seconds_of(work, device=args.device), 5)}


def _compared(work, args, plain):
    found = _timed(work, args)
    ratio = round(plain["s"] / found["s"], 3)
    return {"compile_s": found["first_s"], "s": found["s"], "ratio": ratio}


def main():
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--parts", default="sample,train", help="of sample, train")
    parser.add_argument("--backend", default="inductor", help="eager, to try the script alone")
    args = parser.parse_args()
    return run("compile", measure, args)


if __name__ == "__main__":
    sys.exit(main())
