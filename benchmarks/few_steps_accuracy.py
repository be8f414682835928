"""Measure right shapes images of distilled students next to their teacher's in as many steps.

    make demo-scratch
    latentdiff distill demo-scratch-run/model --data demo-scratch-run/shapes --steps 1 --out OUT
    python benchmarks/few_steps_accuracy.py demo-scratch-run/model OUT [LCM]

TEACHER: a model's or a run's folder; DISTILLED: what `latentdiff distill` wrote, whose stages are
students of their own numbers of steps, or an LCM-LoRA. All generate the same --num seen and --num
held-out captions from the same seeds, the teacher with classifier-free guidance: in --teacher_steps
and in each student's number, and where there is an LCM-LoRA also without, at its cost.
metrics/shapes_judge.py judges by geometry and colour, nothing learned. Prints one JSON line: shares
of images that show all attributes with 95 % intervals (Wilson), and of them what each loses to the
teacher in --teacher_steps, caption by caption (bootstrap).
"""

import argparse
import json
from pathlib import Path

import torch
from common import machine
from shapes_accuracy import scenes_for

from latentdiff import LatentDiffPipeline
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, proportion
from latentdiff.evaluation.metrics.shapes_judge import follows, judge_image
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_info import read_model_info
from latentdiff.sampling.batch_sampler import generate_images


def students(distilled, at_most):
    """Return the folders of the stages of at most so many steps, by name and number."""
    found = {}
    for folder in distilled:
        for stage in folder.glob("stages/*"):
            name = stage.name if stage.name == "lcm-lora" else "student"
            steps = read_model_info(stage / "pipeline").num_inference_steps
            if steps <= at_most and not stage.name.startswith("0"):
                found[name, steps] = stage / "pipeline"
    return dict(sorted(found.items(), key=lambda item: (-item[0][1], item[0][0])))


def open_quiet(folder):
    pipe = LatentDiffPipeline.from_pretrained(str(resolve_model(str(folder))))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answers_of(pipe, scenes, *, num_steps, guidance_scale, batch_size):
    """Return of each scene which attributes its image shows."""
    captions, seeds = [scene.caption for scene in scenes], range(len(scenes))
    options = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    images = generate_images(pipe, captions, seeds=seeds, batch_size=batch_size, **options)
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


def jobs_of(folders, args):
    """Return (name, steps, guidance scale, folder) of each row."""
    scale, jobs = args.guidance_scale, []
    student_scale = scale if args.student_guidance_scale is None else args.student_guidance_scale
    for steps in dict.fromkeys([args.teacher_steps, *(steps for _, steps in folders)]):
        jobs.append(("teacher", steps, scale, args.teacher))
    for (name, steps), folder in folders.items():
        is_lora = name == "lcm-lora"
        jobs += [("teacher", steps, 1.0, args.teacher)] * is_lora
        jobs.append((name, steps, 1.0 if is_lora else student_scale, folder))
    return jobs


def main():
    """Generate, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("distilled", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=256, help="captions of each set")
    parser.add_argument("--sets", default="seen,heldout")
    parser.add_argument("--teacher_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--student_guidance_scale", type=float, help="by default the teacher's")
    parser.add_argument("--max_steps", type=int, default=8, help="of the students to measure")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    rows, reference, scenes = [], {}, scenes_for(args.num)
    for name, steps, scale, folder in jobs_of(students(args.distilled, args.max_steps), args):
        pipe, row = open_quiet(folder), {"model": name, "steps": steps, "guidance_scale": scale}
        options = {"num_steps": steps, "guidance_scale": scale, "batch_size": args.batch_size}
        for part in args.sets.split(","):
            answers = answers_of(pipe, scenes[part], **options)
            row[part] = shares_of(answers, reference.setdefault(part, answers))
        rows.append(row)
    given = {"num": args.num, "rows": rows}
    print(json.dumps({"benchmark": "few_steps_accuracy"} | given | machine()), flush=True)


if __name__ == "__main__":
    main()
