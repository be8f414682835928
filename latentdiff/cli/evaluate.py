"""Commands that measure: a model, a fine-tuned subject, readers, and the swiss roll."""

import json
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from latentdiff.atomic import write_text
from latentdiff.cli.command import add_model, quieten_libraries, take_options
from latentdiff.config.options import (
    BoundOptions,
    CompareSubjectOptions,
    EvalModelOptions,
    EvaluationOptions,
    RollOptions,
    SweepOptions,
)


def evaluate_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Measure a model on held-out captioned images; write metrics.json and report.html."""
    add_model(parser)
    parser.add_argument("--out", type=expanduser, required=True, help="the folder for the results")
    parser.add_argument("--bound", action="store_true", help="the variational bound in bits")
    for options in (EvalModelOptions, EvaluationOptions, BoundOptions, SweepOptions):
        parser.add_class_arguments(options)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries("evaluation.evaluate")
    from latentdiff.evaluation.evaluate import evaluate

    bound = take_options(BoundOptions, values)
    report = evaluate(
        values["model"],
        Path(values["out"]),
        data=take_options(EvalModelOptions, values),
        options=take_options(EvaluationOptions, values),
        bound=bound if values["bound"] else None,
        sweep=take_options(SweepOptions, values),
    )
    print(f"wrote {report.with_name('metrics.json')} and {report}", flush=True)
    return 0


def compare_subject_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Measure a fine-tuned subject: similarity to its photographs, drift on unrelated prompts."""
    add_model(parser, "base", of="before")
    add_model(parser, "tuned", of="after")
    for name, description in (
        ("photos", "the folder of the subject's photographs"),
        ("features", "folder of a feature network, as for evaluate: its features are compared"),
        ("out", "the folder to write the images and results to"),
    ):
        parser.add_argument(f"--{name}", type=expanduser, required=True, help=description)
    parser.add_class_arguments(CompareSubjectOptions)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries("evaluation.compare_subject")
    from latentdiff.evaluation.compare_subject import compare_subject

    report = compare_subject(
        *(values["base"], values["tuned"], values["photos"], Path(values["out"])),
        features=values["features"],
        options=take_options(CompareSubjectOptions, values),
    )
    before, after, drift = report.similarity_before, report.similarity_after, report.drift
    print(f"similarity to {report.num_photos} photographs: {before:.4f} -> {after:.4f}")
    print(f"gain over {report.gain.difference.num_samples} seeds: {report.gain}")
    print(
        f"drift over {drift.num_samples} unrelated prompts: {drift.estimate:.4f} "
        f"[{drift.low:.4f}, {drift.high:.4f}]; unlike prompts: {report.unlike:.4f}"
    )
    return 0


def card_sheets_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write the sheets of a model's card and a test for readers, or score the readers' answers."""
    add_model(parser, nargs="?")
    parser.add_argument("--data", type=expanduser, nargs="+", default=[], help="captioned folders")
    for name, description in (
        ("seen", "captions of training images on the first sheet, by folder"),
        ("unseen", "captions of held-out images alone on the second sheet, by folder"),
        ("questions", "training captions that readers are asked for, by folder"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[], help=description)
    parser.add_argument("--out", type=expanduser, default="sheets", help="the folder to write")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        help="sampling steps, 1 and more; by default the model's own where it is distilled, or 50",
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=3.0, help="scale of classifier-free guidance"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and images")
    parser.add_argument(
        "--caption_column", type=str, default="text", help="column that holds the caption"
    )
    parser.add_argument(
        "--score",
        type=expanduser,
        nargs=2,
        metavar=("KEY", "ANSWERS"),
        help="score these answers of readers instead",
    )
    args = parser.parse_args(arguments)
    quieten_libraries()
    return _score_answers(*map(Path, args.score)) if args.score else _write_card_sheets(args)


def _write_card_sheets(args: Namespace) -> int:
    from latentdiff.evaluation.card_sheets import SheetCounts, SheetSampling, write_card_sheets

    given = [args.seen, args.unseen, args.questions]
    counts = [numbers or [0] * len(args.data) for numbers in given]
    if not args.model or not args.data or any(len(one) != len(args.data) for one in counts):
        raise ValueError("expected a model, --data, and one number a folder in each of the others")
    sheets = [SheetCounts(*row) for row in zip(args.data, *counts, strict=True)]
    sampling, out = (
        SheetSampling(args.num_inference_steps, args.guidance_scale, args.seed),
        Path(args.out),
    )
    write_card_sheets(
        args.model, sheets, out, sampling=sampling, caption_column=args.caption_column
    )
    print(f"wrote {out}; show readers {out / 'reader'} and nothing else")
    return 0


def _score_answers(key: Path, answers: Path) -> int:
    from latentdiff.evaluation.card_sheets import NUM_CHOICES, score_answers

    share = score_answers(key, answers)
    print(
        f"{share.estimate:.1%} of {share.num_samples} right "
        f"[{share.low:.1%}, {share.high:.1%}], chance {1 / NUM_CHOICES:.1%}"
    )
    return 0


def swiss_roll_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train on a swiss roll in the plane: plot the chain, and the bound next to the entropy."""
    parser.add_argument(
        "--out", type=expanduser, default="swiss-roll", help="the folder for both files"
    )
    parser.add_class_arguments(RollOptions)
    values = parser.parse_args(arguments).as_dict()
    from latentdiff.evaluation.report.plots import check_matplotlib
    from latentdiff.evaluation.swiss_roll import plot_clouds, swiss_roll

    check_matplotlib()
    figures, clouds = swiss_roll(take_options(RollOptions, values))
    out = Path(values["out"])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "swiss_roll.json", json.dumps(figures, indent=2) + "\n")
    print(f"wrote {plot_clouds(clouds, figures, out / 'swiss_roll.png')}", flush=True)
    return 0
