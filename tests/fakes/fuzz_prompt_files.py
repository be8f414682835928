"""Prompt lists: text and JSON lines in every encoding, line end and damage."""

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fuzz_inputs import FuzzCase

from latentdiff.pipeline.checks import MAX_SEED
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.sampling.prompt_list import MAX_CHARACTERS, PromptEntry, read_prompt_entries

TEXTS = (
    "a red heart",
    "ein Herz ♥ 漢字 🎈",
    "# no comment",
    "a clock (12:30)",
    "one\u2028still one",
    "one\x85still\x0bone\x0c\x1cone",
    "e\u0301 and \u00e9",
    "{not json",
    "a\tb\u200b",
    "x" * 5000,
)
LINE_ENDS = ("\n", "\r\n", "\r")
MARK = "\ufeff"


def make_case(generator: random.Random) -> FuzzCase:
    """Return one prompt list: half of them valid."""
    return generator.choice((_text, _json_lines, _damaged_bytes, _damaged_line))(generator)


def _text(generator: random.Random) -> FuzzCase:
    texts = generator.choices(TEXTS, k=generator.randrange(1, 6))
    content = _joined(texts, generator).encode()
    name = generator.choice(("list.txt", "list", "list.prompts", "♥.txt"))
    return _valid(name, content, [PromptEntry(text) for text in texts])


def _json_lines(generator: random.Random) -> FuzzCase:
    entries = [
        PromptEntry(
            generator.choice(TEXTS),
            generator.choice((None, "", *TEXTS)),
            generator.choice((None, 0, 3, MAX_SEED)),
            generator.choice((None, None, "", *TEXTS)),
            sizes=SizeInputs(*generator.choices((None, None, (1, 2), (768, 1024)), k=6)),
        )
        for _ in range(generator.randrange(1, 6))
    ]
    is_ascii = generator.random() < 0.5
    lines = [json.dumps(_given(one, generator), ensure_ascii=is_ascii) for one in entries]
    content = _joined(lines, generator).encode()
    return _valid(generator.choice(("list.jsonl", "list.JSONL")), content, entries)


def _given(entry: PromptEntry, generator: random.Random) -> dict[str, Any]:
    """Return an entry's fields in any order, those of no value absent or null."""
    values = {n: value for n, value in vars(entry).items() if n != "sizes" and value is not None}
    values |= {name: size for name, size in vars(entry.sizes).items() if size is not None}
    if entry.seed is None and generator.random() < 0.5:
        values["seed"] = None
    return dict(generator.sample(sorted(values.items(), key=str), len(values)))


def _joined(lines: Sequence[str], generator: random.Random) -> str:
    end = generator.choice(LINE_ENDS)
    padded = [generator.choice(("", " ", "\t")) + line for line in lines]
    blank = [line + end * generator.randrange(1, 3) for line in padded]
    mark = MARK if generator.random() < 0.3 else ""
    return mark + generator.choice(("", end, " " + end)) + "".join(blank)


def _damaged_bytes(generator: random.Random) -> FuzzCase:
    """Files that are no list of prompts as a whole."""
    content = generator.choice(
        (
            b"",
            b" \n\r\n\t",
            MARK.encode(),
            "a cat\n".encode("utf-16"),
            "a cat\n".encode("utf-16-le"),
            "a cat".encode("utf-32"),
            "Caf\u00e9\n".encode("latin-1"),
            b"a cat\n\xed\xa0\xbd half",
            b"a cat\n" + generator.randbytes(64) + b"\xff",
            b"\x89PNG\r\n\x1a\n" + bytes(20),
            b"PK\x03\x04" + bytes(20),
            b"a cat\n\0",
            b"x" * (MAX_CHARACTERS + 1),
        )
    )
    return _refused(generator.choice(("list.txt", "list.jsonl")), content, "list.")


def _damaged_line(generator: random.Random) -> FuzzCase:
    """One line of JSON lines that is none, after some that are; the message has its number."""
    line = generator.choice(
        (
            "{",
            '{"prompt": "a"} {"prompt": "b"}',
            '{"prompt": "a", "seed": true}',
            '{"prompt": "a", "seed": 1.5}',
            '{"prompt": "a", "seed": "3"}',
            '{"prompt": "a", "seed": -1}',
            '{"prompt": "a", "seed": NaN}',
            f'{{"prompt": "a", "seed": {2**63}}}',
            f'{{"prompt": "a", "seed": {"9" * 5000}}}',
            '{"prompt": "a", "negative_prompt": 3}',
            '{"prompt": "a", "negative_prompt": ["b"]}',
            '{"prompt": "a", "negative_prompt": "\\ud83d"}',
            '{"prompt": "half \\ud83d"}',
            '{"prompt": "\\u0000"}',
            '{"prompt": "a", "prompt": "b"}',
            '{"prompt": null}',
            '{"prompt": ["a"]}',
            '{"text": "a"}',
            '{"prompt": "a", "sed": 3}',
            '["a"]',
            '"a"',
            "null",
            "3",
            "[" * 100_000,
            '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}",
            '{"prompt": "' + "x" * (MAX_CHARACTERS + 1) + '"}',
        )
    )
    before = generator.randrange(4)
    content = ('{"prompt": "a cat"}\n' * before + line + "\n").encode()
    return _refused("list.jsonl", content, f"list.jsonl, line {before + 1}")


def _read(name: str, content: bytes) -> Callable[[Path], list[PromptEntry]]:
    def load(folder: Path) -> list[PromptEntry]:
        (folder / name).write_bytes(content)
        return read_prompt_entries(folder / name)

    return load


def _valid(name: str, content: bytes, entries: Sequence[PromptEntry]) -> FuzzCase:
    stripped = list(entries) if name.lower().endswith(".jsonl") else _stripped(entries)
    return FuzzCase(f"{name} {content[:80]!r}", _read(name, content), partial(_equal, stripped))


def _stripped(entries: Sequence[PromptEntry]) -> list[PromptEntry]:
    return [PromptEntry(one.prompt.strip()) for one in entries]


def _equal(expected: list[PromptEntry], found: object) -> bool:
    return found == expected


def _refused(name: str, content: bytes, named: str) -> FuzzCase:
    return FuzzCase(f"{name} {content[:80]!r}", _read(name, content), named=(named,))
