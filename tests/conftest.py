"""Fixtures that every test may use; what they are made of is in fakes_models.py."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from fakes_models import (
    CAPTIONS,
    make_components,
    make_text_encoder,
    make_tiny_vae,
    make_unet,
    make_vae,
    save_folder,
)
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.models.components import Components
from latentdiff.models.text import train_tokenizer
from latentdiff.training.text_to_image import memory

# The first backward pass of a process decides whether autograd starts threads, and a process with
# such threads cannot fork children that train: take it before any test can change the answer.
torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests, so that none is left over for one process at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def activations_of() -> Iterator[Callable[[Any], int | None]]:
    """Runs here last seconds, of which the estimate of a pass' memory would be half.

    Returns what estimates it. test_plan.py and test_sdxl_training.py test the estimate,
    test_processes.py has it in whole runs.
    """
    with pytest.MonkeyPatch.context() as patch:
        clean = memory.activations_of
        patch.setattr(memory, "activations_of", lambda run: 1_000_000)
        yield clean


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """A run asks the disk some seventy times to hold its files: as long as it computes here.

    That matters to a power cut alone, which no test makes; test_atomic.py and test_checkpoint.py
    see to it that files are flushed before they bear their names.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision a process; a user's script has one run a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared data and weights; tests that need them skip where they are absent."""
    default = Path(__file__).parents[2] / "shared"
    path = Path(os.environ.get("LATENTDIFF_SHARED", default))
    if not (path / "weights").is_dir():
        pytest.skip(f"needs the shared data folder; {path} is absent (set LATENTDIFF_SHARED)")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """A trained vocabulary of at most 600 tokens, 16 of them a caption."""
    return train_tokenizer(CAPTIONS, vocab_size=600, max_length=16)


@pytest.fixture
def vae() -> AutoencoderKL:
    return make_vae()


@pytest.fixture
def tiny_vae() -> AutoencoderTiny:
    return make_tiny_vae()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return make_text_encoder(tokenizer)


@pytest.fixture
def components(tokenizer: CLIPTokenizer) -> Components:
    """A whole model of a few thousand parameters, its images 32 x 32."""
    return make_components(tokenizer)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A tiny Stable-Diffusion-format folder, shared by the session: never write into it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "sd"
    save_folder(make_components(tokenizer), path)
    return path
