"""Flow prediction against v-prediction with zero terminal SNR, from noise, on the shapes world.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py --out DIR [--steps 250] [--num_seeds 3]

Each arm is a run of configs/demo_scratch.yaml of --steps steps with one objective; arms of one seed
have equal weights at the start, images, captions and noise. Networks and steps are the same, and so
is the processor time of a training, which the line names. Each model then generates --num held-out
captions from fixed seeds, in 25 guided steps by the scheduler of its export and in 8 by UniPC;
metrics/shapes_judge.py judges the images by geometry and colour. A finished arm is not done again.

Prints one JSON line: by arm and way of sampling the share of images that show all that their
caption asks, of each training seed and over all with its 95 % interval (Wilson); and each arm less
the first, paired by training seed (t interval over seeds) and by image (bootstrap).
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import machine
from scipy import stats
from shapes_accuracy import scenes_for

from latentdiff import LatentDiffPipeline
from latentdiff.data.shapes import write_shapes
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, proportion
from latentdiff.evaluation.metrics.shapes_judge import follows, judge_image
from latentdiff.sampling.batch_sampler import generate_images

V_ZERO_SNR = {"prediction_type": "v_prediction", "zero_terminal_snr": "true"}
FLOW = {"prediction_type": "flow_prediction", "zero_terminal_snr": "false", "beta_schedule": ""}
OBJECTIVES = {
    "v_zero_snr": V_ZERO_SNR | {"timestep_sampling": "stratified"},
    "flow": FLOW | {"timestep_sampling": "stratified"},
    "flow_logit_normal": FLOW | {"timestep_sampling": "logit_normal"},
}
NUM_TRAIN, NUM_TEST = 3000, 100  # as `latentdiff demo scratch` has them
WAYS = (("own", 25), ("unipc", 8))  # of sampling: scheduler and steps


def train(run, args, *, objective, seed):
    """Train one arm; return its processor seconds, all threads together."""
    settings = {
        "output_dir": run,
        "data.root": args.out / "shapes",
        "data.cache_dir": args.out / "cache",
        "train.seed": seed,
        "train.max_steps": args.steps,
        "train.lr_warmup_steps": min(50, args.steps // 8),
        "train.checkpoint_every_steps": args.steps,
        "train.keep_every_steps": 0,
        "eval.every_steps": 0,
        "preview.num_steps": 1,
        "preview.num_nearest": 0,
    }
    settings |= {f"diffusion.{name}": value for name, value in OBJECTIVES[objective].items()}
    command = [sys.executable, "-m", "latentdiff", "train", "--config", "demo_scratch"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def answers(run, args):
    """Return by way of sampling, for each held-out caption, whether its image shows all of it."""
    scenes, found = scenes_for(args.num)["heldout"], {}
    for scheduler, steps in WAYS:
        pipe = LatentDiffPipeline.from_pretrained(str(run / "pipeline"))
        pipe.set_progress_bar_config(disable=True)
        if scheduler != "own":
            pipe.set_scheduler(scheduler)
        images = generate_images(
            pipe,
            [scene.caption for scene in scenes],
            seeds=range(args.num),
            batch_size=32,
            num_inference_steps=steps,
            guidance_scale=args.guidance_scale,
        )
        shown = [
            follows(judge_image(image), scene)["all"]
            for (_, image), scene in zip(images, scenes, strict=True)
        ]
        found[f"{scheduler}_{steps}"] = shown
    return found


def arm(args, *, objective, seed):
    """Return the figures of one arm, from its file where it is finished."""
    run = args.out / f"{objective}-{seed}"
    file = run / "objectives.json"
    if not file.is_file():
        seconds = train(run, args, objective=objective, seed=seed)
        file.write_text(json.dumps({"cpu_s": round(seconds), "answers": answers(run, args)}))
    return json.loads(file.read_text())


def shares(answers):
    """Return the share of yes in answers (seeds, captions): by seed, over all, its interval."""
    interval = proportion(int(answers.sum()), answers.size)
    return {
        "by_seed": [round(float(share), 4) for share in answers.mean(axis=1)],
        "all": round(interval.estimate, 4),
        "all_95": [round(interval.low, 3), round(interval.high, 3)],
    }


def difference(answers, first):
    """Return the share in answers less that in first, both (seeds, captions), and its intervals."""
    by_seed = answers.mean(axis=1) - first.mean(axis=1)
    by_image = bootstrap_difference(answers.ravel(), first.ravel())
    half = float("nan")
    if (num := len(by_seed)) > 1:
        half = stats.t.ppf(0.975, num - 1) * by_seed.std(ddof=1) / num**0.5
    middle = float(by_seed.mean())
    return {
        "difference": round(middle, 4),
        "over_seeds_95": [round(middle - half, 3), round(middle + half, 3)],
        "over_images_95": [round(by_image.low, 3), round(by_image.high, 3)],
    }


def compare(arms):
    """Return shares and differences by way of sampling. arms: objective -> figures of each seed."""
    found, (first, *_) = {}, arms
    for way in (f"{scheduler}_{steps}" for scheduler, steps in WAYS):
        shown = {
            name: np.array([figures["answers"][way] for figures in of_seeds], float)
            for name, of_seeds in arms.items()
        }
        found[way] = {name: shares(answers) for name, answers in shown.items()}
        for name in [name for name in shown if name != first]:
            found[way][f"{name} - {first}"] = difference(shown[name], shown[first])
    return found


def main():
    """Train and judge every arm, seed by seed; print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num", type=int, default=256, help="held-out captions")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    args = parser.parse_args()
    write_shapes(args.out / "shapes", num_train=NUM_TRAIN, num_test=NUM_TEST)
    arms = {name: [] for name in args.objectives}
    for seed in range(args.num_seeds):
        for objective, figures in arms.items():
            figures.append(arm(args, objective=objective, seed=seed))
    seconds = {name: [figures["cpu_s"] for figures in of_seeds] for name, of_seeds in arms.items()}
    line = {"benchmark": "objectives", "steps": args.steps, "num": args.num}
    line |= {"guidance_scale": args.guidance_scale, "training_cpu_s": seconds}
    print(json.dumps(line | compare(arms) | machine()))


if __name__ == "__main__":
    main()
