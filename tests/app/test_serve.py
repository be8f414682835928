"""The server's address is announced, and nothing of how to share it with the world."""

from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs the extra ui")

from latentdiff.app import web_ui
from latentdiff.app.web_session import WebSession
from latentdiff.config.options import WebUIOptions


def test_the_address_is_announced_and_sharing_is_not_mentioned(
    session: WebSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(web_ui, "open_session", lambda *_: session)
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda page: ended.append(page.close()))
    told: list[str] = []
    web_ui.serve(["tiny"], WebUIOptions(port=0), on_ready=told.append)
    assert ended == [None]
    assert told[0].startswith("http://127.0.0.1:")
    assert "share" not in capsys.readouterr().out
