"""The built wheel alone, outside the clone, in an environment that sees the tests' packages."""

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
    doctor = run(bin_folder, "doctor", cwd=tmp_path)
    assert doctor.returncode in (0, 1), doctor.stderr
    assert "torch" in doctor.stdout


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
def trained(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a step on four images with captions next to them; return the folder with run/."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
        (folder / "photos" / f"{index}.txt").write_text("a photo of noise", encoding="utf-8")
    settings = ["--train.max_steps=1", "--train.batch_size=2", "--preview.num_steps=1"]
    paths = ["--data.root=photos", "--data.cache_dir=cache", "--output_dir=run"]
    done = run(bin_folder, "train", "--config", "lora_mini", *paths, *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_wheel_trains_samples_and_serves_the_bundled_model(bin_folder: Path, trained: Path) -> None:
    with serving(bin_folder, "run", cwd=trained) as address:
        options = ["--steps", "1", "--out", "sheet.png"]
        done = run(bin_folder, "sample", "run", "a photo of noise", *options, cwd=trained)
        assert done.returncode == 0, done.stderr
        assert "<html" in answer(address, within_s=60), (trained / "app.log").read_text()
    with Image.open(trained / "sheet.png") as sheet:
        assert min(sheet.size) >= 64
    assert (trained / "run" / "lora").is_dir()


@pytest.mark.slow
def test_wheel_runs_the_demo(bin_folder: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    settings = ["--data.resolution=32", "--train.max_steps=1", "--train.batch_size=4"]
    settings += ["--train.ema=false", "--preview.num_steps=1"]
    settings += ["--eval.num_heldout=4"]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # on one core it trains in one process
    try:
        done = run(
            bin_folder, "demo", "--model", "tiny", "--num_train", "8", *settings, cwd=tmp_path
        )
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo-run" / "sheet.png").is_file()


def test_wheel_refuses_a_config_that_does_not_ship(bin_folder: Path, tmp_path: Path) -> None:
    missing = run(bin_folder, "train", "--config", "emojy", cwd=tmp_path)
    assert missing.returncode == 2
    assert "did you mean emoji" in missing.stderr


@pytest.mark.slow
def test_wheel_exports_what_stock_diffusers_opens(bin_folder: Path, tmp_path: Path) -> None:
    packed = run(bin_folder, "export", "pack", "latentdiff-mini", "--out=packed", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "packed")
    stock.set_progress_bar_config(disable=True)
    image = stock("a cat", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()
    dry = run(bin_folder, "export", "push", "packed", "me/mini", "--dry_run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "me/mini" in dry.stdout
