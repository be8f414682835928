"""The built wheel alone, outside the clone, in an environment that sees the tests' packages."""

import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from fakes_pipeline import tiny_pipeline
from PIL import Image

ROOT = Path(__file__).parents[2]
TOGETHER = """
import json, os, sys
from latentdiff.cli.main import main
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the demo trains in one process
for words in json.loads(sys.argv[1]):
    code = main(words)
    if code > (words == ["doctor"]):  # which answers no, 1, on some machines
        sys.exit(f"{words} ended with {code}")
"""


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, install it into a new environment; return where its commands are."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    names = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "configs", "latentdiff"]
    subprocess.run(["cp", "-R", *(str(ROOT / name) for name in names), _made(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder)]
    subprocess.run([*pip, *build, str(copy)], check=True)
    [wheel] = folder.glob("latentdiff-*.whl")
    venv.create(folder / "env", with_pip=False)
    [packages] = (folder / "env").glob("**/site-packages")
    install = ["--python", str(folder / "env"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return Path(sysconfig.get_path("scripts", vars={"base": str(folder / "env")}))


def _made(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def command(bin_folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return `latentdiff` as installed, and an environment that does not know the clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return [str(bin_folder / "latentdiff"), *arguments], env


def run(bin_folder: Path, *arguments: str, cwd: Path) -> Any:
    """Run `latentdiff` as installed, from a folder outside the clone."""
    words, env = command(bin_folder, *arguments)
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def run_together(bin_folder: Path, *commands: list[str], cwd: Path) -> str:
    """Run several commands in one process, which imports once; return what they printed."""
    words = [str(bin_folder / "python"), "-P", "-c", TOGETHER, json.dumps(commands)]
    _, env = command(bin_folder)
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_has_the_commands_configs_and_type_information(
    bin_folder: Path, tmp_path: Path
) -> None:
    done = run(bin_folder, "configs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    lines = done.stdout.splitlines()
    assert names == {line.split()[0] for line in lines if re.match("  [a-z]", line)}
    configs = Path(lines[-1].removeprefix("Files: ").strip())
    assert configs.is_relative_to(bin_folder.parent)
    assert (configs / "accelerate" / "one_gpu.yaml").is_file()
    assert (configs.parent / "py.typed").is_file()


@contextmanager
def serving(bin_folder: Path, model: str, *, cwd: Path) -> Iterator[str]:
    """Run `latentdiff app` inside the block; give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, env = command(bin_folder, "app", model, "--port", str(port))
    with (
        open(cwd / "app.log", "w", encoding="utf-8") as log,
        subprocess.Popen(words, cwd=cwd, env=env, stdout=log, stderr=log) as server,
    ):
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


def answer(address: str, *, within_s: float) -> str:
    """Return what a server answers once it is up."""
    until = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as page:
                return str(page.read().decode())
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def worked(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo; train a step on four captioned images, sample, pack, push and examine.

    Return the folder with run/, sheet.png, packed/ and demo-run/, and what was printed.
    """
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
        (folder / "photos" / f"{index}.txt").write_text("a photo of noise", encoding="utf-8")
    settings = ["--train.max_steps=1", "--train.batch_size=2", "--preview.num_steps=1"]
    paths = ["--data.root=photos", "--data.cache_dir=cache", "--output_dir=run"]
    tiny_pipeline().save_pretrained(folder / "tiny")
    short = ["--data.resolution=32", "--train.max_steps=1", "--train.batch_size=4"]
    short += ["--train.ema=false", "--preview.num_steps=1", "--eval.num_heldout=4"]
    printed = run_together(
        bin_folder,
        ["demo", "--model", "tiny", "--num_train", "8", *short],
        ["train", "--config", "lora_mini", *paths, *settings],
        ["sample", "run", "a photo of noise", "--steps", "1", "--out", "sheet.png"],
        ["export", "pack", "latentdiff-mini", "--out=packed"],
        ["export", "push", "packed", "me/mini", "--dry_run"],
        ["doctor"],
        cwd=folder,
    )
    return folder, printed


@pytest.mark.slow
def test_wheel_trains_samples_and_examines(worked: tuple[Path, str]) -> None:
    folder, printed = worked
    with Image.open(folder / "sheet.png") as sheet:
        assert min(sheet.size) >= 64
    assert (folder / "run" / "lora").is_dir()
    assert "torch" in printed


@pytest.mark.slow
def test_wheel_serves_what_it_trained(bin_folder: Path, worked: tuple[Path, str]) -> None:
    folder, _ = worked
    with serving(bin_folder, "run", cwd=folder) as address:
        assert "<html" in answer(address, within_s=300), (folder / "app.log").read_text()


@pytest.mark.slow
def test_wheel_runs_the_demo(worked: tuple[Path, str]) -> None:
    folder, _ = worked
    assert (folder / "demo-run" / "sheet.png").is_file()


def test_wheel_refuses_a_config_that_does_not_ship(bin_folder: Path, tmp_path: Path) -> None:
    missing = run(bin_folder, "train", "--config", "emojy", cwd=tmp_path)
    assert missing.returncode == 2
    assert "did you mean emoji" in missing.stderr


@pytest.mark.slow
def test_wheel_exports_what_stock_diffusers_opens(worked: tuple[Path, str]) -> None:
    folder, printed = worked
    stock = StableDiffusionPipeline.from_pretrained(folder / "packed")
    stock.set_progress_bar_config(disable=True)
    image = stock("a cat", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()
    assert "me/mini" in printed
