"""When to stop: curves of short LoRA runs on small folders, and rules replayed on them.

    OMP_NUM_THREADS=1 python benchmarks/stopping.py record DATA --out curves.jsonl
    python benchmarks/stopping.py replay curves.jsonl

`record` trains latentdiff-mini on each of some small folders from the held-out splits of DATA, far
past the best step, and writes a line a folder: what a rule sees at each evaluation, and apart from
it what the final judgement sees. A folder has three parts: images that are trained on, images whose
loss a rule sees (none of a subject with 4 to 6 photographs), and images for the judgement alone.
A folder that is in the file already is skipped. The learning rate is constant, so that the state
at a step does not depend on where a run was to end.

`replay` lets each rule choose a step from what it may see, and prints its regret in JSON: how much
worse the chosen step is by the judgement's images than the best step in hindsight; `both` is the
mean of the regrets in loss and in similarity.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import machine

from latentdiff.config.io import load_config
from latentdiff.data.images import to_pixels
from latentdiff.evaluation.metric_nets import load_features
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference
from latentdiff.evaluation.metrics.features import THUMBNAILS
from latentdiff.evaluation.metrics.heldout_loss import triple_losses
from latentdiff.evaluation.metrics.stopping import State, StopRule
from latentdiff.evaluation.report.section import interval_json
from latentdiff.image_io import load_image
from latentdiff.models.unet.guidance_embedding import predict
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.finetune.methods import merged_components
from latentdiff.training.inputs import fixed_triples
from latentdiff.training.text_to_image.export import averaged
from latentdiff.training.text_to_image.preview import make_pipeline
from latentdiff.training.text_to_image.resolution import with_resolution
from latentdiff.training.text_to_image.setup import setup

NUM_TRIPLES = 12  # timesteps and noises of each image
NUM_SAMPLES = {"seen": 8, "judged": 8, "unrelated": 4}  # images generated at an evaluation
FIRST_SEEDS = {"seen": 0, "judged": 1000, "unrelated": 2000}
NUM_STEPS = 6
GUIDANCE = 3.0
SEED = 0
UNRELATED = ("a red car", "a green apple", "a blue house", "a tree")


def read_rows(folder):
    """Return the rows of a folder's metadata.jsonl, with the path of each image."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"path": folder / json.loads(line)["file_name"]} for line in lines]


def folders(data):
    """Yield (name, kind, rows to train on, rows a rule sees, rows of the judgement)."""
    for name in ("candle", "dog3", "duck_toy", "robot_toy"):
        rows = read_rows(data / "dreambooth" / name)
        num = len(rows) - 1 - (len(rows) > 4)
        yield name, "subject", rows[:num], [], rows[num:]
    emoji = read_rows(data / "emoji-styles" / "test_subject")
    flowers = read_rows(data / "flowers" / "test")
    rng, used = random.Random(SEED), set()
    sets = [("style", "style", emoji), ("flower", "label", flowers), ("group", "group", emoji)]
    for kind, key, rows in sets:
        for number, name in enumerate(sorted({row[key] for row in rows})):
            left = [row for row in rows if row[key] == name and row["path"] not in used]
            rng.shuffle(left)
            num_train = (8, 12, 16, 24)[number % 4]
            num_seen = max(3, num_train // 4)
            num_judged = min(16, len(left) - num_train - num_seen)
            if num_judged < 8:
                continue
            chosen = left[: num_train + num_seen + num_judged]
            used |= {row["path"] for row in chosen}
            parts = chosen[:num_train], chosen[num_train:][:num_seen], chosen[-num_judged:]
            yield f"{kind} {name}", kind, *parts


def write_folder(out, train, seen, judged):
    """Write out/train and out/test; the names of the latter tell what a rule sees."""
    parts = {"train": [("image", train)], "test": [("seen", seen), ("judged", judged)]}
    for split, groups in parts.items():
        (out / split).mkdir(parents=True)
        lines = []
        for label, rows in groups:
            for k, row in enumerate(rows):
                name = f"{label}_{k:03d}{row['path'].suffix}"
                shutil.copyfile(row["path"], out / split / name)
                lines.append(json.dumps({"file_name": name, "text": row["text"]}))
        (out / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Recorder:
    """A run on one folder, and its measurements."""

    def __init__(self, folder, out, args):
        heldout = len(list((folder / "test").glob("*.*"))) - 1
        settings = {
            "data.root": folder,
            "output_dir": out,
            "train.max_steps": args.max_steps,
            "train.batch_size": args.batch_size,
            "train.learning_rate": args.learning_rate,
            "train.lr_schedule": "constant",
            "eval.num_heldout": NUM_TRIPLES * heldout,
            "data.bill_of_materials": "none",
        }
        given = [f"--{key}={value}" for key, value in settings.items()]
        fixed_triples.MIN_TRIPLES = NUM_TRIPLES * heldout  # a run has 64 for a few images
        config = with_resolution(load_config("lora_mini", given))
        accelerator = start_accelerator(config)
        self.run = run = setup(config, Path(out), accelerator)
        self.batches = run.train_data.batches(
            run.layout,
            first_step=0,
            last_step=args.max_steps,
            accelerator=accelerator,
            seed=config.train.seed,
        )
        self.nets = {"network": load_features(args.features), "thumbnail": THUMBNAILS}
        names = [record.id for record in run.train_data.heldout]
        self.is_seen = [Path(name).name.startswith("seen") for name in names]
        sides = {"seen": [], "judged": []}
        for record, is_seen in zip(run.train_data.heldout, self.is_seen, strict=True):
            sides["seen" if is_seen else "judged"].append(record)
        trained = list(run.train_data.train)
        self.real = {"trained": trained, **sides}
        self.real = {side: self.embed_files(records) for side, records in self.real.items()}
        captions = {
            "seen": [record.captions[0] for record in sides["seen"] or trained],
            "judged": [record.captions[0] for record in sides["judged"]],
            "unrelated": UNRELATED,
        }
        self.prompts = {
            side: [texts[k % len(texts)] for k in range(NUM_SAMPLES[side])]
            for side, texts in captions.items()
        }
        self.base = None

    def embed_files(self, records):
        """Return features by network of images, scaled and cropped as trained on."""
        size = self.run.config.data.side_px
        images = []
        for record in records:
            image = load_image(record.path, background=(255, 255, 255)).convert("RGB")
            short = min(image.size)
            left, top = (image.width - short) // 2, (image.height - short) // 2
            image = image.crop((left, top, left + short, top + short)).resize((size, size))
            images.append(image)
        return self.embed(images)

    def embed(self, images):
        """Return unit features by network of images."""
        if not images:
            return {}
        pixels = torch.stack([to_pixels(image) for image in images])
        return {
            name: torch.nn.functional.normalize(net.embed(pixels).double(), dim=1)
            for name, net in self.nets.items()
        }

    def train_until(self, step, done):
        """Take the steps from `done` to `step`."""
        self.run.train_step.model.train()
        for k in range(done, step):
            count = self.run.train_data.order.count(k)
            self.run.train_step.step(self.batches, step=k, count=count, accumulation=1)

    def generate(self, pipeline, prompts, first_seed):
        """Return images of prompts."""
        found = generate_images(
            pipeline,
            prompts,
            seeds=[first_seed + k for k in range(len(prompts))],
            batch_size=8,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE,
        )
        return [image for _, image in found]

    @torch.no_grad()
    def measure(self):
        """Return the losses by image, similarities and drift of the averaged weights."""
        run = self.run
        with averaged(run.train_step):
            plain = merged_components(run.components, "lora")
        plain.unet.eval()
        pipeline = make_pipeline(plain)
        pipeline.set_progress_bar_config(disable=True)
        row, which = {}, run.train_data.heldout_triples.images
        with run.accelerator.autocast():
            losses = triple_losses(
                lambda zt, t, conditioning: predict(plain.unet, zt, t, conditioning),
                run.train_step.objective.schedule,
                run.train_data.heldout_triples,
                prediction_type=run.train_step.objective.prediction_type,
                device=torch.device("cpu"),
                captions=["true"],
            )["true"]
            images = {
                side: self.generate(pipeline, texts, FIRST_SEEDS[side])
                for side, texts in self.prompts.items()
            }
        for side in ("seen", "judged"):
            chosen = [k for k, seen in enumerate(self.is_seen) if seen == (side == "seen")]
            row[f"loss_{side}"] = rounded([losses[which == k].tolist() for k in chosen])
        features = {side: self.embed(generated) for side, generated in images.items()}
        self.base = self.base or features.get("unrelated")
        for side, net in product(features, self.nets):
            x = features[side][net]
            if side == "unrelated":
                row[f"{net}_drift"] = rounded((1 - (x * self.base[net]).sum(1)).tolist())
                continue
            for real, y in self.real.items():
                if y:
                    row[f"{net}_{side}_to_{real}"] = rounded((x @ y[net].T).tolist())
        return row


def rounded(value):
    """Return JSON values with five digits after the point."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 5)


def record(args):
    """Train on each folder that the file lacks, and add a line."""
    known = set()
    if args.out.is_file():
        known = {json.loads(line)["name"] for line in args.out.read_text().splitlines()}
    steps = [args.max_steps * k // args.num_evaluations for k in range(args.num_evaluations + 1)]
    for number, (name, kind, *parts) in enumerate(folders(args.data)):
        if (
            name in known
            or number % args.shards != args.shard
            or (args.only and name not in args.only)
        ):
            continue
        started, seconds, rows = time.process_time(), 0.0, []
        with tempfile.TemporaryDirectory() as scratch:
            write_folder(Path(scratch) / "data", *parts)
            recorder, done = Recorder(Path(scratch) / "data", Path(scratch) / "run", args), 0
            for step in steps:
                before = time.process_time()
                recorder.train_until(step, done)
                seconds += time.process_time() - before
                rows.append({"step": step} | recorder.measure())
                done = step
        line = {
            "name": name,
            "kind": kind,
            "num_images": [len(part) for part in parts],
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "rows": rows,
            "seconds": round(time.process_time() - started, 1),
            "training_seconds": round(seconds, 1),
            **machine(),
        }
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(name, line["num_images"], line["seconds"], line["training_seconds"], flush=True)


def means(rows):
    """Return the mean of each row, which may differ in length."""
    return [float(np.mean(row)) for row in rows]


class Curve:
    """A folder's line, as rules and the judgement read it."""

    def __init__(self, line):
        self.name, self.kind, self.rows = line["name"], line["kind"], line["rows"]
        self.num_train, self.batch_size = line["num_images"][0], line["batch_size"]
        self.steps = [row["step"] for row in self.rows]

    def states(self):
        """Return what a run would show the rule at each evaluation."""
        for row in self.rows:
            if row["loss_seen"]:
                yield State(row["step"], means(row["loss_seen"]))
            else:
                costs = [1 - one for one in means(row["network_seen_to_trained"])]
                yield State(row["step"], costs, row["network_drift"])

    def judged(self, measure):
        """Return the judgement's cost of each evaluation: lower is better."""
        if measure == "loss":
            return np.array([np.mean(means(row["loss_judged"])) for row in self.rows])
        return np.array([1 - np.mean(row["network_judged_to_judged"]) for row in self.rows])

    def regret(self, chosen, measure):
        """Return how much worse a step is than the best trained one, as a share of the range.

        The range is from the best to the worst evaluation, the untrained one among them, so that
        folders weigh alike.
        """
        costs = self.judged(measure)
        return (costs[chosen] - costs[1:].min()) / (costs.max() - costs.min())

    def nearest(self, step):
        """Return the trained evaluation nearest to a step."""
        return min(range(1, len(self.steps)), key=lambda k: abs(self.steps[k] - step))


def by_rule(curve, **parameters):
    """Return the evaluation that train.stop=auto exports: that of the last where it never stops."""
    on_samples = not curve.rows[0]["loss_seen"]
    rule = StopRule(margin=1.0 if on_samples else 0.0, **parameters)
    for state in curve.states():
        rule.add(state)
        if rule.chosen is not None:
            return curve.steps.index(rule.chosen.step)
    return curve.steps.index(rule.best.step)


def by_images(per_image):
    """Return a rule of thumb: so many images seen for each training image."""
    return lambda curve: curve.nearest(per_image * curve.num_train / curve.batch_size)


def by_steps(steps):
    """Return a rule of thumb: so many steps at batch size 1."""
    return lambda curve: curve.nearest(steps / curve.batch_size)


FIXED = {
    "100 steps an image (DreamBooth guides)": by_images(100),
    "80 steps an image (diffusers' DreamBooth example: 400 for 5)": by_images(80),
    "18 epochs (diffusers' text-to-image LoRA example: 15,000 for 833)": by_images(18),
    "10 epochs": by_images(10),
    "1,500 steps": by_steps(1500),
    "500 steps (diffusers' DreamBooth LoRA example)": by_steps(500),
    "the last step": lambda curve: len(curve.steps) - 1,
}
GRID = [{"patience": p, "confirmations": c} for p in (2, 3, 4, 5, 6) for c in (1, 2, 3)]
MEASURES = ("loss", "similarity")


def replay(args):
    """Print the regrets of the rule, tuned on the other folders, and of rules of thumb."""
    lines = [line for path in args.curves for line in path.read_text().splitlines()]
    curves = [Curve(json.loads(line)) for line in lines]
    tuned = [
        tuned_choice(curve, [other for other in curves if other is not curve]) for curve in curves
    ]
    by_number = tuned_fixed(curves, lambda curve: 1)
    by_pass = tuned_fixed(curves, lambda curve: curve.num_train / curve.batch_size)
    choices = {
        "train.stop=auto": [by_rule(curve) for curve in curves],
        "the same, tuned on the other folders": tuned,
        "as many steps as suit the other folders": by_number,
        "as many passes over the images as suit the other folders": by_pass,
        **{name: [rule(curve) for curve in curves] for name, rule in FIXED.items()},
    }
    regrets = {
        name: {
            measure: [curve.regret(k, measure) for curve, k in zip(curves, chosen, strict=True)]
            for measure in MEASURES
        }
        for name, chosen in choices.items()
    }
    for found in regrets.values():
        found["both"] = np.mean([found[measure] for measure in MEASURES], axis=0).tolist()
    own = regrets["train.stop=auto"]
    rules = {
        name: {
            "steps": [curve.steps[k] for curve, k in zip(curves, choices[name], strict=True)],
            **{key: summary(values, own[key]) for key, values in found.items()},
        }
        for name, found in regrets.items()
    }
    figures = {
        "benchmark": "stopping",
        "folders": [f"{curve.name} ({curve.kind}, {curve.num_train})" for curve in curves],
        "evaluations": curves[0].steps,
        "rules": rules,
    }
    print(json.dumps(figures | machine()))


def tuned_choice(curve, others):
    """Return the choice by the parameters that regret least, in both measures, on other folders."""
    best = min(
        GRID,
        key=lambda one: sum(
            other.regret(by_rule(other, **one), measure) for other in others for measure in MEASURES
        ),
    )
    return by_rule(curve, **best)


def tuned_fixed(curves, unit):
    """Return each folder's choice by the fixed length that regrets least on the other folders.

    unit: steps of a curve that count 1. It stands for a rule of thumb in its best scale.
    """
    lengths = sorted({step / unit(curve) for curve in curves for step in curve.steps[1:]})

    def cost(one, length):
        chosen = one.nearest(length * unit(one))
        return sum(one.regret(chosen, measure) for measure in MEASURES)

    table = np.array([[cost(one, length) for length in lengths] for one in curves])
    best = (table.sum(0) - table).argmin(1)
    return [one.nearest(lengths[k] * unit(one)) for one, k in zip(curves, best, strict=True)]


def summary(regrets, own):
    """Return mean and worst regret, and how much more it is than the rule's, paired by folder."""
    found = {"mean": float(np.mean(regrets)), "worst": float(np.max(regrets))}
    if regrets != own:
        found["more_than_auto"] = interval_json(bootstrap_difference(regrets, own))
    return found


def main():
    """Record or replay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record")
    one.add_argument("data", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--features", required=True, help="folder of a feature network")
    one.add_argument("--max_steps", type=int, default=144)
    one.add_argument("--num_evaluations", type=int, default=12)
    one.add_argument("--batch_size", type=int, default=4)
    one.add_argument("--learning_rate", type=float, default=1e-3)
    one.add_argument("--shard", type=int, default=0)
    one.add_argument("--shards", type=int, default=1)
    one.add_argument("--only", nargs="*")
    one.set_defaults(run=record)
    two = commands.add_parser("replay")
    two.add_argument("curves", type=Path, nargs="+")
    two.set_defaults(run=replay)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
