"""Settings are described as they are declared; a commented settings file reads back."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from latentdiff.cli.main import main
from latentdiff.config.clip import ClipConfig
from latentdiff.config.describe import (
    OTHER_TOOLS,
    Setting,
    commented_yaml,
    form_of,
    settings_of,
    value_text,
)
from latentdiff.config.io import flat, load_config, parse_arguments, to_yaml
from latentdiff.config.options import SampleOptions
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.config.validation import at_least
from latentdiff.config.yaml_file import shipped_configs

KINDS: tuple[Any, ...] = (Config, VaeConfig, ClipConfig)


@dataclass(frozen=True)
class Base:
    """A base. Of little use.

    It has more to say.
    """

    first: int = at_least(2, default=3)
    """the first
    setting"""


@dataclass(frozen=True)
class Derived(Base):
    """A derived one."""

    second: str | None = None
    third: Literal["", "a"] = ""
    """the third"""


def test_a_setting_is_described_by_its_docstring_type_default_and_range() -> None:
    section = "A derived one."
    assert settings_of(Derived) == (
        Setting("first", "INT", "the first setting", "3", "a number of at least 2", section),
        Setting("second", "TEXT", "", "null", "", section),
        Setting("third", "{empty,a}", "the third", "empty", "", section),
    )
    assert settings_of(Base)[0].section == "A base. Of little use."


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_description_and_stands_in_order(kind: Any) -> None:
    settings = settings_of(kind)
    assert [one.name for one in settings] == list(flat(kind()))
    assert [one.name for one in settings if len(one.description) < 6] == []
    assert all(one.default is not None for one in settings)


@pytest.mark.parametrize(
    ("annotation", "form"),
    [
        (bool, "{true,false}"),
        (bool | Literal["auto"], "{true,false,auto}"),
        (float | None, "FLOAT"),
        (int | list[int], "INT or [INT,...]"),
        (tuple[int, int], "[INT,INT]"),
        (tuple[str, ...], "[TEXT,...]"),
    ],
)
def test_the_form_of_a_type_is_what_one_types(annotation: Any, form: str) -> None:
    assert form_of(annotation) == form


def test_values_are_written_as_in_yaml() -> None:
    values = (True, (1, 2.5), "", None, 1e-4, 3)
    assert [*map(value_text, values)] == ["true", "[1,2.5]", "empty", "null", "0.0001", "3"]


def test_names_in_other_tools_stand_for_settings_that_there_are() -> None:
    known = {name.rpartition(".")[2] for name in flat(Config())}
    known |= {one.name for one in settings_of(SampleOptions)}
    assert set(OTHER_TOOLS.values()) <= known
    assert not set(OTHER_TOOLS) & known


@pytest.mark.parametrize("kind", KINDS)
def test_commented_settings_read_back_to_an_equal_config(kind: Any, tmp_path: Path) -> None:
    given = {"output_dir": "runs/a: b # c"}
    config = parse_arguments(kind, [f"--{name}={value}" for name, value in given.items()])
    path = tmp_path / "config.yaml"
    path.write_text(commented_yaml(config, kind), encoding="utf-8")
    assert load_config(path, kind=kind) == config
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(to_yaml(config))
    assert all(len(line) <= 100 for line in path.read_text().splitlines() if "#" in line)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_that_ships_is_printed_with_its_settings(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = next(kind for kind in KINDS if _takes(kind, shipped_configs()[name]))
    command = {Config: "train", VaeConfig: "train-vae", ClipConfig: "train-clip"}[kind]
    assert main([command, "--config", name, "--print_config"]) == 0
    printed = leaves(yaml.safe_load(capsys.readouterr().out))
    assert [*printed] == [*flat(kind())]
    shipped = leaves(yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8")))
    sources = shipped.pop("data.sources", [])  # printed with the defaults of each
    assert {key: printed[key] for key in shipped} == shipped
    for found, wanted in zip(printed.get("data.sources", []), sources, strict=True):
        assert found | wanted == found


def leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _takes(kind: Any, path: Path) -> bool:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return set(given) <= {name.partition(".")[0] for name in flat(kind())}


def test_each_setting_stands_below_its_description() -> None:
    text = commented_yaml(Config(), Config)
    above = text[: text.index("  seed: 0")].splitlines()
    assert above[-2].strip().startswith("# all random numbers of the run are a function of it (INT")


def test_the_table_of_other_trainers_names_settings_by_the_names_that_help_knows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.split("## From other trainers")[1].splitlines()]
    pairs = [re.findall(r"`([\w.]+)", cell) for row in rows if len(row) == 2 for cell in row]
    settings = {setting.name for setting in settings_of(Config)}
    for theirs, ours in zip(pairs[::2], pairs[1::2], strict=True):
        assert set(ours) <= settings, ours
        last = {name.rpartition(".")[2] for name in ours}
        known = [name for name in theirs if name in OTHER_TOOLS]
        assert {OTHER_TOOLS[name] for name in known} <= last, theirs
    assert sum(len(ours) for ours in pairs[1::2]) > 15
