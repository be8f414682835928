"""Ways into and out of files: complete, safetensors only, and open to stock diffusers."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline
from fakes_pipeline import (
    SIZE,
    ddim,
    lora_weights,
    sd1_shaped,
    tiny_components,
    tiny_pipeline,
    tiny_safety_checker,
    tiny_unet,
    tiny_vae,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.models.components import load_components
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info, write_model_info
from latentdiff.pipeline.files.single_file import save_single_file
from latentdiff.sampling.open_pipeline import open_pipeline

CALL = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def images_of(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL | {"seed": 1} | changes).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("suffix", [str, lambda path: path])
def test_saved_pipeline_loads_equal(saved, suffix):
    loaded = LatentDiffPipeline.from_pretrained(suffix(saved))
    assert np.array_equal(images_of(loaded), images_of(tiny_pipeline()))
    assert loaded.unet.dtype == torch.float32
    assert not loaded.unet.training


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_is_chosen_at_loading(saved, name):
    loaded = LatentDiffPipeline.from_pretrained(saved, **{name: torch.bfloat16})
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.bfloat16}
    assert np.isfinite(images_of(loaded)).all()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "bfloat16"}, TypeError),
        ({"dtype": torch.float16, "torch_dtype": torch.bfloat16}, ValueError),
    ],
)
def test_a_dtype_that_is_none_or_two_is_refused(saved, options, error):
    with pytest.raises(error, match="dtype"):
        LatentDiffPipeline.from_pretrained(saved, **options)


def test_stock_opens_the_folder_where_latentdiff_cannot_be_imported(saved, tmp_path):
    code = f"""
import sys
sys.modules["latentdiff"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(saved)!r})
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__name__ == "StableDiffusionPipeline"
image = pipe("a cat", num_inference_steps=2, height={SIZE}, width={SIZE}, output_type="np",
             generator=torch.Generator().manual_seed(1)).images
np.save({str(tmp_path / "image.npy")!r}, image)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    expected = np.load(tmp_path / "image.npy")
    assert np.abs(images_of(LatentDiffPipeline.from_pretrained(saved)) - expected).max() <= 1 / 255


def test_variants_right_missing_and_wrong(tmp_path):
    pipe = tiny_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = LatentDiffPipeline.from_pretrained(tmp_path, variant="fp16")
    assert loaded.unet.dtype == torch.float32
    for wrong in (None, "bf16"):
        with pytest.raises(ValueError, match="no weights of variant"):
            LatentDiffPipeline.from_pretrained(tmp_path, variant=wrong)


def test_components_take_the_place_of_stored_ones(saved):
    scheduler, unet = EulerDiscreteScheduler.from_config(ddim().config), tiny_unet()
    loaded = LatentDiffPipeline.from_pretrained(saved, scheduler=scheduler, unet=unet)
    assert loaded.scheduler is scheduler
    assert loaded.unet is unet


def test_safety_checker_is_kept_or_left_out(tmp_path):
    tiny_pipeline(**tiny_safety_checker()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["requires_safety_checker"]
    kept = LatentDiffPipeline.from_pretrained(tmp_path)
    assert kept.safety_checker is not None
    without = LatentDiffPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert without.safety_checker is None
    assert without.config.requires_safety_checker is False
    with pytest.raises(ValueError, match="safety_checker needs a feature_extractor"):
        LatentDiffPipeline.from_pretrained(tmp_path, feature_extractor=None)


@pytest.mark.parametrize("name", [*tiny_components()])
def test_given_component_is_not_read_from_the_folder(tmp_path, name):
    """Whatever lies there: nothing, damage, or a class that only stock diffusers knows."""
    pipe = tiny_pipeline(**tiny_safety_checker())
    pipe.save_pretrained(tmp_path)
    for file in (tmp_path / name).rglob("*") if (tmp_path / name).is_dir() else ():
        file.write_bytes(b"\x80\x04 no file of any kind")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index[name] = ["diffusers", "AsymmetricAutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if name != "image_encoder":
        with pytest.raises((ValueError, FileNotFoundError, OSError)):
            LatentDiffPipeline.from_pretrained(tmp_path)
    none = {"safety_checker": None} if name == "feature_extractor" else {}
    assert (
        getattr(LatentDiffPipeline.from_pretrained(tmp_path, **none, **{name: None}), name) is None
    )
    given = getattr(pipe, name)
    assert getattr(LatentDiffPipeline.from_pretrained(tmp_path, **{name: given}), name) is given
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert getattr(LatentDiffPipeline.from_pretrained(tmp_path, **{name: given}), name) is given


def test_given_component_is_not_fetched_from_the_hub(saved, monkeypatch):
    asked = []
    download = "latentdiff.pipeline.files.loading.Download.download"
    monkeypatch.setattr(download, lambda repo_id, **options: asked.append(options) or str(saved))
    monkeypatch.setattr("latentdiff.pipeline.files.loading.hf_hub_download", lambda *_, **__: None)
    stock = {"safety_checker": None, "requires_safety_checker": False}
    loaded = LatentDiffPipeline.from_pretrained("someone/cats", **stock)
    assert loaded.safety_checker is None
    assert "safety_checker" in asked[0]


def test_other_pipelines_give_their_components():
    stock = StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False)
    ours = LatentDiffPipeline.from_pipe(stock)
    assert ours.unet is stock.unet
    again = StableDiffusionPipeline(**ours.components, **ours.parameters)
    assert again.unet is stock.unet


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cross_attention_dim"):
        tiny_pipeline(unet=tiny_unet(cross_attention_dim=24))
    with pytest.raises(ValueError, match="in_channels"):
        tiny_pipeline(unet=tiny_unet(in_channels=3))


def test_weights_on_meta_are_refused_by_name():
    with torch.device("meta"):
        unet = tiny_unet()
    with pytest.raises(ValueError, match=r"unet .*missing: conv_in"):
        tiny_pipeline(unet=unet)


def test_missing_weight_is_named(folder):
    weights = load_file(folder / UNET_WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / UNET_WEIGHTS)
    with pytest.raises(ValueError, match=r"unet .*missing: conv_in\.weight"):
        LatentDiffPipeline.from_pretrained(folder)


def test_extra_and_misshapen_weights_are_named(folder):
    weights = load_file(folder / UNET_WEIGHTS)
    save_file(weights | {"extra.weight": torch.zeros(1)}, folder / UNET_WEIGHTS)
    with pytest.raises(ValueError, match=r"not part of the model: extra\.weight"):
        LatentDiffPipeline.from_pretrained(folder)
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, folder / UNET_WEIGHTS)
    with pytest.raises(ValueError, match=r"conv_in\.bias is \(3,\), expected \(8,\)"):
        LatentDiffPipeline.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 4, 1000])
def test_truncated_weights_are_named(folder, length):
    path = folder / UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        LatentDiffPipeline.from_pretrained(folder)


def test_pickles_are_never_opened(folder):
    weights = folder / UNET_WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="pickle"):
        LatentDiffPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors"):
        LatentDiffPipeline.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_pipeline().save_pretrained(folder, safe_serialization=False)


@pytest.mark.parametrize("name", ["scheduler", "tokenizer", "vae"])
def test_missing_component_is_named(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        LatentDiffPipeline.from_pretrained(folder)


def test_folder_without_a_model_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        LatentDiffPipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LatentDiffPipeline.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    with pytest.raises(TypeError, match="torch_dtyp"):
        LatentDiffPipeline.from_pretrained(tmp_path, torch_dtyp=torch.float16)


def test_model_info_travels_with_the_folder_and_warn_of_guidance(tmp_path, caplog):
    pipe = tiny_pipeline()
    info = ModelInfo(caption_dropout=0.0, dataset="flowers", steps=10, metrics={"FD": 3.5})
    pipe.model_info = info
    pipe.save_pretrained(tmp_path)
    loaded = LatentDiffPipeline.from_pretrained(tmp_path)
    assert loaded.model_info == pipe.model_info
    images_of(loaded, guidance_scale=1)
    assert "caption dropout" not in caplog.text
    images_of(loaded, guidance_scale=2)
    assert "trained without caption dropout" in caplog.text


def test_hub_model_comes_with_its_info(saved, tmp_path, monkeypatch):
    fetched = shutil.copytree(saved, tmp_path / "snapshot")
    asked = []

    def model_info(repo_id, name, **where):
        asked.append((repo_id, name, where["revision"]))
        write_model_info(fetched, ModelInfo(steps=5))

    download = "latentdiff.pipeline.files.loading.Download.download"
    monkeypatch.setattr(download, lambda repo_id, **options: str(fetched))
    monkeypatch.setattr("latentdiff.pipeline.files.loading.hf_hub_download", model_info)
    loaded = LatentDiffPipeline.from_pretrained("someone/cats", revision="v2")
    assert asked == [("someone/cats", "latentdiff.json", "v2")]
    assert loaded.model_info.steps == 5
    assert loaded.config["_name_or_path"] == "someone/cats"


def test_info_of_other_versions_is_read_and_broken_info_is_named(tmp_path):
    assert read_model_info(tmp_path) == ModelInfo()
    write_model_info(tmp_path, ModelInfo(steps=3))
    path = tmp_path / "latentdiff.json"
    path.write_text(json.dumps({"steps": 3, "later": [1]}))
    assert read_model_info(tmp_path) == ModelInfo(steps=3)
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"latentdiff\.json"):
            read_model_info(tmp_path)


def test_model_card_names_what_is_known_and_escapes_it(tmp_path):
    pipe = tiny_pipeline()
    pipe.model_info = ModelInfo(
        dataset="<b>my|data</b>", licence="cc-by-4.0", metrics={"FD (n=100)": 3.5}
    )
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert r"\<b\>my\|data" in card
    assert "| FD \\(n=100\\) | 3.5 |" in card
    (tmp_path / "README.md").write_text("my own words")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_push_to_hub_uploads_the_folder_with_its_card(monkeypatch, caplog, capfd):
    caplog.set_level(0)
    uploaded = {}

    class Hub:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
            from pathlib import Path

            uploaded["files"] = sorted(file.name for file in Path(folder_path).iterdir())
            uploaded["card"] = (Path(folder_path) / "README.md").read_text()
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr("latentdiff.pipeline.files.loading.HfApi", Hub)
    pipe = tiny_pipeline()
    pipe.model_info = ModelInfo(dataset="flowers", steps=7)
    assert pipe.push_to_hub("cats", token="secret") == "https://hub/me/cats"
    assert {"README.md", "latentdiff.json", "model_index.json", "unet"} <= set(uploaded["files"])
    assert 'from_pretrained("me/cats")' in uploaded["card"]
    printed = uploaded["card"] + caplog.text + "".join(capfd.readouterr())
    assert uploaded["token"] == "secret"
    assert "secret" not in printed


def test_a_token_is_in_no_message_of_a_failed_download(caplog, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    caplog.set_level(0)
    with pytest.raises((OSError, ValueError)) as failure:
        LatentDiffPipeline.from_pretrained("nobody/nothing", token="hf_secret")
    printed = str(failure.value) + repr(failure.value.__cause__) + caplog.text
    assert "hf_secret" not in printed + "".join(capfd.readouterr())


def test_lora_loads_scales_and_unloads(tmp_path):
    pipe = tiny_pipeline()
    plain = images_of(pipe)
    save_file(lora_weights(), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    full = images_of(pipe)
    assert np.abs(full - plain).max() > 1 / 255
    assert np.abs(images_of(pipe, lora_scale=0.0) - plain).max() <= 1 / 255
    half = images_of(pipe, lora_scale=0.5)
    assert 0 < np.abs(half - plain).mean() < np.abs(full - plain).mean()
    pipe.unload_lora_weights()
    assert np.array_equal(images_of(pipe), plain)


def test_folder_is_not_written_while_a_lora_is_loaded(tmp_path):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(lora_weights(), adapter_name="style")
    with pytest.raises(ValueError, match=r"the LoRA style is loaded.*fuse_lora\(\)"):
        pipe.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    again = LatentDiffPipeline.from_pretrained(tmp_path / "model")
    assert np.array_equal(images_of(again), images_of(pipe))


def test_lora_equals_stock(tmp_path):
    weights = lora_weights()
    stock = StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False)
    ours = tiny_pipeline()
    stock.load_lora_weights(weights)
    ours.load_lora_weights(weights)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        **CALL,
        generator=torch.Generator().manual_seed(1),
        height=SIZE,
        width=SIZE,
        cross_attention_kwargs={"scale": 0.7},
    ).images
    assert np.abs(images_of(ours, lora_scale=0.7) - expected).max() <= 1 / 255


def test_lora_that_does_not_fit_is_refused(tmp_path):
    weights = lora_weights()
    wide = {key: torch.cat([value] * 2, dim=-1) for key, value in weights.items()}
    for wrong in ({"unet.x": torch.zeros(1)}, {}, wide):
        with pytest.raises(ValueError, match=r"LoRA"):
            tiny_pipeline().load_lora_weights(dict(wrong))
    torch.save(weights, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="pickle"):
        tiny_pipeline().load_lora_weights(tmp_path, weight_name="lora.bin")
    with pytest.raises(ValueError, match="pickle"):
        tiny_pipeline().load_lora_weights(tmp_path / "lora.bin")


def test_textual_inversion_adds_words(tmp_path):
    pipe = tiny_pipeline()
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    save_file({"<pet>": vectors}, tmp_path / "pet.safetensors")
    before = images_of(pipe, prompt="a <pet>")
    pipe.load_textual_inversion(tmp_path / "pet.safetensors")
    assert np.abs(images_of(pipe, prompt="a <pet>") - before).max() > 0
    assert np.isfinite(images_of(pipe, prompt="a (<pet>:1.4) cat")).all()
    torch.save({"<dog>": vectors}, tmp_path / "dog.bin")
    with pytest.raises(ValueError, match="pickle"):
        pipe.load_textual_inversion(tmp_path / "dog.bin")


def test_single_file_is_read_as_it_was_written(tmp_path):
    pipe = sd1_shaped()
    pipe.save_pretrained(tmp_path / "model")
    pipe = LatentDiffPipeline.from_pretrained(tmp_path / "model")
    file = save_single_file(pipe, tmp_path / "model.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "model"
    loaded = LatentDiffPipeline.from_single_file(file, config=tmp_path / "model")
    assert np.abs(images_of(loaded) - images_of(pipe)).max() == 0
    stock = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "model"))
    for ours, theirs in ((pipe.unet, stock.unet), (pipe.vae, stock.vae)):
        states = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)


def test_single_file_that_lacks_a_weight_is_named(tmp_path):
    pipe = sd1_shaped()
    pipe.save_pretrained(tmp_path / "model")
    file = save_single_file(pipe, tmp_path / "model.safetensors")
    weights = load_file(file)
    del weights["model.diffusion_model.input_blocks.0.0.bias"]
    save_file(weights, file)
    with pytest.raises(
        ValueError, match=r"model\.safetensors .*missing: .*input_blocks\.0\.0\.bias"
    ):
        LatentDiffPipeline.from_single_file(file, config=tmp_path / "model")


def test_single_file_of_another_kind_is_refused(tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file(lora_weights(), lora)
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    (tmp_path / "model.txt").write_bytes(b"text")
    (tmp_path / "broken.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no whole Stable Diffusion 1\.x, 2\.x or XL model"):
        LatentDiffPipeline.from_single_file(lora)
    with pytest.raises(ValueError, match="pickle"):
        LatentDiffPipeline.from_single_file(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        LatentDiffPipeline.from_single_file(tmp_path / "model.txt")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        LatentDiffPipeline.from_single_file(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LatentDiffPipeline.from_single_file(tmp_path / "nowhere.safetensors")


def test_tiny_autoencoder_serves_as_vae():
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    assert images_of(tiny_pipeline(vae=vae)).shape == (1, SIZE, SIZE, 3)
    assert tiny_vae().config.latent_channels == vae.config.latent_channels


def test_a_misspelt_run_is_answered_by_the_run_next_to_it_and_no_network_in_plain_words(
    saved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def download(name, **options):
        raise OSError(
            f"{name} is not fully cached locally, pass 'local_files_only=False'\nsee above"
        )

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    shutil.copytree(saved, "runs/photos/pipeline")
    for name in ("runs/photo", "./runs/photo", f"{tmp_path}/runs/photo"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*did you mean .*runs/photos\?"):
            LatentDiffPipeline.from_pretrained(name)
    for open_model in (LatentDiffPipeline.from_pretrained, load_components):
        with pytest.raises(FileNotFoundError, match="the hub cannot be reached") as raised:
            open_model("owner/model")
        assert "local_files_only" not in str(raised.value)


def test_a_run_a_file_and_a_misspelt_name_get_the_right_hint(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run / "pipeline")
    assert images_of(LatentDiffPipeline.from_pretrained(run)).shape[1] == SIZE
    assert images_of(open_pipeline(str(run), dtype="float32", device="cpu")).shape[1] == SIZE
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="without pipeline/"):
        LatentDiffPipeline.from_pretrained(tmp_path / "early")
    save_file(lora_weights(), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"a LoRA: open it with pipe\.load_lora_weights"):
        LatentDiffPipeline.from_pretrained(tmp_path / "style.safetensors")
    with pytest.raises(FileNotFoundError, match="did you mean latentdiff-mini"):
        LatentDiffPipeline.from_pretrained("latentdif-mini")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        LatentDiffPipeline.from_pretrained(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["conditioner.embedders.0.x", "model.diffusion_model.label_emb.0.0.weight"],
            "Diffusion XL",
        ),
        (["model.diffusion_model.double_blocks.0.img_attn.proj.weight"], "Flux"),
        (["double_blocks.0.img_attn.proj.weight"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.x.weight"], "Stable Diffusion 3"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["emb_params"], "an embedding"),
        (["encoder.conv_in.weight"], "a VAE alone"),
    ],
)
def test_single_files_of_other_models_are_named(names, said, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{said}"):
        LatentDiffPipeline.from_single_file(path)


def test_a_single_file_without_its_text_encoder_is_named(tmp_path):
    pipe = sd1_shaped()
    pipe.save_pretrained(tmp_path / "model")
    file = save_single_file(pipe, tmp_path / "model.safetensors")
    weights = {k: w for k, w in load_file(file).items() if not k.startswith("cond_stage_model")}
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"model\.safetensors has no text encoder"):
        LatentDiffPipeline.from_single_file(file, config=tmp_path / "model")
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    save_file(weights | {key: torch.zeros(16)}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors .*missing: cond_stage_model.*"):
        LatentDiffPipeline.from_single_file(file, config=tmp_path / "model")
