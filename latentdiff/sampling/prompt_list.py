"""A list of prompts, and one job an image in an order that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PromptEntry:
    """One entry of a prompt list; None takes the value of the whole list."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


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


def read_prompt_entries(path: Path) -> list[PromptEntry]:
    """Read a prompt list: a text file with one prompt a line, or JSON lines of PromptEntry.

    Empty lines are skipped. Raises FileNotFoundError, or ValueError with file and line.
    """
    try:
        texts = path.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.reason}"
        ) from None
    numbered = [(number, text.strip()) for number, text in enumerate(texts, start=1)]
    found = [
        _json_line(path, number, text) if path.suffix == ".jsonl" else PromptEntry(text)
        for number, text in numbered
        if text
    ]
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
        negative = negative_prompt if entry.negative_prompt is None else entry.negative_prompt
        for count, scale, index in product(steps, guidance_scales, range(num_images)):
            jobs.append(
                ImageJob(len(jobs), row, entry.prompt, negative, first + index, count, scale)
            )
    return jobs


def _json_line(path: Path, number: int, text: str) -> PromptEntry:
    where = f"{path}, line {number}"
    try:
        entries: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    known = [one.name for one in fields(PromptEntry)]
    if not isinstance(entries, dict) or not isinstance(entries.get("prompt"), str):
        raise ValueError(f'{where} must be an object with a text "prompt", got {text[:80]}')
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise ValueError(f"{where} has unknown entries {unknown}; known: {', '.join(known)}")
    return PromptEntry(**entries)
