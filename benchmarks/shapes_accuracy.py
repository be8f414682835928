"""Measure the share of shapes images that show all that their captions ask, over training time.

    make demo-scratch && python benchmarks/shapes_accuracy.py demo-scratch-run/model

RUN: a run's folder. Its pipeline/ generates --num captions of one shape and of two, of seen and of
held-out combinations, from fixed seeds; each kept checkpoint (train.keep_every_steps) generates
--curve of each with its EMA weights. metrics/shapes_judge.py judges the images by geometry and
colour, nothing learned. Prints one JSON line, with 95 % intervals (Wilson), and chance: each image
against another's caption.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import load_checkpoint, machine

from latentdiff import LatentDiffPipeline
from latentdiff.config.io import load_config
from latentdiff.data.shapes import sample_pair, split_scenes
from latentdiff.evaluation.metrics.bootstrap import proportion
from latentdiff.evaluation.metrics.shapes_judge import accuracy
from latentdiff.sampling.batch_sampler import generate_images


def scenes_for(num):
    """Return `num` scenes of one and of two shapes, seen and held out, the same ones each time."""
    chosen = {}
    for name, scenes in zip(("seen", "heldout"), split_scenes(), strict=True):
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0)).tolist()
        chosen[name] = [scenes[order[i % len(scenes)]] for i in range(num)]
        rng = np.random.default_rng(0)
        pairs = [sample_pair(rng, is_heldout=name == "heldout") for _ in range(num)]
        chosen[f"{name}_pairs"] = pairs
    return chosen


def model_accuracy(pipe, num, args):
    """Return the share of images that show each attribute and all of them."""
    found = {}
    for name, scenes in scenes_for(num).items():
        images = [
            image
            for _, image in generate_images(
                pipe,
                [scene.caption for scene in scenes],
                seeds=range(num),
                batch_size=args.batch_size,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale,
            )
        ]
        shares = accuracy(images, scenes)
        interval = proportion(round(shares["all"] * num), num)
        found[name] = {key: round(value, 4) for key, value in shares.items()}
        found[name]["all_95"] = [round(interval.low, 3), round(interval.high, 3)]
        shuffled = accuracy(images, scenes[1:] + scenes[:1])
        found[name]["all_shuffled"] = round(shuffled["all"], 4)
    return found


def seconds_at(run):
    """Return the seconds of training steps up to each logged step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "images_per_second" in row]
    batch = load_config(run / "config.yaml").train.batch_size
    passed, total = {}, 0.0
    for before, row in pairwise([{"step": 0}, *rows]):
        total += (row["step"] - before["step"]) * batch / row["images_per_second"]
        passed[row["step"]] = total
    return passed


def main():
    """Measure the run and its checkpoints; print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--num", type=int, default=256, help="captions of each set")
    parser.add_argument("--curve", type=int, default=64, help="the same, for a checkpoint; 0: none")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    pipe = LatentDiffPipeline.from_pretrained(str(args.run / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    final, passed = model_accuracy(pipe, args.num, args), seconds_at(args.run)
    curve = []
    checkpoints = sorted((args.run / "checkpoints").glob("step-*"))[:-1] if args.curve else []
    for checkpoint in checkpoints:
        step = int(checkpoint.name.removeprefix("step-"))
        load_checkpoint(pipe, checkpoint / "ema.safetensors")
        logged = max((one for one in passed if one <= step), default=0)
        point = {"step": step, "training_s": round(passed.get(logged, 0.0))}
        shares = model_accuracy(pipe, args.curve, args)
        curve.append(point | {name: shares[name]["all"] for name in shares})
    print(
        json.dumps(
            {
                "benchmark": "shapes_accuracy",
                "num": args.num,
                "steps": args.steps,
                "guidance_scale": args.guidance_scale,
                "training_s": round(max(passed.values())),
                "optimiser_steps": max(passed),
            }
            | final
            | {"curve": curve, "curve_num": args.curve}
            | machine()
        )
    )


if __name__ == "__main__":
    main()
