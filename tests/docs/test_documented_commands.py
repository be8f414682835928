"""Every command and every piece of Python in README and docs runs, on tiny stand-ins."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes_app import write_run
from fakes_clip import random_clip
from fakes_data import save_image
from fakes_docs import (
    NOT_RUN,
    PROGRAMS,
    ROOT,
    Block,
    blocks,
    check_command,
    commands,
    inline_commands,
    options_of,
    pages,
    reason_not_to_run,
    run_command,
)
from fakes_models import make_components, make_vae, save_folder
from fakes_pipeline import tiny_tokenizer
from transformers import CLIPTokenizer, ViTConfig, ViTModel

from latentdiff.cli.main import COMMANDS
from latentdiff.config.yaml_file import shipped_configs
from latentdiff.data import shape_pairs, shapes
from latentdiff.data.shape_pairs import write_shape_pairs
from latentdiff.data.shapes import write_shapes
from latentdiff.models import components
from latentdiff.models.build import make_ddpm_scheduler

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages()}
LANGUAGES = {"python", "sh", "text", "yaml"}
RUNNABLE = [name for name, text in PAGES.items() if "```sh" in text or "```python" in text]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """What the pages take as given: folders of images, runs, a base model, networks."""
    root = tmp_path_factory.mktemp("documented")
    torch.manual_seed(0)
    for name in ("photos", "subject", "style"):
        for i in range(12):
            save_image(root / name / f"{i}.png", i).with_suffix(".txt").write_text(f"a photo, {i}")
    write_shapes(root / "more-photos", num_train=12, num_test=4, size_px=32)
    model = make_components(tokenizer)
    save_folder(replace(model, scheduler=make_ddpm_scheduler(num_timesteps=64)), root / SD15)
    for name in ("mine", "other"):
        run = write_run(root / "runs" / name, {10: 0.5, 20: 0.4})
        shutil.copytree(root / SD15, run / "pipeline")
    shutil.copytree(root / SD15, root / "demo-scratch-run" / "model" / "pipeline")
    make_vae().save_pretrained(root / "vae")
    for name in ("clip", "features"):
        random_clip().save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    dino = ViTModel(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    dino.save_pretrained(root / "dino")
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user who reads one page, in which the models that ship are small."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gradio.Blocks.launch", lambda *_, **__: None)  # it would serve for ever
    monkeypatch.setitem(components.BUNDLED, "latentdiff-mini", world / SD15)
    monkeypatch.setitem(components.BUNDLED, "latentdiff-vae", world / "vae")
    monkeypatch.setattr(shapes, "write_shapes", write_few_shapes)
    monkeypatch.setattr(shape_pairs, "write_shape_pairs", write_few_pairs)
    return folder


def write_few_shapes(root: str, *, num_train: int = 12, num_test: int = 8, **options: Any) -> Path:
    """Write a page's folder of shapes with some of its images."""
    return write_shapes(root, num_train=min(num_train, 12), num_test=min(num_test, 8), **options)


def write_few_pairs(root: str, kind: Any) -> Path:
    """Write a page's folder of pairs with some of its images."""
    return write_shape_pairs(root, kind, num_train=12, num_test=2, size_px=32)


@pytest.mark.parametrize("name", RUNNABLE)
def test_page_runs_from_top_to_bottom(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(PAGES[name], name):
        run_block(block, capsys)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_names_its_language_and_only_sh_has_commands(name: str) -> None:
    fences = re.findall(r"^[ \t]*```.*$", PAGES[name], re.MULTILINE)
    found = [*blocks(PAGES[name], name)]
    assert [f"```{block.kind}" for block in found] == fences[::2]
    for block in found:
        where = f"{name}, line {block.line}"
        assert block.kind in LANGUAGES, f"{where}: a block of {block.kind or 'no language'}"
        if block.kind == "text":
            starts = {line.partition(" ")[0] for line in block.text.splitlines()}
            assert not starts & set(PROGRAMS), f"{where}: commands go into a block of sh"


def test_every_command_that_is_not_run_is_in_docs_and_has_its_reason() -> None:
    for page, reasons in NOT_RUN.items():
        found = [" ".join(words) for one in blocks(PAGES[page], page) for words in commands(one)]
        for begin, reason in reasons.items():
            assert reason, (page, begin)
            assert any(text.startswith(begin) for text in found), (page, begin)


def run_block(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block's commands, or its Python. Fails with the place and what was printed."""
    if block.kind == "python":
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})
    for words in commands(block) if block.kind == "sh" else ():
        capsys.readouterr()
        try:
            is_run = not reason_not_to_run(words, block.page)
            (run_command if is_run else check_command)(words)
        except (AssertionError, Exception) as error:
            shown = "".join(capsys.readouterr())[-2000:]
            where = f"{block.page}, line {block.line}: {' '.join(words)}"
            raise AssertionError(f"{where}: {error}\n{shown}") from error


INLINE = [(name, command) for name, text in PAGES.items() for command in inline_commands(text)]


@pytest.mark.parametrize(("name", "command"), INLINE)
def test_command_named_in_prose_exists_with_its_options(name: str, command: str) -> None:
    if not command.startswith("latentdiff "):
        check_command(shlex.split(command.replace(" ...", "")))
        return
    words = [word for word in command.split()[1:] if word != "..."]
    two, one = " ".join(words[:2]), words[0]
    if one in ("COMMAND", "--help", "--version"):
        return
    known = two if two in COMMANDS else one
    assert known in COMMANDS, f"{name}: {command}"
    options = set(re.findall(r"(?<=\s--)[\w.]+", command)) - {"help", "config", "print_config"}
    assert options <= options_of(known), f"{name}: {command}"
    config = re.search(r"--config[= ](\w+)", command)
    is_known = config is None or config[1].isupper() or config[1] in shipped_configs()
    assert is_known, f"{name}: {command}"


@pytest.mark.parametrize(
    "command",
    [
        "latentdiff tarin --config demo",
        "latentdiff sample latentdiff-mini 'a cat' --steppes 2 --out a.png",
        "latentdiff inspect no-such-folder",
        "make coffee",
        "pip install 'latentdiff[nothing]'",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_found(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match=r"page\.md, line 3: "):
        run_block(Block("page.md", 3, "sh", command), capsys)
