"""The web UI: driven in a real browser where there is one, and its parts without."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from fakes_pipeline import SIZE, lora_weights, tiny_pipeline
from PIL import Image

from latentdiff.app.web_session import NO_LORA, OWN_SCHEDULER, WebSession, find_loras, painted_mask
from latentdiff.app.web_ui import MAX_UPLOAD, serve
from latentdiff.config.sampling import WebUIOptions
from latentdiff.pipeline.output import LatentDiffOutput

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
BROWSER_FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]


def call(**changes):
    call = {"prompt": "a cat", "negative_prompt": None, "seed": 1, "num_inference_steps": 4}
    return call | {"num_images_per_prompt": 1, "height": SIZE, "width": SIZE} | changes


def generate(session, *, scheduler=OWN_SCHEDULER, lora=NO_LORA, **changes):
    return list(session.generate(call(**changes), scheduler=scheduler, lora=lora))


def test_images_are_seen_as_they_form_and_end_as_the_pipeline_s_own():
    session = WebSession(tiny_pipeline())
    events = generate(session)
    assert [i for i, _ in events[:-1]] == [0, 1, 2, 3]
    assert isinstance(events[-1], LatentDiffOutput)
    expected = tiny_pipeline()(**call()).images[0]
    assert np.array_equal(np.asarray(events[-1].images[0]), np.asarray(expected))


def test_a_caller_that_closes_the_iterator_stops_the_chain():
    session = WebSession(tiny_pipeline())
    events = session.generate(call(num_inference_steps=100), scheduler=OWN_SCHEDULER, lora=NO_LORA)
    next(events)
    started = time.monotonic()
    events.close()
    assert time.monotonic() - started < 1
    assert len(generate(session)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 151}, "num_inference_steps"),
        ({"width": 2048}, "width"),
        ({"num_images_per_prompt": 9}, "num_images_per_prompt"),
        ({"prompt": "x" * 2001}, "prompt has more than"),
        ({"prompt": "(red:99) apple"}, "prompt weighs"),
        ({"scheduler": "nonsense"}, "no scheduler"),
        ({"lora": "../../secret"}, "no LoRA"),
    ],
)
def test_limits_are_kept_on_the_server_s_side(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(WebSession(tiny_pipeline()), **changes)


def test_schedulers_and_loras_come_and_go(tmp_path):
    from safetensors.torch import save_file

    save_file(lora_weights(), tmp_path / "style.safetensors")
    session = WebSession(tiny_pipeline(), loras=find_loras(str(tmp_path)))
    own = np.asarray(generate(session)[-1].images[0])
    styled = np.asarray(generate(session, lora="style")[-1].images[0])
    euler = np.asarray(generate(session, scheduler="euler a")[-1].images[0])
    assert np.array_equal(np.asarray(generate(session)[-1].images[0]), own)
    assert not np.array_equal(styled, own)
    assert not np.array_equal(euler, own)
    with pytest.raises(FileNotFoundError, match="loras"):
        find_loras(str(tmp_path / "nowhere"))


def test_what_is_painted_over_a_image_is_its_mask():
    photo = Image.new("RGBA", (8, 4), "red")
    clear, stroke = Image.new("RGBA", (8, 4)), Image.new("RGBA", (8, 4))
    stroke.paste((0, 0, 0, 255), (0, 0, 2, 4))
    assert painted_mask(None) == (None, None)
    assert painted_mask({"background": None, "layers": [clear]}) == (None, None)
    assert painted_mask({"background": photo, "layers": [clear]}) == (photo, None)
    _, mask = painted_mask({"background": photo, "layers": [clear, stroke]})
    assert np.array_equal(np.asarray(mask) > 0, np.asarray(stroke)[..., 3] > 0)


def test_script_without_gradio_or_model_is_one_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path / "nowhere")])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "app.py"), run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "latentdiff[ui]" in error or "nowhere" in error


def test_the_page_stays_on_this_machine_and_is_bounded(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the session needs the extra ui")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    seen = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **given: seen.update(given))
    serve(str(tmp_path / "model"), WebUIOptions(device="cpu"))
    assert (seen["server_name"], seen["share"]) == ("127.0.0.1", False)
    assert seen["max_file_size"] == MAX_UPLOAD


@pytest.fixture
def address(tmp_path):
    """The address of a served session; LATENTDIFF_MODEL names a model for a nicer screenshot."""
    pytest.importorskip("gradio", reason="the session needs the extra ui")
    model = os.environ.get("LATENTDIFF_MODEL", str(tmp_path / "model"))
    if model == str(tmp_path / "model"):
        tiny_pipeline().save_pretrained(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "app.py"), model]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path / "cache")}
    server = subprocess.Popen([*command, "--port", str(port)], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the session stopped before it served"
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.slow
def test_browser_shows_the_image_change_and_names_bad_input(address, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's client")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=BROWSER_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        elsewhere = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        page.fill("#prompt textarea, #prompt input", "a red heart")
        page.click("#generate")
        page.wait_for_selector("#state:has-text('done')", timeout=60_000)
        first = page.get_attribute("#images img", "src")
        image = page.request.get(first).body()
        path = tmp_path / "image.png"
        path.write_bytes(image)
        from latentdiff.pipeline.png_metadata import read_settings

        assert read_settings(path)["call"]["prompt"] == "a red heart"
        page.fill("#prompt textarea, #prompt input", "a green apple")
        page.click("#generate")
        page.wait_for_function(
            "old => { const image = document.querySelector('#images img');"
            " return image && image.src !== old"
            " && document.querySelector('#state').innerText.includes('done') }",
            arg=first,
            timeout=60_000,
        )
        page.screenshot(path=os.environ.get("LATENTDIFF_SCREENSHOT", tmp_path / "page.png"))
        page.fill("#prompt textarea, #prompt input", "(red:99) <b>apple</b>")
        page.click("#generate")
        page.wait_for_selector("text=prompt weighs 'red' by 99", timeout=60_000)
        page.fill("#seed textarea, #seed input", "<i>x</i>")
        page.click("#generate")
        page.wait_for_selector("text=got '<i>x</i>'", timeout=60_000)
        browser.close()
    local = ("http://127.0.0.1", "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(local)] == []
