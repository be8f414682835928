"""Measure right shapes images of distilled students next to their teacher's in as many steps.

    make demo-scratch
    latentdiff distill demo-scratch-run/model --data demo-scratch-run/shapes --steps 1 --out OUT
    python benchmarks/few_steps_accuracy.py demo-scratch-run/model OUT

TEACHER: a model's or a run's folder; DISTILLED: what `latentdiff distill` wrote, whose stages are
students of their own numbers of steps. All generate the same --num seen and --num held-out captions
from the same seeds, the teacher with classifier-free guidance: in --teacher_steps, and in each
student's number. metrics/shapes_judge.py judges by geometry and colour, nothing learned. Prints one
JSON line: shares of images that show all attributes with 95 % intervals (Wilson), and of them what
each loses to the teacher in --teacher_steps, caption by caption (bootstrap).
"""

import argparse
import json
import re
from pathlib import Path

import torch
from common import machine
from shapes_accuracy import scenes_for

from latentdiff import LatentDiffPipeline
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, proportion
from latentdiff.evaluation.metrics.shapes_judge import follows, judge_image
from latentdiff.models.model_path import resolve_model
from latentdiff.sampling.batch_sampler import generate_images


def students(distilled, at_most):
    """Return the folders of the stages of at most so many steps, by their number."""
    found = {int(re.sub(".*-", "", one.name)): one for one in distilled.glob("stages/[1-9]-*")}
    return {num: found[num] / "pipeline" for num in sorted(found, reverse=True) if num <= at_most}


def open_quiet(folder):
    pipe = LatentDiffPipeline.from_pretrained(str(resolve_model(str(folder))))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answers_of(pipe, scenes, *, num_steps, args):
    """Return of each scene which attributes its image shows."""
    captions = [scene.caption for scene in scenes]
    options = {"num_inference_steps": num_steps, "guidance_scale": args.guidance_scale}
    seeds, size = range(len(scenes)), args.batch_size
    images = generate_images(pipe, captions, seeds=seeds, batch_size=size, **options)
    return [follows(judge_image(image), scenes[k]) for k, image in images]


def shares_of(answers, reference):
    """Return the shares of right attributes, and what is lost to the reference's answers."""
    right, wanted = (torch.tensor([one["all"] for one in found]) for found in (answers, reference))
    interval, lost = proportion(int(right.sum()), len(right)), bootstrap_difference(wanted, right)
    shares = {name: sum(one[name] for one in answers) / len(answers) for name in answers[0]}
    return {name: round(share, 4) for name, share in shares.items()} | {
        "all_95": [round(interval.low, 3), round(interval.high, 3)],
        "lost": [round(x, 4) for x in (lost.estimate, lost.low, lost.high)],
    }


def main():
    """Generate, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("distilled", type=Path)
    parser.add_argument("--num", type=int, default=256, help="captions of each set")
    parser.add_argument("--teacher_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--max_steps", type=int, default=8, help="of the students to measure")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    folders = students(args.distilled, args.max_steps)
    pipes = {num: open_quiet(folders[num]) for num in folders}
    pipes["teacher"] = open_quiet(args.teacher)
    jobs = [("teacher", args.teacher_steps)]
    jobs += [job for num in folders for job in (("teacher", num), (num, num))]
    rows, reference, scenes = [], {}, scenes_for(args.num)
    for model, num_steps in jobs:
        row = {"model": "teacher" if model == "teacher" else "student", "steps": num_steps}
        for name in ("seen", "heldout"):
            answers = answers_of(pipes[model], scenes[name], num_steps=num_steps, args=args)
            row[name] = shares_of(answers, reference.setdefault(name, answers))
        rows.append(row)
    given = {"num": args.num, "guidance_scale": args.guidance_scale}
    print(json.dumps({"benchmark": "few_steps_accuracy"} | given | {"rows": rows} | machine()))


if __name__ == "__main__":
    main()
