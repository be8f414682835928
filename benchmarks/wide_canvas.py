"""A canvas wider than the training size, at once and in overlapping windows, and what each costs.

    python benchmarks/wide_canvas.py latentdiff-mini "flowers" --width 512 --sheet wide.jpg

Prints one JSON line: for each way the windows and the seconds of an image, of one core where there
is one thread. --sheet: a JPG or PNG of the images, one below the other.
"""

import argparse
import json
from pathlib import Path

from common import machine, own_seconds

from latentdiff import LatentDiffPipeline
from latentdiff.diffusion.windows import place_windows
from latentdiff.image_grid import draw_grid
from latentdiff.pipeline.conditioning.canvas import trained_size_px

OVERLAPS = (None, 0.0, 0.5, 0.75)  # None: the whole canvas at once


def make(pipe, prompt, overlap, call):
    """Return an image, the number of windows and the seconds. overlap: None for no windows."""
    factor = pipe.vae_scale_factor
    side, num = trained_size_px(pipe.unet, factor=factor)[0], 1
    if overlap is not None:
        call = call | {"window_size": side, "window_overlap": overlap}
        size = call["height"] // factor, call["width"] // factor
        num = len(place_windows(size, side // factor, overlap=overlap))
    started = own_seconds()
    image = pipe(prompt, **call).images[0]
    return image, num, round(own_seconds() - started, 2)


def main():
    """Make the images and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="JPG or PNG of the images")
    args = parser.parse_args()
    pipe = LatentDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
    call |= {"guidance_scale": args.guidance_scale, "seed": args.seed}
    pipe(args.prompt, **call | {"num_inference_steps": 1})  # warm
    figures, images = {}, {}
    for overlap in OVERLAPS:
        name = "at once" if overlap is None else f"windows that overlap by {overlap:g}"
        image, num, seconds = make(pipe, args.prompt, overlap, call)
        figures[name] = {"windows": num, "seconds": seconds}
        images[f"{name}: {seconds:.1f} s"] = image
    if args.sheet is not None:
        draw_grid([*images.values()], [*images], columns=1).save(args.sheet, quality=90)
    settings = {"benchmark": "wide canvas", "prompt": args.prompt, **call}
    print(json.dumps(settings | {"ways": figures} | machine()))


if __name__ == "__main__":
    main()
