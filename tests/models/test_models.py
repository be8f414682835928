"""Components: opened from Stable-Diffusion-format folders, built, checked; bad folders are
refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from fakes_models import make_text_encoder, make_tiny_vae, save_folder
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer

from latentdiff.models.components import Components, load_components, load_vae
from latentdiff.models.latents import LatentCodec
from latentdiff.models.weights import weights_hash

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(sd_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder that a test may spoil."""
    return Path(shutil.copytree(sd_folder, tmp_path / "sd"))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return weights_hash(a) == weights_hash(b)


# --- opening folders ---


def test_what_stock_diffusers_saves_is_loaded_with_equal_weights(
    components: Components, tmp_path: Path
) -> None:
    save_folder(components, tmp_path)
    loaded = load_components(tmp_path)
    for name in WEIGHTS:
        assert same_weights(getattr(loaded, name), getattr(components, name))
        assert not getattr(loaded, name).training
    assert loaded.tokenizer.get_vocab() == components.tokenizer.get_vocab()
    assert loaded.scheduler.to_json_string() == components.scheduler.to_json_string()
    assert loaded.safety_checker is loaded.feature_extractor is loaded.image_encoder is None


def test_stock_pipeline_gives_the_same_image_after_load_and_save(
    sd_folder: Path, tmp_path: Path
) -> None:
    save_folder(load_components(sd_folder), tmp_path)
    images = []
    for path in (sd_folder, tmp_path):
        stock = StableDiffusionPipeline.from_pretrained(path)
        stock.set_progress_bar_config(disable=True)
        result = stock(
            "a red circle",
            num_inference_steps=3,
            latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
            height=32,
            width=32,
            output_type="pt",
        )
        images.append(result.images)
    assert torch.equal(*images)


def test_models_come_in_the_asked_dtype(sd_folder: Path) -> None:
    loaded = load_components(sd_folder, torch_dtype=torch.bfloat16)
    for name in WEIGHTS:
        assert {p.dtype for p in getattr(loaded, name).parameters()} == {torch.bfloat16}


def test_safety_checker_and_feature_extractor_pass_through(
    components: Components, tmp_path: Path
) -> None:
    encoder = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "projection_dim": 8,
    }  # fmt: skip
    config = CLIPConfig(
        vision_config=encoder | {"image_size": 16, "patch_size": 16},
        text_config=encoder,
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config).half()
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    parts = components.as_dict() | {"safety_checker": checker, "feature_extractor": extractor}
    save_folder(Components(**parts), tmp_path / "a")
    # Stable Diffusion 1.5's own files hold these two buffers, which are no weights today
    edit_weights(
        tmp_path / "a/safety_checker/model.safetensors",
        lambda w: w.update(
            {"vision_model.vision_model.embeddings.position_ids": torch.arange(2)[None]}
        ),
    )
    edit_weights(
        tmp_path / "a/text_encoder/model.safetensors",
        lambda w: w.update({"text_model.embeddings.position_ids": torch.arange(16)[None]}),
    )
    loaded = load_components(tmp_path / "a")
    assert same_weights(loaded.safety_checker, checker)
    assert loaded.feature_extractor.to_dict() == extractor.to_dict()
    save_folder(loaded, tmp_path / "b")
    again = load_components(tmp_path / "b")
    assert same_weights(again.safety_checker, checker)
    assert again.feature_extractor.to_dict() == extractor.to_dict()


def test_folder_of_the_first_stable_diffusion_layout_opens(
    components: Components, shared_dir: Path, tmp_path: Path
) -> None:
    """vocab.json and merges.txt, the VAE's old attention names, and another scheduler."""
    tokenizer = CLIPTokenizer.from_pretrained(shared_dir / "weights" / "clip-tokenizer")
    parts = components.as_dict() | {
        "tokenizer": tokenizer,
        "text_encoder": make_text_encoder(tokenizer),
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    }
    save_folder(Components(**parts), tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_dir / "weights" / "clip-tokenizer" / name, tmp_path / "tokenizer")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".attentions." in name]:
            renamed = name
            for new, before in old.items():
                renamed = renamed.replace(f".{new}.", f".{before}.")
            weights[renamed] = weights.pop(name)

    edit_weights(tmp_path / "vae" / WEIGHTS["vae"], rename)
    loaded = load_components(tmp_path)
    assert same_weights(loaded.vae, components.vae)
    assert loaded.tokenizer("a photo of a cat").input_ids == tokenizer("a photo of a cat").input_ids
    assert isinstance(loaded.scheduler, diffusers.PNDMScheduler)


def test_sharded_weights_and_variants_are_loaded(components: Components, tmp_path: Path) -> None:
    save_folder(components, tmp_path)
    (tmp_path / "unet" / WEIGHTS["unet"]).unlink()
    components.unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert same_weights(load_components(tmp_path).unet, components.unet)
    for name in WEIGHTS:
        getattr(components, name).save_pretrained(tmp_path / name, variant="fp16")
    (tmp_path / "vae" / WEIGHTS["vae"]).unlink()
    assert same_weights(load_components(tmp_path, variant="fp16").vae, components.vae)
    with pytest.raises(ValueError, match=r"no weights of variant None, expected one of \['fp16'\]"):
        load_components(tmp_path)


def test_folder_with_taesd_opens_here_and_in_stock_and_gives_one_image(
    components: Components, shared_dir: Path, tmp_path: Path
) -> None:
    """Its own config.json, which names the encoder's blocks only."""
    save_folder(Components(**components.as_dict() | {"vae": make_tiny_vae()}), tmp_path)
    shutil.rmtree(tmp_path / "vae")
    shutil.copytree(shared_dir / "weights" / "taesd", tmp_path / "vae")
    codec = LatentCodec(load_components(tmp_path).vae)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8)
    call = {"prompt": "", "num_inference_steps": 1, "latents": z, "height": 64, "width": 64}
    z = stock(**call, output_type="latent").images
    with torch.no_grad():
        image = (codec.decode(z) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(image, stock(**call, output_type="pt").images)


def test_vae_is_loaded_from_its_own_folder_and_from_a_pipelines(
    sd_folder: Path, tmp_path: Path
) -> None:
    vae = load_components(sd_folder).vae
    assert same_weights(load_vae(sd_folder), vae)
    assert same_weights(load_vae(sd_folder / "vae"), vae)
    tiny = make_tiny_vae()
    tiny.save_pretrained(tmp_path)
    assert same_weights(load_vae(tmp_path), tiny)


# --- refusing folders ---


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_extra_and_mismatched_weights_are_named_with_both_shapes(
    folder: Path, name: str
) -> None:
    path = folder / name / WEIGHTS[name]
    keys = [key for key in load_file(path) if key.endswith("weight")]
    plain = [key.removeprefix("text_model.") for key in keys]
    edit_weights(path, lambda w: w.pop(keys[0]))
    with pytest.raises(ValueError, match=f"weights of {name} .*missing: {plain[0]}"):
        load_components(folder)
    edit_weights(path, lambda w: w.update({keys[0]: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=rf"{plain[0]} is \(3, 5\), expected \(\d+,"):
        load_components(folder)
    edit_weights(path, lambda w: w.update({keys[1]: torch.zeros(7)}))
    with pytest.raises(ValueError, match=rf"{plain[1]} is \(7,\), expected"):
        load_components(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_not_part_of_the_model_is_named(folder: Path, name: str) -> None:
    edit_weights(folder / name / WEIGHTS[name], lambda w: w.update({"stray.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=f"weights of {name} .*not part of the model: .*stray"):
        load_components(folder)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("content", ["truncated", "empty", "garbage"])
def test_broken_weight_files_are_named(folder: Path, name: str, content: str) -> None:
    path = folder / name / WEIGHTS[name]
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-100], "empty": b"", "garbage": b"\0" * 99}[content])
    with pytest.raises(ValueError, match=f"{path} is not a whole safetensors file"):
        load_components(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_pickles_are_refused_by_name_and_not_opened(folder: Path, name: str) -> None:
    path = folder / name / WEIGHTS[name]
    pickle = path.with_name("pytorch_model.bin")
    path.rename(pickle)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin only, expected safetensors"):
        load_components(folder)
    pickle.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} holds no weights"):
        load_components(folder)


def test_folders_that_are_no_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model_index\.json nor"):
        load_components(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_vae(tmp_path)
    index = folder / "model_index.json"
    edit_json(index, text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(ValueError, match="text_encoder is a T5EncoderModel, expected CLIPTextMod"):
        load_components(folder)
    edit_json(index, text_encoder=[None, None])
    with pytest.raises(ValueError, match="names no text_encoder"):
        load_components(folder)
    edit_json(index, text_encoder=["transformers", "CLIPTextModel"], scheduler=["x", "os"])
    with pytest.raises(ValueError, match="scheduler is a os"):
        load_components(folder)
    index.write_text("{broken")
    with pytest.raises(ValueError, match=r"model_index\.json is not readable JSON"):
        load_components(folder)


def test_a_component_without_its_folder_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    with pytest.raises(FileNotFoundError, match="no folder unet"):
        load_components(folder)


def test_tokenizers_without_a_readable_vocabulary_are_named(folder: Path) -> None:
    """transformers makes a vocabulary of two tokens when the file is absent, without a warning."""
    vocabulary = folder / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text()[:100])
    with pytest.raises(ValueError, match="tokenizer is not a readable CLIP tokenizer"):
        load_components(folder)
    vocabulary.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer has no tokenizer\.json"):
        load_components(folder)


def test_what_is_neither_path_nor_fetchable_is_refused() -> None:
    for wrong in ("not-a-folder/at-all", "a/b/c/d", "/nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no folder (here|a/|/nowh)"):
            load_components(wrong)
        with pytest.raises(FileNotFoundError, match=r"no folder (here|a/|/nowh)"):
            load_vae(wrong)


@pytest.fixture
def hub_id(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny folder as huggingface_hub keeps what it fetched once; the network is off."""
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(sd_folder, repository / "snapshots" / ("0" * 40))
    shutil.copytree(sd_folder / "vae", tmp_path / "models--someone--vae/snapshots" / ("0" * 40))
    shutil.copytree(repository / "refs", tmp_path / "models--someone--vae/refs")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return "someone/tiny"


def test_hub_ids_are_opened_from_the_hubs_own_cache(hub_id: str, sd_folder: Path) -> None:
    local, fetched = load_components(sd_folder), load_components(hub_id)
    assert same_weights(fetched.unet, local.unet)
    assert same_weights(load_vae("someone/vae"), local.vae)


def test_parts_that_do_not_fit_are_refused_before_any_weight_is_read(folder: Path) -> None:
    (folder / "vae" / WEIGHTS["vae"]).write_bytes(b"never read")
    edit_json(folder / "vae" / "config.json", latent_channels=8)
    edit_json(folder / "text_encoder" / "config.json", hidden_size=24)
    with pytest.raises(ValueError, match=r"in_channels.*out_channels.*hidden_size") as error:
        load_components(folder)
    assert "latents have 8" in str(error.value)
    assert "width 16 (cross_attention_dim)" in str(error.value)
