"""The built wheel alone, outside the clone, in an environment that sees the tests' packages."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


def run(bin_folder: Path, *arguments: str, cwd: Path) -> Any:
    """Run `latentdiff` as installed, from a folder outside the clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(bin_folder / "latentdiff"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_wheel_has_the_command_its_configs_and_type_information(
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


@pytest.mark.slow
def test_wheel_trains_with_a_config_by_its_name(bin_folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
        (photos / f"{index}.txt").write_text("a photo of noise", encoding="utf-8")
    settings = ["--data.root=photos", "--train.max_steps=1", "--train.batch_size=2"]
    settings += ["--output_dir=run", "--preview.every_steps=0"]
    done = run(bin_folder, "train", "--config", "demo", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    missing = run(bin_folder, "train", "--config", "emojy", cwd=tmp_path)
    assert missing.returncode == 2
    assert "did you mean emoji" in missing.stderr
