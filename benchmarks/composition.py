"""Composition: a subject in a style, each trained on, never together: are both in the image?

    python benchmarks/composition.py train DATA/emoji-styles --out CLASSIFIER
    python benchmarks/composition.py score CLASSIFIER MODEL DATA/emoji-styles/test_combo

`train` fits a small ResNet to train/ that names an image's subject and its style. `score` asks the
model for each caption of the split, "a cat, blob style", one image each from its own seed, and
prints as JSON how often the classifier finds the subject and the style asked for: in the generated
images, in the split's real images (the ceiling), and in the generated images against other
captions (the floor); with 95 % intervals (Wilson). strict: the pairs whose nearest training drawing
of the subject is further than `--min_rms` gray levels away.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import machine
from PIL import Image
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from latentdiff import LatentDiffPipeline
from latentdiff.evaluation.metrics.bootstrap import proportion
from latentdiff.sampling.batch_sampler import generate_images

SIZE_PX = 64


class Classifier(torch.nn.Module):
    """Names the subject and the style of an image (b, 3, 64, 64) in [-1, 1]: two logits."""

    def __init__(self, subjects, styles):
        super().__init__()
        self.subjects, self.styles = subjects, styles
        widths = [64, 96, 192, 384]
        config = ResNetConfig(
            embedding_size=48, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic"
        )
        self.resnet = ResNetModel(config)
        stem = self.resnet.embedder
        stem.embedder.convolution.stride = (1, 1)  # small images: halved once before the stages
        self.subject = torch.nn.Linear(widths[-1], len(subjects))
        self.style = torch.nn.Linear(widths[-1], len(styles))

    def forward(self, pixels):
        """Return the logits of the subjects and of the styles."""
        features = self.resnet(pixels).pooler_output.flatten(1)
        return self.subject(F.dropout(features, 0.3, self.training)), self.style(features)


def read_split(folder):
    """Return a split's rows and its images, uint8 (n, 3, 64, 64)."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return rows, to_pixels(Image.open(folder / row["file_name"]) for row in rows)


def to_pixels(images):
    """Return images as uint8 (n, 3, 64, 64)."""
    box = Image.Resampling.BOX
    arrays = [np.asarray(one.convert("RGB").resize((SIZE_PX, SIZE_PX), box)) for one in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def augment(pixels, generator):
    """Scale, shift, turn and blur images a little; the white around them is part of the style."""
    count = len(pixels)

    def uniform(low, high):
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = [uniform(-0.1, 0.1) for _ in range(2)]
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    share = uniform(0, 0.9).view(-1, 1, 1, 1)
    noise = torch.randn(moved.shape, generator=generator) * uniform(0, 0.06).view(-1, 1, 1, 1)
    return torch.lerp(moved, soft, share) + noise


def normalised(pixels):
    """Return uint8 pixels in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def fit(net, rows, pixels, args):
    """Train by AdamW on both names, with labels smoothed."""
    subjects = torch.tensor([net.subjects.index(row["codepoint"]) for row in rows])
    styles = torch.tensor([net.styles.index(row["style"]) for row in rows])
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.learning_rate, weight_decay=0.05)
    total = args.epochs * len(rows) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total)
    generator = torch.Generator().manual_seed(args.seed)
    net.train()
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(args.epochs)])
    for step in range(total):
        chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
        batch = augment(normalised(pixels[chosen]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            subject, style = net(batch)
        loss = F.cross_entropy(subject.float(), subjects[chosen], label_smoothing=0.1)
        loss = loss + 0.5 * F.cross_entropy(style.float(), styles[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {total}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def name(net, pixels):
    """Return each image's subject and style."""
    net.eval()
    logits = [net(normalised(some)) for some in pixels.split(128)]
    subject, style = (torch.cat(parts).argmax(1) for parts in zip(*logits, strict=True))
    return [net.subjects[i] for i in subject], [net.styles[i] for i in style]


def shares(found, rows):
    """Return how often subject, style and both are those of the rows, with intervals."""
    subjects = np.array([a == row["codepoint"] for a, row in zip(found[0], rows, strict=True)])
    styles = np.array([a == row["style"] for a, row in zip(found[1], rows, strict=True)])
    table = {"subject": subjects, "style": styles, "both": subjects & styles}
    intervals = {key: proportion(int(hits.sum()), len(rows)) for key, hits in table.items()}
    return {
        key: {"share": round(one.estimate, 4), "low": round(one.low, 4), "high": round(one.high, 4)}
        for key, one in intervals.items()
    }


def train(args):
    """Fit the classifier and state its accuracy on the two held-out splits."""
    torch.manual_seed(args.seed)
    rows, pixels = read_split(args.data / "train")
    net = Classifier(
        sorted({row["codepoint"] for row in rows}), sorted({row["style"] for row in rows})
    )
    fit(net, rows, pixels, args)
    args.out.mkdir(parents=True, exist_ok=True)
    names = {"subjects": net.subjects, "styles": net.styles}
    torch.save({"names": names, "weights": net.state_dict()}, args.out / "classifier.pt")
    held_out, real = read_split(args.data / "test_combo")
    print(json.dumps({"test_combo": shares(name(net, real), held_out)}))


def load(folder):
    """Return the trained classifier."""
    stored = torch.load(folder / "classifier.pt", weights_only=True)
    net = Classifier(**stored["names"])
    net.load_state_dict(stored["weights"])
    return net


def score(args):
    """Generate an image for each caption of the split and print the shares."""
    net = load(args.classifier)
    rows, real = read_split(args.split)
    rows, real = rows[: args.num], real[: args.num]
    pipe = LatentDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = [row["text"] for row in rows]
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    drawn = generate_images(pipe, prompts, seeds=range(len(rows)), batch_size=16, **settings)
    generated = name(net, to_pixels(image for _, image in drawn))
    known = name(net, real)
    shift = len(rows) // 2
    far = [i for i, row in enumerate(rows) if row.get("nearest_train_rms", 0) > args.min_rms]
    result = {
        "machine": machine(),
        "split": args.split.name,
        "num": len(rows),
        **settings,
        "generated": shares(generated, rows),
        "real": shares(known, rows),
        "other_captions": shares(generated, rows[shift:] + rows[:shift]),
    }
    if far:
        result["strict"] = {
            "num": len(far),
            "min_rms": args.min_rms,
            "generated": shares(picked(generated, far), [rows[i] for i in far]),
            "real": shares(picked(known, far), [rows[i] for i in far]),
        }
    print(json.dumps(result))


def picked(found, indices):
    """Return some images' names."""
    return [[names[i] for i in indices] for names in found]


def main():
    """Train or score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("data", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--epochs", type=int, default=30)
    one.add_argument("--batch_size", type=int, default=64)
    one.add_argument("--learning_rate", type=float, default=2e-3)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=train)
    one = commands.add_parser("score")
    one.add_argument("classifier", type=Path)
    one.add_argument("model")
    one.add_argument("split", type=Path)
    one.add_argument("--num", type=int, default=None)
    one.add_argument("--steps", type=int, default=25)
    one.add_argument("--guidance_scale", type=float, default=3.0)
    one.add_argument("--min_rms", type=float, default=15.0)
    one.set_defaults(run=score)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
