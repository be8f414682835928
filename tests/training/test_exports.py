"""What a run exports: for others to read, by any transformers, its facts, and the same each time.

Holds for all that training, merging and packing write to be shared.
"""

import hashlib
import json
import stat
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from fakes_finetune import finetuning, generate, open_ours, world
from fakes_models import make_tiny_vae
from fakes_training import make_config, read_metrics
from safetensors import safe_open
from safetensors.torch import load_file
from test_finetune import stopping_after

from latentdiff.atomic import atomic_folder
from latentdiff.config.io import load_config
from latentdiff.config.text_to_image import Config
from latentdiff.pipeline.files.file_metadata import tensors_hash
from latentdiff.pipeline.files.model_card import model_card
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info
from latentdiff.pipeline.png_metadata import read_settings, save_png
from latentdiff.sampling.conversion import merge_loras
from latentdiff.sampling.release import pack_model
from latentdiff.training.inputs.sources import read_data
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
}
ORDINARY = {
    "train__max_steps": 1,
    "train__train_text_encoder": "true",
    "diffusion__caption_dropout": 0,
}
METHODS = {
    "full": {},
    "lora": {
        "finetune__method": "lora",
        "finetune__lora_kohya": "true",
        "finetune__instance_prompts": '["a photo of sks"]',
    },
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
    with atomic_folder(shared / "scratch" / "vae_tiny") as folder:
        make_tiny_vae().save_pretrained(folder)
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


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tiny_vae_that_the_base_carries_is_taken_along(shared: Path, name: str) -> None:
    path = Path("vae_tiny") / "diffusion_pytorch_model.safetensors"
    assert (shared / name / path).read_bytes() == (shared / "scratch" / path).read_bytes()


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
    secrets = {str(world), world.name, str(Path.home()), str(Path.cwd())} - {"/"}
    for path in files:
        content = path.read_bytes()
        for secret in secrets:
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


@pytest.mark.parametrize("name", METHODS)
def test_facts_of_a_fine_tune_are_those_of_its_run(shared: Path, world: Path, name: str) -> None:
    config, base = (config_of(world / run) for run in (name, "base"))
    info, steps = read_model_info(shared / name), config.train.max_steps
    assert (info.steps, info.base_model) == (steps, "base")
    assert (info.dataset, info.resolution) == (Path(config.data.root).name, config.data.resolution)
    assert (info.caption_dropout, info.base_caption_dropout) == (
        config.diffusion.caption_dropout,
        base.diffusion.caption_dropout,
    )
    assert info.caption_dropout != info.base_caption_dropout
    num_images = len(read_data(config.data)[1])
    assert info.metrics["num_heldout_images"] == num_images
    assert info.metrics["num_heldout_draws"] == min(config.eval.num_heldout, max(num_images, 64))
    assert info.metrics["heldout_loss"] == read_metrics(world / name, "heldout_loss")[steps]
    card = (shared / name / "README.md").read_text()
    assert f"\n# {name}\n" in card
    assert f"| Training steps | {steps} |" in card
    assert f"| Caption dropout | {config.diffusion.caption_dropout} |" in card
    assert f"| Caption dropout of the base model | {base.diffusion.caption_dropout} |" in card


def test_facts_of_a_new_model_are_those_of_its_run(shared: Path, world: Path) -> None:
    config, info = config_of(world / "base"), read_model_info(shared / "scratch")
    assert (info.steps, info.base_model) == (config.train.max_steps, None)
    assert info.caption_dropout == info.null_caption_dropout == config.diffusion.caption_dropout
    card = (shared / "scratch" / "README.md").read_text()
    assert "\n# base\n" in card
    assert "| Base model | none: trained from scratch |" in card


def test_files_of_adapters_name_the_words_that_call_for_them(shared: Path) -> None:
    files = ("lora-lora/pytorch_lora_weights", "lora-lora_kohya", "word-learned_embeds")
    found = {}
    for name in files:
        with safe_open(shared / f"{name}.safetensors", "pt") as file:
            found[name] = file.metadata()
    phrases = [entries["modelspec.trigger_phrase"] for entries in found.values()]
    assert phrases == ["a photo of sks", "a photo of sks", "<toy>"]
    kinds = [entries["modelspec.architecture"].partition("/")[2] for entries in found.values()]
    assert kinds == ["lora", "lora", "textual-inversion"]
    kohya = found["lora-lora_kohya"]
    weights = load_file(shared / "lora-lora_kohya.safetensors")
    assert kohya["sshs_model_hash"] == tensors_hash(weights)
    assert kohya["ss_v_parameterization"] in ("True", "False")


def test_a_merged_model_has_the_facts_of_the_merge_and_none_of_its_base(shared: Path) -> None:
    base, merged = (read_model_info(shared / name) for name in ("scratch", "merged"))
    assert merged == ModelInfo(
        base_model="scratch",
        base_caption_dropout=base.caption_dropout,
        prediction_type=base.prediction_type,
        resolution=base.resolution,
        loras={"lora-lora": 1.0},
    )
    card = (shared / "merged" / "README.md").read_text()
    assert "\n# merged\n" in card
    assert "| LoRAs merged in | lora-lora x 1 |" in card
    assert "Training steps" not in card
    assert "\n# packed\n" in (shared / "packed" / "README.md").read_text()
    assert "| Base model | not recorded |" in model_card(ModelInfo(), name="unknown")


def test_guidance_is_warned_of_only_where_no_training_dropped_captions() -> None:
    for own, base, known in ((0.0, 0.1, 0.1), (0.0, 0.0, 0.0), (0.0, None, None), (0.1, None, 0.1)):
        info = ModelInfo(base_model="a", caption_dropout=own, base_caption_dropout=base)
        assert info.null_caption_dropout == known


@pytest.mark.parametrize("method", ["scratch", "word"])
def test_an_export_is_the_same_again_and_after_a_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def export(run: Path) -> dict[str, str]:
        """Train two steps, or only export where that is done; return the hash of every file."""
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {"train__max_steps": 2, "preview__num_nearest": 0}
        settings |= {"data__cache_dir": tmp_path / "cache"}  # captions are tokenised once alone
        if method == "scratch":
            config = make_config(world, run, **settings)
        else:
            config = finetuning(world, run, **(METHODS[method] | settings))
        train(config)
        files = [path for path in (run / "pipeline").rglob("*") if path.is_file()]
        return {
            str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    first = export(tmp_path / "a" / "run")
    assert "pipeline/tokenizer/tokenizer.json" in first
    assert export(tmp_path / "a" / "run") == first
    with monkeypatch.context() as patch:
        stopping_after(patch, 1)
        assert not export(tmp_path / "b" / "run")  # stopped before its end
    assert export(tmp_path / "b" / "run") == first


def config_of(run: Path) -> Config:
    return load_config(run / "config.yaml", kind=Config)
