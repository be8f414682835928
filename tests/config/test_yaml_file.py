"""Settings files of hostile or mistaken content: refused at once, by file, line and name."""

from pathlib import Path

import pytest

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import load_config
from latentdiff.config.vae import VaeConfig

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases stand for more than"),
        ("train: &a {seed: 1, x: *a}", "line 1: an alias that contains itself"),
        ("data: " + "[" * 5000 + "]" * 5000, "more than 20 levels"),
        ("train:\n  seed: 1\n  seed: 2\n", "line 3: seed is given twice, first in line 2"),
        ("train: {seed: 1}\ntrain: {max_steps: 2}\n", "train is given twice"),
        ("train: {seed: 1}\ntrain.seed: 2\n", "train.seed twice"),
        ("train: {precision: bf16, mixed_precision: fp32}\n", "train.precision"),
        ("? [1]\n: 2\n", "no name of a setting"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("train: 3\n", "section"),
        ("data:\n", "section|null"),
        ("output_dir: null\n", "output_dir"),
        ("output_dir: ''\n", "output_dir"),
        ("a: !!python/object/apply:os.system ['x']\n", "not YAML"),
        ("a: 2001-13-01\n", "not YAML"),
        ("x: '" + "a" * 2_000_000 + "'", "more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_must_not_be_built_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", [VaeConfig, ClipConfig])
def test_no_recipe_writes_into_a_folder_named_null(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ValueError, match="output_dir=null, expected the name of a folder"):
        load_config(path, ["--output_dir=null"], kind=kind)
    assert load_config(path, ["--output_dir=./null"], kind=kind).output_dir == "./null"


def test_a_plain_alias_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("finetune: {instance_prompts: &p [a dog]}\npreview: {prompts: *p}\n")
    assert load_config(path).preview.prompts == ("a dog",)


@pytest.mark.parametrize(
    "option",
    [
        "data.background=[256,0,0]",
        "data.background=null",
        "data.resolution=1000000",
        "data.num_workers=-1",
        "diffusion.beta_start=-1",
        "diffusion.beta_start=0.5",
        "diffusion.beta_end=1.5",
        "model.unet.block_out_channels=[]",
        "model.unet.block_out_channels=[0,1,2,3]",
        "model.unet.block_out_channels=[33,64,64,64]",
        "model.text.width=255",
        "preview.prompts=['']",
        "preview.num_steps=2000",
        "preview.guidance_scale=-1",
        "train.learning_rate=1e10",
        "train.learning_rate=-1",
        "output_dir=null",
        "output_dir=",
        "output_dir=''",
        "output_dir= ",
        "output_dir=~",
        "data.cache_dir=null",
        "data.cache_dir=",
        "train.seed=99999999999999999999",
    ],
)
def test_a_number_that_would_fail_late_is_refused_by_name(tmp_path: Path, option: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: run\n")
    name = option.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ValueError, match=name):
        load_config(path, [f"--{option}"])


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (VaeConfig, "block_out_channels=[]"),
        (VaeConfig, "norm_num_groups=7"),
        (VaeConfig, "learning_rate=-1"),
        (VaeConfig, "ema_decay=2"),
        (ClipConfig, "width=0"),
        (ClipConfig, "head_dim=7"),
        (ClipConfig, "patch_size=7"),
        (ClipConfig, "batch_size=1"),
    ],
)
def test_the_other_recipes_have_ranges_too(tmp_path: Path, kind: type, option: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: run\n")
    with pytest.raises(ValueError, match="expected"):
        load_config(path, [f"--{option}"], kind=kind)
