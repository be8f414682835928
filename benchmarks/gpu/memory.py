"""Peak GPU memory of a training step in each memory mode, next to the plan's estimate of it.

    python benchmarks/gpu/memory.py [--batch_size 4] [--modes NAME,...] [--out memory.json]

A U-Net of Stable Diffusion 1.5's size at 512 px; two steps a mode, each on a model made anew.
`estimate_gb` is what a run's plan states before its first step; the allocator's peak is `peak_gb`.
"""

import gc
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from sd15 import make_batch, make_components, make_train_step, parser_of, peak_gb, run, step_of

from latentdiff.training.inputs.batches import BatchLayout
from latentdiff.training.text_to_image.memory import estimate_memory
from latentdiff.training.text_to_image.setup import Run

MODES = {
    "adamw_ema": [],
    "adamw": ["--train.ema=false"],
    "checkpointing": ["--train.ema=false", "--train.gradient_checkpointing=true"],
    "adafactor_fused_backward": [
        "--train.ema=false",
        "--train.optimizer=adafactor",
        "--train.fused_backward_pass=true",
        "--train.max_grad_norm=0",
    ],
    "bf16_adafactor_fused_backward": [
        "--train.ema=false",
        "--train.optimizer=adafactor",
        "--train.fused_backward_pass=true",
        "--train.full_bf16=true",
        "--train.max_grad_norm=0",
    ],
    "bf16_adamw": ["--train.ema=false", "--train.full_bf16=true"],
    "adamw8bit": ["--train.ema=false", "--train.optimizer=adamw8bit"],
}


def measure(args):
    """Yield each mode's figures; those of one that fails are its error."""
    for mode in args.modes.split(","):
        try:
            yield mode, measure_mode(args, MODES[mode])
        except (ValueError, RuntimeError) as error:  # not installed, or out of memory
            yield mode, {"error": str(error)[:300]}
        gc.collect()


def measure_mode(args, options):
    """Return the estimate and the peak of two steps, in GB."""
    AcceleratorState._reset_state(reset_partial_state=True)
    components = make_components(tiny=args.tiny, device=args.device)
    size = f"--train.batch_size={args.batch_size}"
    train_step, config, data = make_train_step(args, components, size, *options)
    layout = BatchLayout.of(args.batch_size, 0, 1)
    accelerator = train_step.accelerator
    made = Run(config, Path(), accelerator, components, data, train_step, layout)
    estimate = estimate_memory(made)
    step = step_of(
        train_step, make_batch(components, args.batch_size, tiny=args.tiny, device=args.device)
    )
    peak = peak_gb(args.device, lambda: [step() for _ in range(2)])
    stated = round(estimate.on_device / 1e9, 3)
    return {"estimate_gb": stated, "peak_gb": peak, "ratio": peak and round(stated / peak, 3)}


def main():
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--modes", default=",".join(MODES), help="names, with commas between")
    args = parser.parse_args()
    torch.manual_seed(0)
    if unknown := set(args.modes.split(",")) - set(MODES):
        parser.error(f"no mode {sorted(unknown)[0]}, expected of {', '.join(MODES)}")
    return run("memory", measure, args)


if __name__ == "__main__":
    sys.exit(main())
