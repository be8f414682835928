"""A tiny model and a session that has it open."""

from dataclasses import replace
from pathlib import Path

import pytest
from fakes_app import open_tiny, save_tiny_model

from latentdiff.app.history import History
from latentdiff.app.web_session import WebSession


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder named tiny; never write into it."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def _opened(model: Path) -> WebSession:
    return open_tiny(model)


@pytest.fixture
def session(_opened: WebSession, model: Path) -> WebSession:
    """A session with the model open and an empty history; opening takes a second."""
    given = {"given": (str(model),), "given_controlnets": ()}
    _opened.library = replace(_opened.library, **given, lora_dir=None, runs_dir=None)
    _opened.history = History()
    return _opened
