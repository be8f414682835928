"""Seconds of a 20-step guided call of Stable Diffusion 1.5's size at 512 px against diffusers.

    python benchmarks/gpu/sample.py [--batch_sizes 1,8] [--steps 20] [--out sample.json]

In bf16, decoding included, calls take turns: diffusers' StableDiffusionPipeline as it comes and in
channels_last, and LatentDiffPipeline in channels_last, on equal weights and seeds. `error_255`: the
mean difference of our images to the stock ones in the same layout. `host_syncs`: waits of the host
for the GPU in a call.
"""

import copy
import statistics
import sys

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from sd15 import SIZES, common, counted_syncs, make_components, parser_of, peak_gb, run, seconds_of

from latentdiff import LatentDiffPipeline

PROMPT = "a red circle on a blue background"


def pipelines_of(args):
    """Return the pipelines by name; they share the text encoder."""
    parts = make_components(tiny=args.tiny, device=args.device, dtype=torch.bfloat16)
    given = parts.as_dict() | {"scheduler": DDIMScheduler.from_config(parts.scheduler.config)}
    known = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    stock = {name: given[name] for name in known}
    last = {
        name: copy.deepcopy(given[name]).to(memory_format=torch.channels_last)
        for name in ("unet", "vae")
    }
    none = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    off = {"requires_safety_checker": False}
    pipelines = {
        "stock": StableDiffusionPipeline(**stock, **none, **off),
        "stock_channels_last": StableDiffusionPipeline(**stock | last, **none, **off),
        "latentdiff": LatentDiffPipeline(**stock | last, **none),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def call_of(pipeline, size, args):
    """Return a function that makes images (B, 3, H, W) in [0, 1]."""
    px = SIZES[args.tiny]["px"]

    def call():
        return pipeline(
            [PROMPT] * size,
            num_inference_steps=args.steps,
            guidance_scale=5.0,
            height=px,
            width=px,
            generator=[torch.Generator().manual_seed(k) for k in range(size)],
            output_type="pt",
        ).images

    return call


def measure(args):
    """Yield the figures."""
    pipelines = pipelines_of(args)
    for size in map(int, args.batch_sizes.split(",")):
        calls = {name: call_of(pipeline, size, args) for name, pipeline in pipelines.items()}
        works = {
            name: lambda call=call: seconds_of(call, device=args.device, times=1)
            for name, call in calls.items()
        }
        times = common.take_turns(works, rounds=args.rounds)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        images = {name: call() for name, call in calls.items()}
        syncs = {}
        for name, call in calls.items():
            with counted_syncs(args.device) as found:
                call()
            syncs[name] = len(found)
        difference = (images["latentdiff"] - images["stock_channels_last"]).abs().mean()
        yield (
            f"batch_{size}",
            {
                "seconds": {name: round(value, 4) for name, value in seconds.items()},
                "ratio_to_stock": round(seconds["stock"] / seconds["latentdiff"], 3),
                "ratio_to_channels_last": round(
                    seconds["stock_channels_last"] / seconds["latentdiff"], 3
                ),
                "error_255": round(255 * float(difference), 4),
                "host_syncs": syncs,
                "peak_gb": {name: peak_gb(args.device, call) for name, call in calls.items()},
            },
        )


def main():
    """Take turns and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    return run("sample", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
