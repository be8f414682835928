"""What a run exports is for others: readable to them, by any transformers, and without our paths.

Holds for all that training, merging and packing write to be shared.
"""

import json
import stat
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from fakes_finetune import finetuning, generate, open_ours, world
from safetensors import safe_open

from latentdiff.pipeline.png_metadata import read_settings, save_png
from latentdiff.sampling.conversion import merge_loras
from latentdiff.sampling.release import pack_model
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
}
ORDINARY = {"train__max_steps": 1, "train__train_text_encoder": "true"}
METHODS = {
    "full": {},
    "lora": {"finetune__method": "lora", "finetune__lora_kohya": "true"},
    "word": {
        "finetune__method": "textual_inversion",
        "finetune__token": "<toy>",
        "finetune__initializer_token": "circle",
        "finetune__instance_prompts": '["a photo of <toy>"]',
        "train__train_text_encoder": "false",
    },
}
FOLDERS = ["scratch", "full", "lora", "word", "merged", "packed"]


@pytest.fixture(scope="module")
def shared(world: Path) -> Path:
    """Everything exported from runs on a base model at an absolute path, in one folder."""
    shared = world / "shared"
    shared.mkdir()
    (world / "base" / "pipeline").rename(shared / "scratch")
    (world / "base" / "pipeline").symlink_to(shared / "scratch")
    for name, settings in METHODS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        run = world / name
        assert train(finetuning(world, run, **(ORDINARY | settings))) == 0
        (run / "pipeline").rename(shared / name)
        (run / "samples").rename(shared / f"{name}-samples")
        for path in (*run.glob("lora*"), *run.glob("learned_embeds*")):
            path.rename(shared / f"{name}-{path.name}")
    merge_loras(shared / "scratch", [shared / "lora-lora"], shared / "merged")
    pack_model(shared / "full", shared / "packed")
    image = open_ours(shared / "full")("a cat", num_inference_steps=1, seed=0).images[0]
    save_png(image, shared / "image.png")
    return shared


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_has_both_forms_of_its_tokenizer(shared: Path, name: str) -> None:
    files = {path.name for path in (shared / name / "tokenizer").iterdir()}
    assert files == TOKENIZER | ({"added_tokens.json"} if name == "word" else set())


@pytest.mark.parametrize("name", FOLDERS)
def test_every_text_weight_begins_as_in_stable_diffusion(shared: Path, name: str) -> None:
    (path,) = (shared / name / "text_encoder").glob("*.safetensors")
    with safe_open(path, "pt") as tensors:
        names = list(tensors.keys())
    assert len(names) > 10
    assert [one for one in names if not one.startswith("text_model.")] == []


def test_files_are_open_to_those_whom_the_umask_lets_in(shared: Path) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in shared.rglob("*")}
    assert sum(path.suffix == ".safetensors" for path in modes) > 20
    (shared / "plain").touch()
    mode = stat.S_IMODE((shared / "plain").stat().st_mode)
    (shared / "plain").unlink()
    assert [path for path, found in modes.items() if path.is_file() and found != mode] == []


def test_no_byte_tells_a_path_of_this_machine(shared: Path, world: Path) -> None:
    files = [path for path in shared.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        content = path.read_bytes()
        for secret in (str(world), world.name, str(Path.home()), str(Path.cwd())):
            assert secret.encode() not in content, path


def test_what_was_a_path_is_named_by_its_last_part(shared: Path) -> None:
    info = json.loads((shared / "lora" / "latentdiff.json").read_text())
    assert info["base_model"] == "base"
    assert "| Base model | base |" in (shared / "lora" / "README.md").read_text()
    assert "base_model" not in (shared / "lora" / "README.md").read_text()  # no id of the hub
    assert read_settings(shared / "image.png")["model"]["name"] == "full"


def test_exported_folders_open_and_generate(shared: Path) -> None:
    for name in FOLDERS:
        assert generate(open_ours(shared / name)).isfinite().all()
