"""Sheets for a model card, and a test of the model by readers who see its images alone.

Prompts are sampled from the captions of captioned folders, by a key of folder and purpose, and each
has one image a seed. A reader's question shows three images of one training caption and lists eight
captions of the same folder, one of them the right one; the answers are kept apart from the
questions.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from latentdiff.atomic import atomic_file, write_text
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.evaluation.metrics.bootstrap import Interval, proportion
from latentdiff.image_grid import draw_grid
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import NUM_STEPS, default_steps
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.sampling.open_pipeline import open_pipeline

COLUMNS, BATCH_SIZE = 8, 8
NUM_CHOICES, IMAGES_A_QUESTION = 8, 3
MAX_BYTES = 1_000_000  # of the two sheets together
QUALITIES = (92, 85, 75, 65, 50)


@dataclass(frozen=True)
class SheetCounts:
    """How many captions of a folder go to each sheet and to the readers' test."""

    folder: str
    num_seen: int
    num_unseen: int
    num_questions: int


@dataclass(frozen=True)
class Question:
    """Three images of one caption, and the captions to choose from."""

    name: str
    choices: tuple[str, ...]
    right: int  # index into choices


@dataclass(frozen=True)
class SheetSampling:
    """The settings of every image; seed: of the captions too; steps None: the model's, or 50."""

    num_inference_steps: int | None = None
    guidance_scale: float = 3.0
    seed: int = 0


def write_card_sheets(
    model: str,
    counts: Sequence[SheetCounts],
    out: Path,
    *,
    sampling: SheetSampling,
    caption_column: str = "text",
) -> None:
    """Write out/seen.jpg, out/unseen.jpg, out/prompts.json, out/reader/ and out/key.json.

    seen: captions of training images; unseen: of held-out ones, and of no training image.
    Raises ValueError for a folder with too few captions, before any image is generated.
    """
    seen: list[str] = []
    unseen: list[str] = []
    questions: list[Question] = []
    for count in counts:
        folder = read_folder(count.folder, caption_column=caption_column)
        folder.check()
        known, new = _captions(folder)
        key = f"{sampling.seed}|{folder.root.name}"
        seen += _sample_captions(known, count.num_seen, f"{key}|seen")
        unseen += _sample_captions(new, count.num_unseen, f"{key}|unseen")
        questions += _questions(known, count.num_questions, f"{key}|reader")
    questions = _shuffled(questions, seed=sampling.seed)
    pipe = open_pipeline(model)
    num_steps = sampling.num_inference_steps or default_steps(pipe.model_info, NUM_STEPS)
    sampling = replace(sampling, num_inference_steps=num_steps)
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    _write_sheets(pipe, {"seen": seen, "unseen": unseen}, out, sampling)
    settings = {"model": Path(model).name, "seen": seen, "unseen": unseen}
    write_text(out / "prompts.json", _json(settings | asdict(sampling)))
    _write_questions(pipe, questions, out, sampling)


def score_answers(key: Path, answers: Path) -> Interval:
    """Return the share of questions answered right; an answer is a number of the choices, from 1.

    key: the key.json of a test. answers: a JSON object of numbers by question. Raises ValueError
    where a question has no answer.
    """
    right, given = (json.loads(path.read_text(encoding="utf-8")) for path in (key, answers))
    if missing := sorted(right.keys() - given.keys()):
        raise ValueError(f"{answers} has no answer to {', '.join(missing)}, expected one to each")
    return proportion(sum(given[name] == number for name, number in right.items()), len(right))


def _captions(folder: Folder) -> tuple[list[str], list[str]]:
    """Return the captions of the training images, and those of held-out images alone."""
    known, heldout = (
        set(part.each_caption()) for part in (folder.split("train"), folder.heldout())
    )
    return sorted(known), sorted(heldout - known)


def _sample_captions(captions: Sequence[str], num: int, key: str) -> list[str]:
    if num > len(captions):
        purpose = key.split("|", 1)[1].replace("|", ", ")
        raise ValueError(f"{num} captions wanted ({purpose}) and there are {len(captions)}")
    return random.Random(key).sample(list(captions), num)


def _questions(captions: Sequence[str], num: int, key: str) -> list[Question]:
    """Sample right captions, and for each others of the folder to choose from."""
    questions = []
    for caption in _sample_captions(captions, num, key):
        others = [one for one in captions if one != caption]
        choices = [caption, *_sample_captions(others, NUM_CHOICES - 1, f"{key}|{caption}")]
        random.Random(f"{key}|{caption}|order").shuffle(choices)
        questions.append(Question("", tuple(choices), choices.index(caption)))
    return questions


def _shuffled(questions: Sequence[Question], *, seed: int) -> list[Question]:
    """Shuffle the folders' questions and number them."""
    mixed = list(questions)
    random.Random(f"{seed}|order").shuffle(mixed)
    return [Question(f"q{n:02d}", one.choices, one.right) for n, one in enumerate(mixed, start=1)]


def _generate(
    pipe: LatentDiffPipeline, prompts: Sequence[str], seeds: Sequence[int], sampling: SheetSampling
) -> list[Image.Image]:
    return [
        image
        for _, image in generate_images(
            pipe,
            prompts,
            seeds=seeds,
            batch_size=BATCH_SIZE,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            desc="images",
        )
    ]


def _write_sheets(
    pipe: LatentDiffPipeline,
    captions: Mapping[str, Sequence[str]],
    out: Path,
    sampling: SheetSampling,
) -> None:
    """Write a sheet of each list of captions as JPG, at the best quality within MAX_BYTES."""
    sheets = {}
    for name, prompts in captions.items():
        seeds = [sampling.seed + i for i in range(len(prompts))]
        if images := _generate(pipe, prompts, seeds, sampling):
            sheets[name] = draw_grid(images, prompts, columns=COLUMNS)
    for quality in QUALITIES:
        for name, sheet in sheets.items():
            with atomic_file(out / f"{name}.jpg") as temporary:
                sheet.save(temporary, format="JPEG", quality=quality, optimize=True)
        if sum((out / f"{name}.jpg").stat().st_size for name in sheets) <= MAX_BYTES:
            return


def _write_questions(
    pipe: LatentDiffPipeline, questions: Sequence[Question], out: Path, sampling: SheetSampling
) -> None:
    """Write reader/qNN.png and reader/questions.md, and key.json next to reader/."""
    if not questions:
        return
    prompts = [q.choices[q.right] for q in questions for _ in range(IMAGES_A_QUESTION)]
    first = sampling.seed + 1000
    images = _generate(pipe, prompts, list(range(first, first + len(prompts))), sampling)
    (out / "reader").mkdir(exist_ok=True)
    lines = [
        "Each image file shows three images of one text. Which of the eight texts is it?",
        'Answer with a JSON object such as {"q01": 3, ...}: the number of the text.',
    ]
    for number, question in enumerate(questions):
        three = images[IMAGES_A_QUESTION * number :][:IMAGES_A_QUESTION]
        sheet = draw_grid(three, [question.name] * len(three), columns=len(three))
        with atomic_file(out / "reader" / f"{question.name}.png") as temporary:
            sheet.save(temporary, format="PNG")
        lines += ["", f"## {question.name}.png", ""]
        lines += [f"{i}. {text}" for i, text in enumerate(question.choices, start=1)]
    write_text(out / "reader" / "questions.md", "\n".join(lines) + "\n")
    write_text(out / "key.json", _json({q.name: q.right + 1 for q in questions}))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
