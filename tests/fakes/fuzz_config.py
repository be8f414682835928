"""Random settings files and options of the command line, through the loader of every command."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from fuzz_inputs import FuzzCase

from latentdiff.config.io import load_config, to_dict
from latentdiff.config.text_to_image import Config

GOOD: dict[str, list[Any]] = {
    "train.seed": [0, 7, 2**40],
    "train.learning_rate": [1e-5, 0.5],
    "train.max_steps": [1, 10_000],
    "train.mixed_precision": ["bf16", "fp32"],
    "train.precision": ["fp16"],
    "data.root": ["a b", "~/x", "café", "[x]y", "a: b # c"],
    "data.background": [[0, 0, 0], [1, 2, 255]],
    "data.heldout_fraction": [0.0, 0.5],
    "preview.prompts": [["a cat", "(b:1.2)"], []],
    "preview.every_steps": [0, 5],
    "diffusion.caption_dropout": [0, 0.25],
    "model.unet.block_out_channels": [[64, 64, 128, 128]],
    "output_dir": ["runs/x", "日本"],
}
BAD: dict[str, list[Any]] = {
    "train.seed": [-1, 10**30, 1.5, True, "x", None, [1], {"a": 1}],
    "train.learning_rate": [-1, "nan", "inf", 1e9, [1.0], "fast"],
    "train.max_steps": [0, -5, "ten", 2.5],
    "train.mixed_precision": ["fp8", 16],
    "data.background": [[0, 0], [0, 0, 256], [-1, 0, 0], "red", [0, 0, 0, 0], None],
    "data.heldout_fraction": [-0.1, 1.5, "half"],
    "preview.prompts": [["", "a"], [1], "one", [" "]],
    "diffusion.beta_start": [-1, 0, 1, 2],
    "diffusion.nosuch": [1],
    "model.unet.block_out_channels": [[], [0, 0, 0, 0], [33, 64, 64, 64], [64], "64"],
    "output_dir": ["", None, "a\0b", "  "],
    "train": [3, [1]],
}


def make_case(generator: random.Random) -> FuzzCase:
    """A file and options that are right, or one of many faults."""
    kinds: list[Callable[[random.Random], FuzzCase]] = [_good, _good, _bad, _text]
    return generator.choice(kinds)(generator)


def _good(generator: random.Random) -> FuzzCase:
    names = generator.sample([name for name in GOOD if "precision" not in name], 4)
    names.append(generator.choice(["train.mixed_precision", "train.precision"]))
    given = {name: generator.choice(GOOD[name]) for name in names}
    as_options = generator.sample(names, 2)
    file = {name: value for name, value in given.items() if name not in as_options}
    options = [f"--{name}={_option(given[name])}" for name in as_options]
    text = yaml.safe_dump(_nested(file) or {"train": {"seed": 0}}, allow_unicode=True)
    if generator.random() < 0.2:
        text = "\ufeff" + text

    def is_right(config: Config) -> bool:
        found = _flat(to_dict(config))
        renamed = {
            name.replace("train.precision", "train.mixed_precision"): value
            for name, value in given.items()
        }
        return all(found[name] == value for name, value in renamed.items())

    return FuzzCase(f"good {given}", _loader(text.encode(), options), is_right)


def _bad(generator: random.Random) -> FuzzCase:
    name = generator.choice(list(BAD))
    value = generator.choice(BAD[name])
    text = yaml.safe_dump(_nested({name: value}), allow_unicode=True).encode()
    last = name.rpartition(".")[2]
    return FuzzCase(f"bad {name}={value!r}", _loader(text, []), named=(last, "section"))


def _text(generator: random.Random) -> FuzzCase:
    seed = generator.randrange(100)
    levels = generator.randint(30, 3000)
    doubled = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    texts = [
        f"train:\n  seed: {seed}\n  seed: {seed}\n",
        f"train: {{seed: {seed}}}\ntrain.seed: 3\n",
        "data: " + "[" * levels + "]" * levels,
        "data: " + "{a: " * levels + "}" * levels,
        "a0: &a0 [1, 2]\n" + doubled,
        "train: &a [*a]\n",
        "a: !!python/name:os.system ''\n",
        "train: {seed: [",
        "\t\0",
        "- a\n- b\n",
        "",
        "? {a: b}\n: c\n",
        "train: *nowhere\n",
        "--- {}\n--- {}\n",
        "<<: 3\n",
    ]
    text = generator.choice(texts).encode()
    if generator.random() < 0.2:
        text = generator.choice([b"\xff\xfe\0", bytes([200, seed]) * 9])
    return FuzzCase(f"text {text[:60]!r}", _loader(text, []), named=("config.yaml", "section"))


def _loader(text: bytes, options: list[str]) -> Callable[[Path], Config]:
    def load(folder: Path) -> Config:
        path = folder / "config.yaml"
        path.write_bytes(text)
        return replace(load_config(path, options))

    return load


def _option(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in given.items():
        *sections, last = name.split(".")
        inside = nested
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return nested


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
