"""The size of images follows the model's own unless a config names one; far beyond it warns."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from fakes_finetune import finetuning
from fakes_training import make_config

from latentdiff.config.io import load_config, parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.training.text_to_image.resolution import with_resolution
from latentdiff.training.text_to_image.train_t2i import train


def resolution(*arguments: str) -> int | None:
    return with_resolution(parse_arguments(Config, arguments)).data.resolution


def test_resolution_is_the_models_own_unless_given(world: Path, tmp_path: Path) -> None:
    assert resolution("--model.pretrained=latentdiff-mini") == 128
    assert resolution(f"--model.pretrained={world / 'base' / 'pipeline'}") == 32
    assert resolution(f"--model.pretrained={world / 'base'}") == 32
    assert resolution("--model.pretrained=latentdiff-mini", "--data.resolution=32") == 32
    assert resolution("--model.vae=latentdiff-vae") == 512
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolution(f"--model.pretrained={tmp_path / 'absent'}")


def test_run_stores_the_resolution_that_it_took_and_goes_on_with_it(
    world: Path, tmp_path: Path
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = finetuning(world, tmp_path / "run", train__max_steps=1)
    config = replace(config, data=replace(config.data, resolution=None))
    assert train(config) == 0
    assert load_config(tmp_path / "run" / "config.yaml").data.resolution == 32
    longer = replace(config, train=replace(config.train, max_steps=2))
    assert train(longer) == 0


@pytest.mark.parametrize(("size_px", "warns"), [(32, False), (64, True)])
def test_training_far_beyond_the_models_size_warns(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, size_px: int, warns: bool
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = finetuning(world, tmp_path / "run", train__max_steps=1, data__resolution=size_px)
    with caplog.at_level(logging.WARNING):
        assert train(config) == 0
    said = [one for one in caplog.messages if one.startswith("data.resolution")]
    assert len(said) == warns
    assert all("beyond the 32 px" in one and "train at 32 px" in one for one in said)


def test_config_of_a_run_from_scratch_keeps_the_old_default(world: Path, tmp_path: Path) -> None:
    given = make_config(world, tmp_path)
    assert with_resolution(given) == given
    assert Config().data.side_px == 512
