"""The configs that ship: one style of comment, one scheme of names, settings that load."""

import logging
import re

import pytest

from latentdiff.cli.main import main
from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import load_config
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.config.yaml_file import (
    CONFIGS,
    GOALS,
    RENAMED_CONFIGS,
    find_config,
    read_header,
    shipped_configs,
)

NAMES = list(shipped_configs())
KINDS = {"train": Config, "train-vae": VaeConfig, "train-clip": ClipConfig, "distill": Config}


@pytest.mark.parametrize("name", NAMES)
def test_header_names_goal_data_memory_time_and_a_command_that_parses(name: str) -> None:
    header = read_header(CONFIGS / f"{name}.yaml")
    assert header.goal in GOALS
    assert len(header.summary) > 30
    assert len(header.data) > 10
    assert re.match(r"\d+ GB, (CPU|GPU|one GPU or each of several)$", header.memory)
    assert re.search("minutes on|not measured", header.time)
    program, command, *rest = header.command.split(maxsplit=2)
    assert program == "latentdiff"
    if command == "demo":
        return
    kind: type = KINDS[command]
    options = re.findall(r"--(?!config)\S+='[^']+'|--(?!config )\S+", rest[0])
    assert f"--config {name}" in rest[0]
    load_config(name, [option.replace("'", "") for option in options], kind=kind)


@pytest.mark.parametrize("name", [name for name in NAMES if name.partition("_")[0] in GOALS])
def test_name_is_the_goal_then_the_model_then_the_memory(name: str) -> None:
    header = read_header(CONFIGS / f"{name}.yaml")
    match = re.fullmatch(rf"{header.goal}_(mini|sd(?:15|xl)_(\d+)gb|256)", name)
    assert match, name
    if match[2]:
        assert header.memory.startswith(f"{match[2]} GB")


@pytest.mark.parametrize("name", [name for name in NAMES if re.search("_(mini|sd15|sdxl)", name)])
def test_preset_of_a_model_needs_no_setting_but_the_folder(name: str) -> None:
    config = load_config(name)
    if name == "scratch_mini":
        return
    assert config.model.pretrained
    assert config.data.resolution is None


@pytest.mark.parametrize("old", RENAMED_CONFIGS)
def test_old_name_of_a_config_works_and_says_the_new_one(
    old: str, caplog: pytest.LogCaptureFixture
) -> None:
    new = RENAMED_CONFIGS[old]
    with caplog.at_level(logging.WARNING):
        assert find_config(old) == find_config(f"configs/{old}.yaml") == CONFIGS / f"{new}.yaml"
    assert caplog.messages == [f"the config {old} is now {new}; the old name still works"]
    with pytest.raises(FileNotFoundError):
        find_config(f"elsewhere/{old}.yaml")


def test_configs_lists_each_under_its_goal_and_prints_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["configs"]) == 0
    table = capsys.readouterr().out
    for goal in GOALS:
        assert f"\n{goal}: " in f"\n{table}"
    assert all(f"\n  {name} " in table for name in NAMES)
    assert max(map(len, table.splitlines()[:-1])) <= 120
    assert main(["configs", "lora_mini"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "lora_mini.yaml").read_text(encoding="utf-8")
    assert main(["configs", "lora_mimi"]) == 2
    assert "did you mean lora_mini?" in capsys.readouterr().err
