"""Audits with a known answer: swapped captions, an identity leak, canaries, the best checkpoint.

    python benchmarks/audits.py swapped DATA/noto-emoji --model latentdiff-mini
    python benchmarks/audits.py swapped DATA/noto-emoji --num 150 --config full_mini --steps 100 400
    python benchmarks/audits.py leak DATA/dreambooth/dog3 --words "fluffy white poodle" --out RUNS
    python benchmarks/audits.py privacy RUN/pipeline RUN/best --data DATA --heldout DATA/test

`swapped` gives a tenth of the training captions to other images and tells how well the caption
audit finds them: by a model that never saw these, or, with --steps, by one that was fine-tuned on
just that folder for so many steps. `leak` fine-tunes twice on one subject, with its captions and
with further words in each, and audits both. `privacy` audits several exports of one run, and
simulates audits of images that were never shown: halves of the held-out images. Each prints JSON.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from common import machine

from latentdiff.audit import caption_bits
from latentdiff.audit.caption_bits import audit_captions
from latentdiff.audit.membership import membership
from latentdiff.audit.privacy import audit_privacy
from latentdiff.audit.privacy_report import to_json
from latentdiff.config.io import load_config
from latentdiff.config.options import CaptionAuditOptions, PrivacyOptions
from latentdiff.evaluation.metrics.bootstrap import proportion
from latentdiff.evaluation.report.section import interval_json
from latentdiff.training.text_to_image.train_t2i import train

SHARE = 0.1  # of the captions that are swapped


def read_rows(folder):
    """Return the rows of a folder's metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_folder(source, out, rows):
    """Copy the images of rows and write their captions."""
    out.mkdir(parents=True)
    for row in rows:
        shutil.copyfile(source / row["file_name"], out / row["file_name"])
    lines = (json.dumps({"file_name": row["file_name"], "text": row["text"]}) for row in rows)
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def swap(rows, *, seed):
    """Give a share of the rows the caption of another row, which is none of their own."""
    rng, texts = random.Random(seed), [row["text"] for row in rows]
    swapped = {}
    for i in rng.sample(range(len(rows)), round(SHARE * len(rows))):
        own = {rows[i]["text"], *rows[i].get("captions", [])}
        swapped[i] = rng.choice([text for text in texts if text not in own])
    return swapped


def rounded(value):
    """Return JSON values with four digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def options_of(args, data, out, **changes):
    """Return the options of a caption audit."""
    given = {"draws": args.draws, "repeats": args.repeats, "batch_size": 64, "device": args.device}
    return CaptionAuditOptions(str(data), str(out), **given, **changes)


def swapped(args):
    """Plant swapped captions, audit, and tell how well they are found."""
    rows = read_rows(args.data / "train")
    step = max(1, len(rows) // args.num)
    rows = rows[::step][: args.num]
    wrong = swap(rows, seed=args.seed)
    own = {row["file_name"]: {row["text"], *row.get("captions", [])} for row in rows}
    planted = [row | {"text": wrong.get(i, row["text"])} for i, row in enumerate(rows)]
    caption_bits.MAX_CANDIDATES = args.candidates
    names = {rows[i]["file_name"] for i in wrong}
    result = {"data": args.data.name, "num_captions": len(rows), "num_swapped": len(names)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        write_folder(args.data / "train", folder, planted)
        if not args.steps:
            audit = audit_captions(args.model, options_of(args, folder, scratch))
            return result | {"model": args.model} | detected(audit, names, own)
        trained = {}
        for step, run in fine_tuned(args, folder, Path(scratch)):
            audit = audit_captions(str(run), options_of(args, folder, scratch))
            trained[step] = detected(audit, names, own)
    return result | {"model": f"{args.model}, {args.config}"} | {"trained": trained}


def fine_tuned(args, folder, scratch):
    """Fine-tune on the folder; yield each of args.steps and a run whose export is of that step."""
    every, last = min(args.steps), max(args.steps)
    given = {
        "data.root": folder,
        "data.heldout_fraction": 0,
        "model.pretrained": args.model,
        "train.checkpoint_every_steps": every,
        "train.keep_checkpoints": last // every,
        "preview.every_steps": 0,
    }
    for step in sorted(args.steps, reverse=True):
        run = scratch / f"run-{step}"
        settings = given | {"output_dir": run, "train.max_steps": step}
        if step < last:
            settings["train.resume"] = scratch / f"run-{last}" / "checkpoints" / f"step-{step:09d}"
        config = load_config(args.config, [f"--{key}={value}" for key, value in settings.items()])
        assert train(config) == 0
        yield step, run


def detected(audit, names, own):
    """Return how well an audit finds the swapped captions. names: of their images; own: captions
    that are right, by image.
    """
    bits = {one.id: one.bits.estimate for one in audit.captions}
    scores = [
        torch.tensor([-x for name, x in bits.items() if (name in names) == is_wrong])
        for is_wrong in (True, False)
    ]
    flagged = audit.of("wrong")
    hits = sum(one.id in names for one in flagged)
    suggested = [one for one in flagged if one.id in names and "reads more" in one.suggestion]
    right = sum(any(f'"{text}"' in one.suggestion for text in own[one.id]) for one in suggested)
    return {
        "auc": interval_json(membership(*scores).auc),
        "mean_bits": {"swapped": -float(scores[0].mean()), "right": -float(scores[1].mean())},
        "mean_se": sum(one.se for one in audit.captions) / len(bits),
        "recall": interval_json(proportion(hits, len(names))),
        "false_alarms": interval_json(proportion(len(flagged) - hits, len(bits) - len(names))),
        "suggested": len(suggested),
        "suggested_right": right,
    }


def leak(args):
    """Fine-tune on a subject with its own captions, and with further words; audit both."""
    result = {"data": args.data.name, "words": args.words, "trigger_word": args.trigger_word}
    rows = read_rows(args.data)
    for name, words in (("clean", ""), ("leak", args.words)):
        folder, run = (
            args.out / f"{args.data.name}_{name}_data",
            args.out / f"{args.data.name}_{name}",
        )
        if not folder.exists():
            captions = [row["text"] + (f", {words}" if words else "") for row in rows]
            both = [row | {"text": text} for row, text in zip(rows, captions, strict=True)]
            write_folder(args.data, folder, both)
        settings = {
            "data.root": folder,
            "output_dir": run,
            "finetune.instance_prompts": "[]",
            "finetune.class_prompt": rows[0]["class_prompt"],
            "finetune.num_class_images": 12,
            "train.batch_size": 8,
            "train.max_steps": args.max_steps,
            "train.checkpoint_every_steps": args.max_steps,
            "preview.every_steps": 0,
        }
        given = [f"--{key}={value}" for key, value in settings.items()]
        assert train(load_config("dreambooth_mini", given)) == 0
        options = options_of(args, folder, run, trigger_word=args.trigger_word)
        audit = audit_captions(str(run), options)
        full = sum(one.bits.estimate for one in audit.captions)
        kept = sum(one.without_trigger.estimate for one in audit.captions)
        result[name] = {
            "bits": full / len(rows),
            "bits_without_trigger": kept / len(rows),
            "kept_share": kept / full,
            "flagged": len(audit.of("identity leak")),
            "num_captions": len(rows),
            "words": {word: lost.estimate for word, lost in audit.words},
        }
    return result


def privacy(args):
    """Audit each export, and halves of the images that none was shown."""
    result = {"data": args.data.name}
    for model in args.models:
        options = PrivacyOptions(
            str(args.data),
            str(args.out),
            heldout=str(args.heldout) if args.heldout else "",
            draws=args.draws,
            num_images=args.num_images,
            guidance_scale=3.0,
            batch_size=64,
            device=args.device,
        )
        receipt = audit_privacy(str(model), options)
        figures = to_json(receipt)
        figures.pop("most_exposed")
        if "copies" in figures:
            figures["copies"] = figures["copies"]["copies"]
        unseen = receipt.scores["held-out"]
        generator = torch.Generator().manual_seed(args.seed)
        covered = 0
        for _ in range(args.simulations):
            order = torch.randperm(len(unseen), generator=generator)
            half = len(unseen) // 2
            found = membership(unseen[order[:half]], unseen[order[half:]]).auc
            covered += found.contains(0.5)
        coverage = proportion(covered, args.simulations)
        name = f"{model.parent.name}/{model.name}"  # exports of several runs
        result[name] = figures | {"never_shown_contains_half": interval_json(coverage)}
    return result


def main():
    """Run one of the audits and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for work in (swapped, leak, privacy):
        one = commands.add_parser(work.__name__)
        one.set_defaults(run=work)
        if work is privacy:
            one.add_argument("models", type=Path, nargs="+")
            one.add_argument("--data", type=Path, required=True)
            one.add_argument("--heldout", type=Path)
            one.add_argument("--num_images", type=int, default=48)
            one.add_argument("--simulations", type=int, default=1000)
        else:
            one.add_argument("data", type=Path)
            one.add_argument("--repeats", type=int, default=4)
        if work is swapped:
            one.add_argument("--model", default="latentdiff-mini")
            one.add_argument("--num", type=int, default=400)
            one.add_argument("--candidates", type=int, default=16, help="tried on each wrong one")
            one.add_argument("--steps", type=int, nargs="+", default=[], help="of a fine-tune")
            one.add_argument("--config", default="full_mini", help="of the fine-tune")
        if work is leak:
            one.add_argument("--words", required=True)
            one.add_argument("--trigger_word", default="sks")
            one.add_argument("--max_steps", type=int, default=200)
        if work is not swapped:
            one.add_argument("--out", type=Path, required=True)
        one.add_argument("--draws", type=int, default=16)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--device", default=None)
    args = parser.parse_args()
    print(json.dumps(rounded({"machine": machine()} | args.run(args)), indent=2))


if __name__ == "__main__":
    main()
