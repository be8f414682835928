"""Models that ship: known by name wherever a folder is, packed small, whole when installed."""

import configparser
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_pipeline import sd1_shaped, tiny_pipeline, tiny_safety_checker
from fakes_scripts import run_script
from fakes_training import make_config, make_world
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffPipeline
from latentdiff.config.options import EvalModelOptions, SampleOptions
from latentdiff.evaluation.eval_set import open_eval_model
from latentdiff.models.components import load_components, load_vae
from latentdiff.models.model_path import ASSETS, BUNDLED, resolve_model
from latentdiff.models.weights import weights_hash
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info
from latentdiff.sampling import conversion, release
from latentdiff.sampling.conversion import export_single_file
from latentdiff.sampling.release import VOCABULARY, pack_model
from latentdiff.sampling.sample import sample
from latentdiff.training.text_to_image.train_t2i import train

PACKAGE = ASSETS.parent
MINI = "latentdiff-mini"
SHARD_MB = 0.02  # so that the tiny U-Net has several
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a run leaves it, with a local path in a config and in its info."""
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    pipe = tiny_pipeline()
    pipe.model_info = ModelInfo(
        base_model="/home/me/runs/base", dataset="shapes", caption_dropout=0.1, guidance_scale=4.0
    )
    pipe.save_pretrained(folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "/home/me/vae"}))
    return folder


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    """The same, as it would ship: never write into it."""
    pack_model(model, model.parent / "packed", max_file_mb=SHARD_MB, max_total_mb=1)
    return model.parent / "packed"


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A packed model to be damaged."""
    pack_model(model, tmp_path / "copy", max_file_mb=SHARD_MB, max_total_mb=1)
    return tmp_path / "copy"


@pytest.fixture
def mini(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packed tiny model under the shipped one's name."""
    monkeypatch.setitem(BUNDLED, MINI, packed)
    return packed


def test_model_says_what_guidance_calls_take_by_default(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    pack_model(tmp_path / "plain", tmp_path / "packed", guidance_scale=3.0)
    for name, expected in (("plain", 7.5), ("packed", 3.0)):
        opened = LatentDiffPipeline.from_pretrained(tmp_path / name)
        opened("a cat", num_inference_steps=1, output_type="latent")
        assert opened.guidance_scale == expected
        options = SampleOptions(out=str(tmp_path / f"{name}-images"), num_inference_steps=1)
        generated = next(sample(str(tmp_path / name), ["a cat"], options))
        assert (generated["kind"], generated["guidance_scale"]) == ("image", expected)
        opened("a cat", num_inference_steps=1, output_type="latent", guidance_scale=2.0)
        assert opened.guidance_scale == 2.0


def test_packed_model_is_half_as_large_in_shards_and_float32_in_memory(
    model: Path, packed: Path
) -> None:
    shards = sorted((packed / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    for path in packed.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.float16}  # noqa: SIM118
    before, after = load_components(model), load_components(packed)
    for name in PARTS:
        wanted, found = (getattr(parts, name).state_dict() for parts in (before, after))
        for key, tensor in found.items():
            assert tensor.dtype in (torch.float32, torch.int64)
            assert torch.equal(tensor, wanted[key].to(torch.float16).to(tensor.dtype))
    stock = StableDiffusionPipeline.from_pretrained(packed)
    assert weights_hash(stock.unet) == weights_hash(after.unet)


def test_packed_model_tells_nothing_of_this_machine(packed: Path, model: Path) -> None:
    texts = [path for path in packed.rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) > 6
    for path in texts:
        content = path.read_text(encoding="utf-8")
        assert "/home/" not in content
        assert str(model.parent) not in content
    info = read_model_info(packed)
    assert (info.base_model, info.dataset, info.caption_dropout) == ("base", "shapes", 0.1)
    assert "# packed" in (packed / "README.md").read_text()


def test_what_cannot_be_packed_is_said_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"MB in all, .* expected at most 0\.01"):
        pack_model(model, out, max_total_mb=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(release, "HEADER", 0)
        with pytest.raises(ValueError, match=r"MB in \S+, expected at most 45 and 0\.001"):
            pack_model(model, out, max_file_mb=0.001)
    with pytest.raises(ValueError, match="dtype=int8"):
        pack_model(model, out, dtype="int8")
    pipe = LatentDiffPipeline.from_pretrained(model)
    pipe.unet.conv_in.bias.data[0] = 1e6
    pipe.unet.register_to_config(made_by="/home/me/train.py")
    pipe.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"conv_in\.bias of the unet is not finite"):
        pack_model(tmp_path / "large", out)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    card = tmp_path / "card.md"
    card.write_text("# A card")
    pack_model(model, out, card=card)
    assert (out / "README.md").read_text() == "# A card"
    with pytest.raises(ValueError, match="already exists"):
        pack_model(model, out)


def test_path_in_a_config_is_refused(model: Path, tmp_path: Path) -> None:
    pipe = LatentDiffPipeline.from_pretrained(model)
    pipe.scheduler.register_to_config(trained_betas_from="/home/me/betas.json")
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"scheduler_config\.json names /home/me/betas\.json"):
        pack_model(tmp_path / "model", tmp_path / "out")


def test_damaged_shards_are_named(copy: Path) -> None:
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted((copy / "unet").glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in (*shards, index)}

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LatentDiffPipeline.from_pretrained(copy)
        for path, content in whole.items():
            path.write_bytes(content)

    shards[1].unlink()
    fails(f"lacks {re.escape(shards[1].name)}, which .*index")
    shards[1].write_bytes(whole[shards[1]][:-10])
    fails(f"{re.escape(shards[1].name)} is not a whole safetensors file")
    shards[0].write_bytes(b"")
    fails(f"{re.escape(shards[0].name)} is not a whole")
    weights = load_file(shards[0])
    lost = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != lost}, shards[0], {"format": "pt"})
    fails(f"missing: {re.escape(lost)}")
    index.unlink()
    fails("is a shard, and .* has no diffusion_pytorch_model.safetensors.index.json")
    for content in ("{", '{"metadata": {}}', "[]"):
        index.write_text(content)
        fails(r"index\.json is no readable index of shards")
    for path in shards:
        path.unlink()
    fails("lacks diffusion_pytorch_model-00001-of-")
    assert LatentDiffPipeline.from_pretrained(copy).unet is not None


def test_names_are_known_wherever_a_model_is(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = weights_hash(load_components(mini).unet)
    pipe = LatentDiffPipeline.from_pretrained(MINI)
    assert weights_hash(pipe.unet) == wanted
    assert pipe.model_info.dataset == "shapes"
    assert weights_hash(load_vae(MINI)) == weights_hash(pipe.vae)
    assert run_script("sample.py", MINI, "a cat", "--steps", 1, "--out", tmp_path / "cat.png") == 0
    world = make_world(tmp_path)
    eval_model = open_eval_model(MINI, EvalModelOptions(data=str(world / "data"), num_heldout=2))
    assert weights_hash(eval_model.components.unet) == wanted
    assert resolve_model("me/cats") == Path("me/cats")
    assert resolve_model("./latentdiff-mini") != mini


def test_missing_asset_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(BUNDLED, MINI, tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="latentdiff-mini is not in this installation"):
        LatentDiffPipeline.from_pretrained(MINI)


def test_shipped_model_is_fine_tuned_and_its_parts_are_built_upon(
    mini: Path, tmp_path: Path
) -> None:
    world = make_world(tmp_path)
    steps = {"train__max_steps": 1, "train__ema": False}
    tuned = {"model__pretrained": MINI, "model__vae": ""} | steps
    assert train(make_config(world, tmp_path / "tuned", **tuned)) == 0
    info = read_model_info(tmp_path / "tuned" / "pipeline")
    assert (info.base_model, info.caption_dropout, info.guidance_scale) == (MINI, 0.1, 4.0)
    built = {"model__vae": MINI, "model__text_encoder": MINI} | steps
    assert train(make_config(world, tmp_path / "built", **built)) == 0
    after = load_components(tmp_path / "built" / "pipeline")
    assert weights_hash(after.text_encoder) == weights_hash(load_components(mini).text_encoder)


def test_sharded_folder_becomes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sd1_shaped()
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size=10_000)
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    monkeypatch.setattr(conversion, "CLIP_VOCABULARY", len(pipe.tokenizer))
    files = [
        export_single_file(tmp_path / name, tmp_path / f"{name}.safetensors")
        for name in ("whole", "shards")
    ]
    one, other = (load_file(path) for path in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_installation_has_every_file_of_the_assets() -> None:
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    globs = setup["options.package_data"]["latentdiff"].split()
    packaged = {path for glob in globs for path in PACKAGE.glob(glob) if path.is_file()}
    files = {path for path in ASSETS.rglob("*") if path.is_file()}
    assert files
    assert files <= packaged


@pytest.mark.parametrize("name", BUNDLED)
def test_shipped_model_is_small_complete_and_without_local_paths(name: str) -> None:
    folder = BUNDLED[name]
    if not folder.is_dir():
        pytest.skip(f"{folder.relative_to(PACKAGE.parent)} is not there")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 15_000_000
    assert sum(path.stat().st_size for path in files) <= 45_000_000
    assert (folder / "README.md").is_file()
    if (tokenizer := folder / "tokenizer").is_dir():
        # the form of transformers 4 as well
        assert {"tokenizer.json", "vocab.json", "merges.txt"} < {
            p.name for p in tokenizer.iterdir()
        }
    for path in files:
        if path.suffix in (".json", ".md") and path.name not in VOCABULARY:
            assert not re.search(r"[\"'\s(=\[](/|~/)\w+/", path.read_text(encoding="utf-8")), path
    vae = load_vae(name)
    assert all(bool(tensor.isfinite().all()) for tensor in vae.state_dict().values())


def test_mini_draws_what_it_is_asked_for_offline() -> None:
    if not BUNDLED[MINI].is_dir():
        pytest.skip("the small model is not there")
    pipe = LatentDiffPipeline.from_pretrained(MINI)
    pipe.set_progress_bar_config(disable=True)
    prompts = [
        "a large red circle on a black background",
        "a large blue circle on a white background",
    ]
    red, blue = pipe(prompts, seed=[0, 1], num_inference_steps=10, guidance_scale=3.0).images
    assert red.size == (128, 128)
    dark, light = (sum(image.getpixel((1, 1))) for image in (red, blue))
    assert dark < 200
    assert light > 500


@pytest.mark.parametrize("folder", ["bundled", "packed", "half"])
def test_stock_opens_every_stored_model_without_a_dtype_and_generates_our_image(
    folder: str, packed: Path, tmp_path: Path
) -> None:
    if folder == "half":
        checked = tiny_pipeline(**tiny_safety_checker()).to(torch.float16)
        checked.save_pretrained(tmp_path)
    path = {"bundled": BUNDLED[MINI], "packed": packed, "half": tmp_path}[folder]
    stock, ours = (
        StableDiffusionPipeline.from_pretrained(path),
        LatentDiffPipeline.from_pretrained(path),
    )
    assert {stock.unet.dtype, stock.vae.dtype, stock.text_encoder.dtype} == {torch.float32}
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 4.0}
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = stock("a cat", generator=generators[0], **call)
    image = ours("a cat", generator=generators[1], **call)
    assert abs(image.images - expected.images).max() <= 1 / 255
    half = StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float16)
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}
