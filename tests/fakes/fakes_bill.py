"""A data folder, a base and a model with its bill of materials, of a few numbers each."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes_data import save_image, write_jsonl
from safetensors.numpy import save_file

from latentdiff.audit.verify import Given, verify
from latentdiff.config.data import DataConfig
from latentdiff.config.finetune import FinetuneConfig
from latentdiff.config.model import ModelConfig
from latentdiff.config.text_to_image import Config
from latentdiff.training.bill.materials import Materials, gather_materials, read_data_folders

NAMES = [*("a/0.png", "a/1.png", "a/2.png", "a/é3.png"), *(f"b/{i}.png" for i in range(4))]
CAPTIONS = {name: [f"one of {name}", f"café {name}"] for name in NAMES}
MACHINE = {"cpu": "one", "device": "cpu", "num_threads": 1, "num_processes": 1}


def write_weights(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"b": rng.normal(size=(3, 4)).astype("f4"), "a": np.ones(2, "f2")}, path)


def write_rows(root: Path, captions: dict[str, list[str]]) -> None:
    rows = [{"file_name": name, "text": texts} for name, texts in captions.items()]
    write_jsonl(root / "metadata.jsonl", rows)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, base/, and model/ and lora_kohya.safetensors with the bill of a run on them."""
    origin = tmp_path_factory.mktemp("origin")
    for seed, name in enumerate(CAPTIONS):
        save_image(origin / "data" / name, seed)
    write_rows(origin / "data", CAPTIONS)
    for part, seed in (("unet", 1), ("vae", 2)):
        write_weights(origin / "base" / part / "diffusion_pytorch_model.safetensors", seed)
        write_weights(origin / "model" / part / "diffusion_pytorch_model.safetensors", seed + 5)
    for name in ("model", "base"):
        (origin / name / "scheduler").mkdir()
        (origin / name / "scheduler" / "scheduler_config.json").write_text('{"a": 1}\n')
    (origin / "model" / "tokenizer").mkdir()
    (origin / "model" / "tokenizer" / "merges.txt").write_text("a b\nc d\n")
    write_weights(origin / "lora_kohya.safetensors", 9)
    materials = materials_of(origin)
    materials.attach_to_folder(origin / "model", artifact="pipeline")
    materials.attach_to_file(origin / "lora_kohya.safetensors")
    return origin


def config_of_origin(
    origin: Path,
    *,
    finetune: FinetuneConfig | None = None,
    model: ModelConfig | None = None,
    **changes: object,
) -> Config:
    """Return the settings of a run on these folders. changes: of its data."""
    data = DataConfig(
        root=str(origin / "data"), cache_dir=str(origin / "cache"), heldout_fraction=0.3
    )
    return Config(
        data=replace(data, **changes),
        model=model or ModelConfig(pretrained=str(origin / "base")),
        finetune=finetune or FinetuneConfig(),
    )


def materials_of(
    origin: Path,
    *,
    finetune: FinetuneConfig | None = None,
    model: ModelConfig | None = None,
    how: dict[str, object] | None = None,
    **changes: object,
) -> Materials:
    """Return what a run on these folders is made of. how: of gather_materials."""
    config = config_of_origin(origin, finetune=finetune, model=model, **changes)
    given = {"machine": MACHINE} | (how or {})
    return gather_materials(config, read_data_folders(config), **given)


@pytest.fixture
def copy(origin: Path, tmp_path: Path) -> Path:
    return shutil.copytree(origin, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cache"))


def answers(copy: Path, model: str = "model", **options: object) -> dict[str, str]:
    given = {"data": [str(copy / "data")], "bases": {"": str(copy / "base")}} | options
    verdict = verify(str(copy / model), Given(**given))
    assert verdict.is_proven == ("differs" not in {one.answer for one in verdict.findings})
    return {one.part: one.answer for one in verdict.findings}


def details(copy: Path, part: str) -> list[str]:
    given = Given([str(copy / "data")], {"": str(copy / "base")})
    verdict = verify(str(copy / "model"), given)
    return [line for one in verdict.findings if one.part == part for line in one.details]
