"""A list of prompts, and one job an image in an order that can be resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.sizes import SizeInputs

MAX_BYTES = 64 * 2**20
MAX_CHARACTERS = 100_000
TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
OWN_SIZES = SizeInputs()  # those of the image
LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines also splits within texts, as at U+2028


@dataclass(frozen=True)
class PromptEntry:
    """One entry of a prompt list; None takes the value of the whole list.

    prompt_2, negative_prompt_2, sizes: of SDXL alone. In a file each of the sizes is an entry of a
    line, such as "original_size": [768, 1024].
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    sizes: SizeInputs = OWN_SIZES


@dataclass(frozen=True)
class ImageJob:
    """One image to make. row: the prompt's place in the list; number: the image's own."""

    number: int
    row: int
    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    sizes: SizeInputs = OWN_SIZES


def read_prompt_entries(path: Path) -> list[PromptEntry]:
    """Read a prompt list: a text file with one prompt a line, or JSON lines of PromptEntry.

    UTF-8, a byte order mark is skipped, as are empty lines; no line is a comment. Raises
    FileNotFoundError, or ValueError with file and line.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a text file of prompts or a .jsonl file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, expected prompts of at most {MAX_BYTES}")
    try:
        texts = LINE_END.split(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.reason}"
        ) from None
    read = _json_line if path.suffix.lower() == ".jsonl" else PromptEntry
    found = []
    for number, text in enumerate(texts, start=1):
        if stripped := text.strip():
            try:
                found.append(_checked(read(stripped)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} {error}") from None
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


def plan_jobs(
    entries: Sequence[PromptEntry],
    *,
    seed: int,
    negative_prompt: str | None,
    steps: Sequence[int],
    guidance_scales: Sequence[float],
    num_images: int,
) -> list[ImageJob]:
    """Return a job for every prompt, number of steps, guidance scale and repetition, in this order.

    A prompt's images have the seeds from its own on, or from seed + (its place x num_images); the
    images of a grid over steps and guidance share them, so that they can be compared.
    """
    jobs: list[ImageJob] = []
    for row, entry in enumerate(entries):
        first = seed + row * num_images if entry.seed is None else entry.seed
        last = first + num_images - 1
        if first < 0 or last > checks.MAX_SEED:
            raise ValueError(
                f"prompt {row + 1} has the seeds {first}..{last}, expected a seed such that all "
                f"lie in 0..{checks.MAX_SEED}"
            )
        negative = negative_prompt if entry.negative_prompt is None else entry.negative_prompt
        for count, scale, index in product(steps, guidance_scales, range(num_images)):
            own = len(jobs), row, entry.prompt, negative, first + index
            second = entry.prompt_2, entry.negative_prompt_2, entry.sizes
            jobs.append(ImageJob(*own, count, scale, *second))
    return jobs


def _json_line(text: str) -> PromptEntry:
    try:
        entry: Any = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'must be an object with a text "prompt", got {text[:80]}')
    sizes = [one.name for one in fields(SizeInputs)]
    known = [one.name for one in fields(PromptEntry) if one.name != "sizes"] + sizes
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"has unknown entries {unknown[:8]}; known: {', '.join(known)}")
    given = SizeInputs(**{name: entry.pop(name) for name in sizes if name in entry})
    try:
        return PromptEntry(**entry, sizes=given.checked(is_sdxl=True))
    except ValueError as error:
        raise ValueError(f"has {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entry := dict(pairs)) < len(pairs):
        raise ValueError("has an entry twice")
    return entry


def _checked(entry: PromptEntry) -> PromptEntry:
    """Return the entry; ValueError for values that no image can be made of."""
    for name in TEXTS:
        text: object = getattr(entry, name)
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"has {name}={text!r:.80}, expected a text")
        if "\0" in text:
            raise ValueError(f"has a null character in {name}; is the file text in UTF-8?")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"has {len(text)} characters in {name}, at most {MAX_CHARACTERS}")
        checks.texts(name, text)
    seed: object = entry.seed
    if seed is not None and (
        not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= checks.MAX_SEED
    ):
        raise ValueError(f"has seed={seed!r:.80}, expected an integer in 0..{checks.MAX_SEED}")
    return entry
