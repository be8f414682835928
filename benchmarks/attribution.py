"""Attribution methods scored by twins: many small runs on shapes, without some of their images.

    python benchmarks/attribution.py train --out RUNS --seeds 0 1 2   # resumable
    python benchmarks/attribution.py summarize --out RUNS        # prints JSON

Each run is a line of JSON in RUNS/runs-SEED.jsonl. `train` first makes the base run of a seed,
generates images with it, and scores all training images for each of them by each method. Seed 0
then trains on random halves of the images: the linear datamodelling score (LDS; Park et al. 2023)
of a method is the rank correlation of an image's loss after such a run with the sum of the scores
of the images that it was trained on. Every seed then trains twins: without the image that a method
ranks first, and null twins, without one drawn at random. Runs are made in one process by the
recipe's own functions; tests/audit/test_benchmark_attribution.py holds their weights to those of
`latentdiff twin`, bit for bit.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from common import machine
from scipy import stats

from latentdiff.audit.attribution.gradients import SampleGradients
from latentdiff.audit.attribution.methods import (
    Snapshot,
    feature_scores,
    kernel_scores,
    trace_scores,
)
from latentdiff.audit.attribution.traced_run import TracedRun
from latentdiff.config.io import load_config
from latentdiff.data.images import to_pixels
from latentdiff.data.shapes import write_shapes
from latentdiff.evaluation.eval_set import read_pixels
from latentdiff.evaluation.metrics.bootstrap import bootstrap_mean, proportion
from latentdiff.evaluation.metrics.features import thumbnail_features
from latentdiff.evaluation.report.section import interval_json
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.optim.state import load_parameters
from latentdiff.training.text_to_image.export import averaged
from latentdiff.training.text_to_image.preview import make_pipeline
from latentdiff.training.text_to_image.setup import setup

SETTINGS = {
    "data": {"resolution": 64},
    "model": {
        "vae": "latentdiff-mini",
        "unet": {
            "block_out_channels": [32, 32],
            "attention_levels": [False, True],
            "layers_per_block": 1,
            "head_dim": 32,
        },
        "text": {
            **{"width": 64, "num_layers": 1, "num_heads": 2},
            **{"vocab_size": 560, "max_tokens": 24},
        },
    },
    "diffusion": {
        **{"timestep_sampling": "stratified", "caption_dropout": 0.1},
        **{"prediction_type": "v_prediction", "zero_terminal_snr": True},
    },
    "train": {
        **{"max_steps": 120, "batch_size": 32, "learning_rate": 1.2e-2, "lr_warmup_steps": 20},
        **{"lr_schedule": "cosine", "mixed_precision": "fp32", "ema_decay": 0.95},
        **{"beta2": 0.99, "optimizer": "muon"},
    },
    "preview": {"every_steps": 0, "num_nearest": 0},
    "eval": {"every_steps": 0, "num_heldout": 1},
}
NUM_TRAIN, NUM_QUERIES, NUM_HALVES = 64, 32, 104
NUM_EXPLAINED, NUM_NULLS = 8, 8  # queries whose first image is removed, and null twins, of a seed
DRAWS, LOSS_DRAWS, SIZE = 16, 16, 8192
SNAPSHOTS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the steps, for tracin
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
REMOVED_BY = ("features", "tracin", "trak 0.1", "d_trak 0.1")  # whose first images are removed
METHODS = ("features", "tracin", *(f"{m} {d:g}" for m in ("trak", "d_trak") for d in DAMPINGS))


class Trainer:
    """Trains a run again and again, from the same weights and with the same batches."""

    def __init__(self, config, folder):
        accelerator = start_accelerator(config)
        self.run = setup(config, folder, accelerator)
        self.train_step = self.run.train_step
        self.max_steps = config.train.max_steps
        self.first = {name: x.detach().clone() for name, x in self.train_step.parameters.items()}
        self.first_ema = {k: x.clone() for k, x in self.train_step.ema.state_dict().items()}
        batches = self.run.train_data.batches(
            self.run.layout,
            first_step=0,
            last_step=self.max_steps,
            accelerator=accelerator,
            seed=config.train.seed,
        )
        self.batches = [*batches]
        self.weights = [batch["weight"] for batch in self.batches]

    def train(self, without=(), *, at=None):
        """Train with the loss of the images at some indices weighing 0; at: call after steps."""
        step_of, order = self.train_step, self.run.train_data.order
        load_parameters(step_of.parameters, self.first)
        step_of.optimizer.state.clear()
        step_of.ema.load_state_dict(self.first_ema)
        step_of.skipped = 0
        removed = torch.tensor(sorted(without), dtype=torch.int64)
        step_of.model.train()
        for step, (batch, weight) in enumerate(zip(self.batches, self.weights, strict=True)):
            own = torch.where(torch.isin(batch["index"], removed), 0.0, weight)
            batches = iter([batch | {"weight": own}])
            step_of.step(batches, step=step, count=order.count(step), accumulation=1)
            if at is not None:
                at(step + 1)


@dataclass
class World:
    """A trainer with the images that are explained: Q generated ones, and N training images."""

    trainer: Trainer
    traced: TracedRun
    train: list
    queries: list = field(default_factory=list)
    images: list = field(default_factory=list)

    @classmethod
    def make(cls, out, seed):
        """Write the shapes where they are missing, and set the run of a seed up."""
        write_shapes(
            out / "shapes",
            num_train=NUM_TRAIN,
            num_test=NUM_QUERIES,
            size_px=SETTINGS["data"]["resolution"],
            seed=7,
        )
        (out / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
        folder = out / f"seed-{seed}"
        given = {"data.root": out / "shapes", "data.cache_dir": out / "cache"}
        given |= {"output_dir": folder, "train.seed": seed}
        config = load_config(out / "config.yaml", [f"--{k}={v}" for k, v in given.items()])
        trainer = Trainer(config, folder)
        traced = TracedRun(trainer.run)
        return cls(trainer, traced, [*traced.training_samples(np.arange(len(traced.folder)))])

    def losses(self, *, of_train):
        """Return the losses of queries, and of training images too, with the averaged weights."""
        measure = SampleGradients(self.trainer.train_step, draws=LOSS_DRAWS, size=1, seed=1)
        with averaged(self.trainer.train_step):
            parts = {"queries": self.queries} | ({"train": self.train} if of_train else {})
            return {
                name: [round(float(measure.losses(one).mean()), 7) for one in samples]
                for name, samples in parts.items()
            }

    def generate(self, folder):
        """Generate the queries: images of training captions, and of captions that were not."""
        data, half = self.trainer.run.train_data, NUM_QUERIES // 2
        step = NUM_TRAIN // half
        prompts = [data.train[i * step].captions[0] for i in range(half)]
        prompts += [data.heldout[i].captions[0] for i in range(NUM_QUERIES - half)]
        folder.mkdir(exist_ok=True, parents=True)
        with averaged(self.trainer.train_step):
            pipe = make_pipeline(self.trainer.run.components)
            pipe.set_progress_bar_config(disable=True)
            self.trainer.train_step.model.eval()
            found = generate_images(
                pipe,
                prompts,
                seeds=range(NUM_QUERIES),
                batch_size=16,
                num_inference_steps=25,
                guidance_scale=2.0,
            )
            for k, image in found:
                image.save(folder / f"{k:02d}.png")
                self.images.append(image)
        pairs = zip(self.images, prompts, strict=True)
        self.queries = [self.traced.query_sample(image, prompt) for image, prompt in pairs]

    def gradients(self, measured):
        """Return the projected gradients of queries (Q, P) and training images (N, P)."""
        samples = [*self.queries, *self.train]
        step = SampleGradients(self.trainer.train_step, draws=DRAWS, size=SIZE, seed=0)
        found = [step.of(one, measured) for one in samples]
        stacked = {name: torch.stack([one[name] for one in found]) for name in measured}
        return {n: (x[: len(self.queries)], x[len(self.queries) :]) for n, x in stacked.items()}

    def scores(self):
        """Train the base run; return the scores of each method (Q, N), and generate the queries."""
        steps = {round(self.trainer.max_steps * share) for share in SNAPSHOTS}
        states, rate = {}, self.trainer.train_step.lr_schedule
        named = self.trainer.train_step.parameters

        def keep(done):
            if done in steps:
                states[done] = {name: x.detach().clone() for name, x in named.items()}

        self.trainer.train(at=keep)
        self.generate(self.trainer.run.folder / "images")
        base = self.losses(of_train=True)
        with averaged(self.trainer.train_step):
            final = self.gradients(["loss", "square"])
        snapshots = []
        for done, state in states.items():
            load_parameters(named, state)
            snapshots.append(Snapshot(rate.at(done - 1), *self.gradients(["loss"])["loss"]))
        pixels = torch.stack([to_pixels(image) for image in self.images])
        folder = self.traced.folder
        own = [read_pixels(folder, i, height=64, width=64) for i in range(len(folder))]
        found = {
            "features": feature_scores(
                thumbnail_features(pixels), thumbnail_features(torch.stack(own))
            ),
            "tracin": trace_scores(snapshots),
        }
        for name, measured in (("trak", "loss"), ("d_trak", "square")):
            for damping in DAMPINGS:
                found[f"{name} {damping:g}"] = kernel_scores(*final[measured], damping=damping)
        return base, found


def half_of(number):
    """Return the indices that run `number` of the halves is trained without."""
    return np.random.default_rng((11, number)).permutation(NUM_TRAIN)[: NUM_TRAIN // 2].tolist()


def firsts_of(scores):
    """Return the images that a method of REMOVED_BY ranks first for the explained queries."""
    explained = range(0, NUM_QUERIES, NUM_QUERIES // NUM_EXPLAINED)
    return sorted({int(scores[name][q].argmax()) for name in REMOVED_BY for q in explained})


def nulls_of(seed, firsts):
    """Return images that none of these methods ranks first, at random."""
    rest = [i for i in range(NUM_TRAIN) if i not in firsts]
    chosen = np.random.default_rng((12, seed)).permutation(len(rest))[:NUM_NULLS]
    return sorted(rest[i] for i in chosen)


def read_lines(path):
    """Return the results so far; a line that a kill cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def train(args):
    """Train the runs that are missing, seed by seed, and add a line for each."""
    args.out.mkdir(parents=True, exist_ok=True)
    return {f"runs of seed {seed}": train_seed(args, seed) for seed in args.seeds}


def train_seed(args, seed):
    """Train the runs of one seed that are missing; return how many it has."""
    path = args.out / f"runs-{seed}.jsonl"
    world = World.make(args.out, seed)
    base, scores = world.scores()
    torch.save(scores, args.out / f"scores-{seed}.pt")
    firsts = firsts_of(scores)
    wanted = [("base", 0, [])]
    halves = [("half", number, half_of(number)) for number in range(args.halves)]
    wanted += halves if seed == 0 else []
    wanted += [("one", i, [i]) for i in (*firsts, *nulls_of(seed, firsts))]
    done = {(one["kind"], one["number"]) for one in read_lines(path)}
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")
        for kind, number, without in wanted:
            if (kind, number) in done:
                continue
            if kind != "base":
                world.trainer.train(without)
            losses = base if kind == "base" else world.losses(of_train=kind == "one")
            file.write(json.dumps({"kind": kind, "number": number} | losses) + "\n")
            file.flush()
    return len(wanted)


def lds(scores, halves):
    """Return the LDS of each query: rank correlations over runs of loss and summed scores (Q,)."""
    kept = np.ones((len(halves), NUM_TRAIN))
    for row, one in zip(kept, halves, strict=True):
        row[half_of(one["number"])] = 0
    predicted = kept @ scores.numpy().T.astype(float)  # (runs, Q)
    losses = np.array([one["queries"] for one in halves])
    return [
        -stats.spearmanr(predicted[:, q], losses[:, q]).statistic for q in range(losses.shape[1])
    ]


def regression_lds(halves, *, folds=5):
    """Return the LDS of a ridge regression on the other runs: what a linear model can reach."""
    kept = np.ones((len(halves), NUM_TRAIN))
    for row, one in zip(kept, halves, strict=True):
        row[half_of(one["number"])] = 0
    losses = np.array([one["queries"] for one in halves])
    predicted = np.zeros_like(losses)
    for fold in range(folds):
        test = np.arange(len(halves)) % folds == fold
        x, y = kept[~test] - 0.5, losses[~test]
        gram = x @ x.T + np.eye(len(x)) * NUM_TRAIN / 4
        weights = x.T @ np.linalg.solve(gram, y - y.mean(0))
        predicted[test] = (kept[test] - 0.5) @ weights
    return [
        stats.spearmanr(predicted[:, q], losses[:, q]).statistic for q in range(losses.shape[1])
    ]


def leave_one_out(args):
    """Return, by method, the effects of removing first-ranked images in null deviations."""
    effects, nulls, own = {name: [] for name in REMOVED_BY}, [], []
    for path in sorted(args.out.glob("runs-*.jsonl")):
        lines = read_lines(path)
        scores = torch.load(args.out / f"scores-{path.stem.split('-')[1]}.pt")
        base = next(one for one in lines if one["kind"] == "base")
        ones = {one["number"]: one for one in lines if one["kind"] == "one"}
        null = [i for i in ones if i not in firsts_of(scores)]
        change = {i: np.array(x["queries"]) - np.array(base["queries"]) for i, x in ones.items()}
        of_nulls = np.array([change[i] for i in null])  # (nulls, Q)
        mean, std = of_nulls.mean(0), of_nulls.std(0, ddof=1)
        changed = np.array([np.array(ones[i]["train"]) - np.array(base["train"]) for i in null])
        for i in (i for i in ones if i not in null):
            delta = ones[i]["train"][i] - base["train"][i]
            own.append((delta - changed[:, i].mean()) / changed[:, i].std(ddof=1))
        for q in range(0, NUM_QUERIES, NUM_QUERIES // NUM_EXPLAINED):
            for name in REMOVED_BY:
                first = int(scores[name][q].argmax())
                effects[name].append(float((change[first][q] - mean[q]) / std[q]))
            rest = [(np.delete(of_nulls[:, q], k), of_nulls[k, q]) for k in range(len(null))]
            nulls += [float((x - others.mean()) / others.std(ddof=1)) for others, x in rest]
    return effects, nulls, own


def summarize(args):
    """Return the table: methods by LDS with intervals, and leave-one-out against null twins."""
    halves = [one for one in read_lines(args.out / "runs-0.jsonl") if one["kind"] == "half"]
    scores = torch.load(args.out / "scores-0.pt")
    effects, nulls, own = leave_one_out(args)
    rows = {}
    for name in METHODS:
        values = lds(scores[name], halves)
        rows[name] = {"lds": interval_json(bootstrap_mean(values))}
        if name in effects:
            above = sum(one > np.quantile(nulls, 0.95) for one in effects[name])
            found = proportion(int(above), len(effects[name]))
            rows[name]["leave_one_out"] = interval_json(bootstrap_mean(effects[name]))
            rows[name]["above_95_percent_of_nulls"] = interval_json(found)
        if name != "features":
            better = np.array(values) - np.array(lds(scores["features"], halves))
            rows[name]["lds_above_features"] = interval_json(bootstrap_mean(better))
    return {
        "num_halves": len(halves),
        "num_seeds": len([*args.out.glob("runs-*.jsonl")]),
        "num_train": NUM_TRAIN,
        "methods": rows,
        "regression_lds": interval_json(bootstrap_mean(regression_lds(halves))),
        "nulls": interval_json(bootstrap_mean(nulls)),
        "own_loss_of_removed": interval_json(bootstrap_mean(own)),
    }


def rounded(value):
    """Return JSON values with four digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main():
    """Train the runs, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for work in (train, summarize):
        one = commands.add_parser(work.__name__)
        one.set_defaults(run=work)
        one.add_argument("--out", type=Path, required=True)
        if work is train:
            one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            one.add_argument("--halves", type=int, default=NUM_HALVES)
    args = parser.parse_args()
    result = {"benchmark": "attribution", "machine": machine()} | args.run(args)
    print(json.dumps(rounded(result), indent=2))


if __name__ == "__main__":
    main()
