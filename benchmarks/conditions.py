"""What a model makes of an image condition, on held-out images, in figures: a subcommand a kind.

    python benchmarks/conditions.py data layout DIR
    latentdiff train --config layout_mini --data.root=DIR/train --output_dir=RUN \\
        --model.pretrained=BASE
    python benchmarks/conditions.py layout RUN DIR/test --base BASE --sheet layout.png

`data` writes pairs of the shapes world (data/shape_pairs.py) for layout, edit and edges. layout,
edges: RUN is that of a ControlNet and BASE its model. edit, inpaint, upscale: RUN is a run or a
model. Each prints one JSON line: the figure, what it is without the condition or with another
image's, baselines, the VAE's own reconstruction as the ceiling, and the condition use of the run's
log; with 95 % intervals. --features: a network's folder, as of `latentdiff evaluate`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import machine
from PIL import Image, ImageFilter, ImageOps

from latentdiff.data.edges import edge_mask
from latentdiff.data.shape_pairs import write_shape_pairs
from latentdiff.data.shapes import Scene
from latentdiff.evaluation.metric_nets import load_features
from latentdiff.evaluation.metrics.bootstrap import bootstrap_mean, normal_interval, proportion
from latentdiff.evaluation.metrics.fd_kid import frechet_distance, kernel_distance
from latentdiff.evaluation.metrics.features import THUMBNAILS
from latentdiff.evaluation.metrics.reconstruction import psnr
from latentdiff.evaluation.metrics.shapes_judge import follows, judge_image, shape_centres
from latentdiff.image_grid import draw_grid, to_pil
from latentdiff.image_io import load_image
from latentdiff.models.latents import LatentCodec
from latentdiff.pipeline.conditioning.canvas import trained_size_px
from latentdiff.sampling.open_pipeline import open_pipeline

SCENE = Scene.__dataclass_fields__
MAX_SHIFT = 3 / 64  # of a shape's centre, as a fraction of the side
HOLE = 0.5  # side of an inpainting hole, as a fraction of the image's
MARGIN = 0.125  # around the hole, what FD sees of the rest, likewise


class Folder:
    """The first `num` captioned images of a folder, as large as a model makes them."""

    def __init__(self, root, num, side):
        lines = (root / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines][:num]
        self.captions = [row["text"] for row in self.rows]
        self.images = [open_image(root / row["file_name"], side) for row in self.rows]
        files = [condition_file(root, row) for row in self.rows]
        self.conditions = [open_image(file, side) for file in files if file is not None]

    @property
    def scenes(self):
        """The scenes of a folder of shapes."""
        return [Scene(**{k: v for k, v in row.items() if k in SCENE}) for row in self.rows]


def condition_file(root, row):
    """Return the file of a row's condition: named by it, or NAME.condition.png; None without."""
    own = (root / row["file_name"]).with_suffix(".condition.png")
    return root / row["condition"] if "condition" in row else own if own.exists() else None


def open_image(path, side):
    """Return an image as RGB, cropped in the centre to side x side."""
    image = load_image(path)
    if image.size == (side, side):
        return image
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def open_pipe(path, controlnet=None):
    """Open a model or a run's, as `latentdiff sample` does, and the side of its images."""
    pipe = open_pipeline(str(path), dtype="auto", fast=True)
    if controlnet is not None:
        pipe.load_controlnet(controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe, trained_size_px(pipe.unet, factor=pipe.vae_scale_factor)[0]


def generate(pipe, folder, args, **images):
    """Return an image for each caption, from its own seed. images: lists, one of each for each."""
    found = []
    for start in range(0, len(folder.rows), args.batch_size):
        some = slice(start, start + args.batch_size)
        prompts = folder.captions[some]
        found += pipe(
            prompts,
            seed=list(range(start, start + len(prompts))),
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            **{name: values[some] for name, values in images.items()},
            **args.extra,
        ).images
    return found


@torch.no_grad()
def reconstruct(pipe, images):
    """Return images after the VAE alone, the best that a model in its latents can do."""
    codec = LatentCodec(pipe.vae)
    parts = [codec.decode(codec.encode(part, None)) for part in to_pixels(images).split(32)]
    return [to_pil(one) for one in torch.cat(parts)]


def to_pixels(images):
    """Return images as (n, 3, H, W) in [-1, 1]."""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def shown(interval):
    """Return an interval as [estimate, low, high]."""
    return [round(x, 4) for x in (interval.estimate, interval.low, interval.high)]


def judge(images, folder):
    """Return how often images show what was asked where it was asked, by one and two shapes."""
    answers = []
    for image, scene, real in zip(images, folder.scenes, folder.images, strict=True):
        answer = follows(judge_image(image), scene)
        answer["place"] = is_in_place(shape_centres(image), shape_centres(real))
        answers.append(answer | {"all": answer["all"] and answer["place"]})
    is_pair = [scene.relation is not None for scene in folder.scenes]
    groups = {"all_images": answers}
    for name, wanted in (("one_shape", False), ("two_shapes", True)):
        groups[name] = [one for one, pair in zip(answers, is_pair, strict=True) if pair is wanted]
    return {name: shares(group) for name, group in groups.items() if group}


def shares(answers):
    """Return each attribute's share of the images that have it, with its interval."""
    names = dict.fromkeys(name for answer in answers for name in answer)
    asked = {name: [answer[name] for answer in answers if name in answer] for name in names}
    return {name: shown(proportion(sum(hits), len(hits))) for name, hits in asked.items()}


def is_in_place(centres, wanted):
    """Tell whether the same number of shapes lie where they should."""
    if len(centres) != len(wanted):
        return False
    pairs = zip(centres, wanted, strict=True)
    return all(np.hypot(x - u, y - v) <= MAX_SHIFT for (x, y), (u, v) in pairs)


def edge_score(image, like):
    """Return the F-score of an image's edges against another's, within 1/64 of the side."""
    width = 2 * max(1, image.width // 64) + 1
    masks = [edge_mask(one) for one in (image, like)]
    wide = [
        np.asarray(
            Image.fromarray(255 * mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(width))
        )
        for mask in masks
    ]
    hits = [(mask & (near > 0)).sum() for mask, near in zip(masks, wide[::-1], strict=True)]
    precision, recall = (hit / max(1, mask.sum()) for hit, mask in zip(hits, masks, strict=True))
    return 2 * precision * recall / max(1e-9, precision + recall)


def controlled(args, score):
    """Score images under their own condition, another's and none, and the VAE's own."""
    pipe, side = open_pipe(args.base, controlnet=args.run)
    folder = Folder(args.folder, args.num, side)
    own = folder.conditions
    images = {
        "own_condition": generate(pipe, folder, args, condition=own),
        "another_images_condition": generate(pipe, folder, args, condition=own[1:] + own[:1]),
    }
    pipe.unload_controlnet()
    images["caption_alone"] = generate(pipe, folder, args)
    images["vae"] = reconstruct(pipe, folder.images)
    draw_sheet(args, folder, {"condition": own, "generated": images["own_condition"]})
    return {name: score(some, folder) for name, some in images.items()}


def layout(args):
    """Judge shapes by kind, color, size, background and place."""
    return controlled(args, judge)


def edges(args):
    """Compare the edges of the images with those asked for."""

    def score(images, folder):
        return [edge_score(*pair) for pair in zip(images, folder.images, strict=True)]

    scores = controlled(args, score)
    own = np.array(scores["own_condition"])
    figures = {name: shown(bootstrap_mean(found)) for name, found in scores.items()}
    figures["above"] = {
        name: shown(bootstrap_mean(own - np.array(found)))
        for name, found in scores.items()
        if name != "own_condition"
    }
    return figures


def edit(args):
    """Judge the shapes after an instruction: the new color, and all else as it was."""
    pipe, side = open_pipe(args.run)
    folder = Folder(args.folder, args.num, side)
    args.extra = {"image_guidance_scale": args.image_guidance_scale}
    edited = generate(pipe, folder, args, condition=folder.conditions)
    draw_sheet(args, folder, {"before": folder.conditions, "edited": edited})
    vae = reconstruct(pipe, folder.images)
    images = {"edited": edited, "as_it_was": folder.conditions, "vae": vae}
    return {name: judge(some, folder) for name, some in images.items()}


def inpaint(args):
    """Compare what fills a hole, pasted into the image, with the real one there and around it.

    kept: with keep_unmasked; it is what the sheet shows, before it is pasted.
    """
    pipe, side = open_pipe(args.run)
    folder = Folder(args.folder, args.num, side)
    rng, hole = np.random.default_rng(0), round(HOLE * side)
    corners = [tuple(rng.integers(0, side - hole + 1, 2).tolist()) for _ in folder.images]
    masks = [hole_mask(corner, hole, side) for corner in corners]
    real = folder.images
    made = generate(pipe, folder, args, image=real, mask_image=masks)
    args.extra = {"keep_unmasked": True}
    kept = generate(pipe, folder, args, image=real, mask_image=masks)
    decoded = reconstruct(pipe, real)
    filled = {
        "inpainted": pasted(made, real, masks),
        "kept": pasted(kept, real, masks),
        "copy_paste": pasted(real[1:] + real[:1], real, masks),
        "mean_color": [mean_filled(*x) for x in zip(real, masks, strict=True)],
        "vae": pasted(decoded, real, masks),
    }
    gray = [Image.new("RGB", mask.size, "gray") for mask in masks]
    draw_sheet(args, folder, {"hidden": pasted(gray, real, masks), "inpainted": kept})
    boxes = [around(corner, hole, side) for corner in corners]
    cut = {name: cropped(images, boxes) for name, images in filled.items()}
    figures = likeness(cut, cropped(real, boxes), args)
    known = ~np.stack([np.asarray(mask) > 0 for mask in masks])
    figures["known_rmse_of_255"] = {
        name: round(float(rms(to_pixels(images), to_pixels(real), known)) * 127.5, 2)
        for name, images in (("inpainted", made), ("kept", kept), ("vae", decoded))
    }
    if "kind" in folder.rows[0]:
        figures["judge"] = {name: judge(some, folder) for name, some in filled.items()}
    return figures


def upscale(args):
    """Compare images made larger by the VAE's factor with the real ones."""
    pipe, side = open_pipe(args.run)
    folder = Folder(args.folder, args.num, side)
    small = (side // pipe.vae_scale_factor,) * 2
    low = [image.resize(small, Image.Resampling.BICUBIC) for image in folder.images]
    args.extra = {"noise_level": args.noise_level}
    images = {
        "upscaled": generate(pipe, folder, args, condition=low),
        "bicubic": [image.resize((side, side), Image.Resampling.BICUBIC) for image in low],
        "vae": reconstruct(pipe, folder.images),
    }
    draw_sheet(args, folder, {"bicubic": images["bicubic"], "upscaled": images["upscaled"]})
    return likeness(images, folder.images, args)


def likeness(sets, real, args):
    """Return FD, KID, the mean feature distance to each real image, and PSNR, of each set."""
    features = load_features(args.features) if args.features else THUMBNAILS

    def embed(images):
        return torch.cat([features.embed(to_pixels([image])) for image in images])

    wanted, figures, distances = embed(real), {"features": features.name}, {}
    for name, images in sets.items():
        found, pairs = embed(images), zip(images, real, strict=True)
        distances[name] = (found - wanted).norm(dim=1).numpy()
        ratios = [psnr(to_pixels([a]), to_pixels([b])).item() for a, b in pairs]
        figures[name] = {
            "fd": round(frechet_distance(found, wanted).value, 4),
            "kid": shown(kernel_distance(found, wanted)),
            "feature_distance": shown(bootstrap_mean(distances[name])),
            "psnr": shown(bootstrap_mean(ratios)),
        }
    first, *others = sets
    figures["nearer_than"] = {
        name: shown(bootstrap_mean(distances[name] - distances[first])) for name in others
    }
    return figures


def hole_mask(corner, hole, side):
    """Return a mask, white in a square at a corner (x, y)."""
    mask = Image.new("L", (side, side))
    mask.paste(255, (*corner, corner[0] + hole, corner[1] + hole))
    return mask


def around(corner, hole, side):
    """Return the box of a hole and its margin, within the image."""
    margin = round(MARGIN * side)
    low = [max(0, start - margin) for start in corner]
    return (*low, *(min(side, start + hole + margin) for start in corner))


def pasted(images, others, masks):
    """Return the others with what their masks hide from the images."""
    return [Image.composite(*parts) for parts in zip(images, others, masks, strict=True)]


def cropped(images, boxes):
    """Return a part of each image."""
    return [image.crop(box) for image, box in zip(images, boxes, strict=True)]


def mean_filled(image, mask):
    """Return an image with its hole in the mean color of the rest."""
    pixels, is_hidden = np.array(image), np.asarray(mask) > 0
    pixels[is_hidden] = pixels[~is_hidden].mean(axis=0).round()
    return Image.fromarray(pixels)


def rms(a, b, where):
    """Return the root mean square difference of pixels (n, 3, H, W) where a mask (n, H, W) is."""
    return (a - b).square().mean(1)[torch.from_numpy(where)].mean().sqrt()


def condition_use(run):
    """Return the condition use of a run by step, and the step from which on it is above 0."""
    log = Path(run) / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = [row for row in map(json.loads, lines) if "condition_use" in row]
    curve = []
    for row in rows:
        use, se = row["condition_use"], row["condition_use_se"]
        curve.append([row["step"], *shown(normal_interval(use, se, level=0.95, num_samples=1))])
    flat = [step for step, _, low, _ in curve if low <= 0]
    above = [step for step, *_ in curve if step > max(flat, default=-1)]
    return {"curve": curve, "above_0_from_step": above[0] if above else None}


def draw_sheet(args, folder, rows):
    """Write the first images of each row, one row below the other, then the real ones."""
    if args.sheet is None:
        return
    columns = min(args.columns, len(folder.rows))
    images = [image for row in (*rows.values(), folder.images) for image in row[:columns]]
    labels = [name for name in (*rows, "real") for _ in range(columns)]
    captions = folder.captions[:columns]
    labels[: len(captions)] = captions
    draw_grid(images, labels, columns=columns).quantize(128).save(args.sheet, optimize=True)


KINDS = {"layout": layout, "edges": edges, "edit": edit, "inpaint": inpaint, "upscale": upscale}


def parse():
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write a folder of pairs")
    data.add_argument("kind", choices=["layout", "edit", "edges"])
    data.add_argument("out", type=Path)
    data.add_argument("--num_train", type=int, default=4000)
    data.add_argument("--num_test", type=int, default=200)
    data.add_argument("--size_px", type=int, default=128)
    for name, score in KINDS.items():
        one = commands.add_parser(name, help=score.__doc__)
        one.add_argument("run", type=Path)
        one.add_argument("folder", type=Path, help="held-out images with metadata.jsonl")
        one.add_argument("--num", type=int, default=200, help="images")
        one.add_argument("--steps", type=int, default=25)
        one.add_argument("--guidance_scale", type=float, default=3.0)
        one.add_argument("--batch_size", type=int, default=25)
        one.add_argument("--sheet", type=Path, help="PNG of the first images")
        one.add_argument("--columns", type=int, default=8)
        one.add_argument("--features", type=Path, help="folder of a feature network")
        if name in ("layout", "edges"):
            one.add_argument("--base", required=True, help="the model of the ControlNet")
        if name == "edit":
            one.add_argument("--image_guidance_scale", type=float, default=1.5)
        if name == "upscale":
            one.add_argument("--noise_level", type=int, default=20)
    return parser.parse_args()


def main():
    """Write data, or measure a run and print the line."""
    args = parse()
    if args.command == "data":
        sizes = {"num_train": args.num_train, "num_test": args.num_test, "size_px": args.size_px}
        write_shape_pairs(args.out, args.kind, **sizes)
        return
    args.extra = {}
    settings = {"benchmark": f"conditions {args.command}", "num": args.num, "steps": args.steps}
    settings |= {"guidance_scale": args.guidance_scale}
    figures = KINDS[args.command](args)
    print(json.dumps(settings | figures | {"condition_use": condition_use(args.run)} | machine()))


if __name__ == "__main__":
    main()
