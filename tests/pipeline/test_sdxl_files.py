"""Files of SDXL: one file, LoRAs by two programs' names, embeddings for two text encoders."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from fakes_key_lists import check_keys, key_list
from fakes_sdxl_files import layer_of, sdxl_outputs, stock_sdxl, tiny_sdxl_parts
from safetensors.torch import load_file, save_file

from latentdiff.cli.main import main
from latentdiff.models.build import make_ddpm_scheduler, make_flow_scheduler
from latentdiff.models.weights import stored_shapes
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.adapter_file import AdapterFile, stored_metadata
from latentdiff.pipeline.files.embedding_file import read_embeddings
from latentdiff.pipeline.files.kohya_lora import kohya_weights, layers_unknown_to_kohya
from latentdiff.pipeline.files.ldm_names import unet_name
from latentdiff.pipeline.files.lora_layers import PARTS, lora_layers
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.pipeline.files.single_file import (
    SingleFile,
    bundled_configs,
    empty_modules,
    file_weights,
    open_single_file,
    save_single_file,
)
from latentdiff.pipeline.schedulers import zero_terminal_snr_scheduler
from latentdiff.sampling import conversion
from latentdiff.sampling.lora_conversion import convert_lora

PAIR = ("text_encoder", "tokenizer")
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
SECOND = "conditioner.embedders.1.model."
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.1"
# each layer's rank and alpha; stock diffusers takes attention's alphas in kohya's names to be that
# of the most common rank
LAYERS = {
    ("unet", f"{BLOCK}.attn1.to_q"): (4, 2.0),
    ("unet", f"{BLOCK}.attn2.to_out.0"): (4, 3.0),
    ("unet", f"{BLOCK}.ff.net.0.proj"): (4, 4.0),
    ("unet", "up_blocks.0.attentions.2.proj_in"): (3, 1.0),
    ("unet", "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"): (4, 1.0),
    ("unet", "down_blocks.0.resnets.1.conv1"): (4, 1.0),
    ("unet", "mid_block.resnets.1.time_emb_proj"): (4, 2.0),
    ("unet", "up_blocks.1.resnets.0.conv_shortcut"): (2, 2.0),
    ("unet", "down_blocks.0.downsamplers.0.conv"): (2, 2.0),
    ("unet", "up_blocks.0.upsamplers.0.conv"): (2, 2.0),
    ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): (4, 2.0),
    ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj"): (4, 2.0),
    ("text_encoder_2", "text_model.encoder.layers.1.self_attn.out_proj"): (3, 1.0),
    ("text_encoder_2", "text_model.encoder.layers.1.self_attn.v_proj"): (3, 1.0),
    ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"): (2, 4.0),
}
KOHYA = {  # the same by the names of kohya's scripts
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj",
    "lora_unet_output_blocks_2_1_proj_in",
    "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k",
    "lora_unet_input_blocks_2_0_in_layers_2",
    "lora_unet_middle_block_2_emb_layers_1",
    "lora_unet_output_blocks_3_0_skip_connection",
    "lora_unet_input_blocks_3_0_op",
    "lora_unet_output_blocks_2_2_conv",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
    "lora_te2_text_model_encoder_layers_1_self_attn_out_proj",
    "lora_te2_text_model_encoder_layers_1_self_attn_v_proj",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1",
}


def as_ours(parts, **changes):
    """Return what `save_single_file` takes of a pipeline, for components of SDXL."""
    return SimpleNamespace(
        **parts | {"model_info": ModelInfo(), "stated_info": ModelInfo()} | changes
    )


def test_names_and_shapes_of_a_real_file_are_those_that_comfyui_and_kohya_expect():
    """The list is from ComfyUI a125cd84 (2025-10-12): sources in fakes_key_lists.py."""
    pipe = as_ours(empty_modules(bundled_configs("sdxl")))
    found = {name: tuple(tensor.shape) for name, tensor in file_weights(pipe).items()}
    check_keys(found, key_list("single_file"))


def test_kohyas_lora_of_every_layer_comes_back_from_diffusers_naming_with_its_names(tmp_path):
    """The lists are from kohya's sd-scripts 48d368fa (2026-02-16): sources in fakes_key_lists.py.

    ComfyUI's key map has all their layers.
    """
    expected = key_list("lora") | key_list("lora_convolutions")
    weights = {name: torch.full(shape, 4.0) for name, shape in expected.items()}
    first, second, third = (tmp_path / f"{k}.safetensors" for k in range(3))
    save_file(weights, first)
    convert_lora(first, second, naming="diffusers")
    unknown = convert_lora(second, third, naming="kohya").unknown_to_kohya
    assert unknown == ()
    check_keys(stored_shapes([third]), expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny SDXL's folder by diffusers, and the same in one file."""
    folder = tmp_path_factory.mktemp("sdxl")
    parts = tiny_sdxl_parts()
    StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder / "model")
    return parts, folder / "model", save_single_file(as_ours(parts), folder / "one.safetensors")


def test_one_file_comes_back_bit_for_bit_in_ours_and_in_stock(exported):
    parts, folder, file = exported
    ours = open_single_file(file, config=folder)
    stock = StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(folder), add_watermarker=False
    )
    for name in MODELS:
        own = parts[name].state_dict()
        for found in (ours[name].state_dict(), getattr(stock, name).state_dict()):
            assert own.keys() == found.keys()
            assert all(torch.equal(own[key], found[key]) for key in own), name
    projection = load_file(file)[f"{SECOND}text_projection"]
    assert torch.equal(projection, parts["text_encoder_2"].text_projection.weight.T)
    metadata = stored_metadata(file)
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.resolution"] == "32x32"
    assert "modelspec.usage_hint" not in metadata


def test_a_missing_vae_is_named_and_one_can_be_given(exported, tmp_path):
    parts, folder, file = exported
    weights = {k: x for k, x in load_file(file).items() if not k.startswith("first_stage")}
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors has no vae.*pass one by vae"):
        open_single_file(tmp_path / "bare.safetensors", config=folder)
    found = open_single_file(tmp_path / "bare.safetensors", config=folder, vae=parts["vae"])
    assert found["vae"] is parts["vae"]


def test_weights_of_another_unet_are_named(exported, tmp_path):
    _, folder, file = exported
    name = "model.diffusion_model.input_blocks.9.0.in_layers.0.weight"
    save_file(load_file(file) | {name: torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=rf"not part of the model: {name}"):
        open_single_file(tmp_path / "more.safetensors", config=folder)


def test_the_family_of_a_real_file_is_told_by_its_header(tmp_path):
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    weights = {key: torch.zeros(1, 2048), conv_in: torch.zeros(1, 4, 1, 1)}
    weights["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(1, 1)
    save_file(weights, tmp_path / "sdxl.safetensors")
    assert SingleFile.read(tmp_path / "sdxl.safetensors").family() == "sdxl"
    save_file(weights | {key: torch.zeros(1, 1280)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="width 1280"):
        SingleFile.read(tmp_path / "refiner.safetensors").family()


@pytest.mark.parametrize("zero", [True, False])
def test_a_v_model_carries_the_marks_and_comes_back_as_one(exported, tmp_path, zero):
    parts, folder, _ = exported
    scheduler = make_ddpm_scheduler(prediction_type="v_prediction", zero_terminal_snr=zero)
    file = save_single_file(as_ours(parts, scheduler=scheduler), tmp_path / "v.safetensors")
    marks = {"v_pred", "ztsnr"} if zero else {"v_pred"}
    assert {k for k in load_file(file) if "." not in k} == marks
    with pytest.raises(ValueError, match=r"states prediction_type=v_prediction and .* epsilon"):
        open_single_file(file, config=folder)
    found = open_single_file(file, config=folder, prediction_type="v_prediction")["scheduler"]
    assert found.config["prediction_type"] == "v_prediction"
    assert bool(found.config.get("rescale_betas_zero_snr")) == zero


@pytest.mark.parametrize("is_zero", [None, True, False])
def test_a_folder_s_own_betas_are_kept_for_a_file_of_zero_terminal_snr(exported, tmp_path, is_zero):
    parts, folder, _ = exported
    v = {"prediction_type": "v_prediction"}
    own = {"beta_start": 0.001, "beta_end": 0.02, "num_timesteps": 500}
    scheduler = make_ddpm_scheduler(**v, **own, zero_terminal_snr=True)
    file = save_single_file(as_ours(parts, scheduler=scheduler), tmp_path / "v.safetensors")
    for base in (scheduler, make_ddpm_scheduler(**v, **own)):
        copy = shutil.copytree(folder, tmp_path / "base", dirs_exist_ok=True)
        base.save_pretrained(copy / "scheduler")
        given = {"config": copy, "zero_terminal_snr": is_zero}
        found = open_single_file(file, **given)["scheduler"]
        assert bool(found.config.get("rescale_betas_zero_snr")) == (is_zero is not False)
        wanted = make_ddpm_scheduler(**v, **own, zero_terminal_snr=is_zero is not False)
        assert torch.equal(found.alphas_cumprod, wanted.alphas_cumprod)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_rescaled_family_has_the_settings_that_new_models_have(family):
    config = bundled_configs(family)["scheduler"] | {"prediction_type": "v_prediction"}
    trained = getattr(diffusers, config["_class_name"]).from_config(config)
    found = dict(zero_terminal_snr_scheduler(trained).config)
    new = make_ddpm_scheduler(prediction_type="v_prediction", zero_terminal_snr=True).config
    assert {name: found[name] for name in new if name[0] != "_"} == {
        name: value for name, value in new.items() if name[0] != "_"
    }


def test_a_flow_model_names_the_node_that_comfyui_needs_and_comes_back_as_one(exported, tmp_path):
    """No entry of one file tells flow from epsilon, so its metadata does."""
    parts, folder, _ = exported
    flow = as_ours(parts, scheduler=make_flow_scheduler())
    file = save_single_file(flow, tmp_path / "flow.safetensors")
    assert not {key for key in load_file(file) if "." not in key}
    metadata = stored_metadata(file)
    assert metadata["modelspec.prediction_type"] == "flow_prediction"
    assert metadata["modelspec.usage_hint"] == "the node ModelSamplingSD3 (shift 1) in ComfyUI"
    with pytest.raises(ValueError, match=r"states prediction_type=flow_prediction and .* epsilon"):
        open_single_file(file, config=folder)
    found = open_single_file(file, config=folder, prediction_type="flow_prediction")["scheduler"]
    assert found.config["use_flow_sigmas"]
    assert found.config["prediction_type"] == "flow_prediction"


def lora_file():
    """Return a LoRA by diffusers' names, and kohya's alphas by layer, each of its own rank."""
    pipe, weights = stock_sdxl(), {}
    generator = torch.Generator().manual_seed(0)
    for (part, path), (rank, alpha) in LAYERS.items():
        like = layer_of(pipe, part, path).weight
        down = torch.randn(rank, *like.shape[1:], generator=generator) * 0.2
        up = torch.randn(len(like), rank, *[1] * (like.ndim - 2), generator=generator) * 0.2
        weights[f"{part}.{path}.lora_A.weight"] = down
        weights[f"{part}.{path}.lora_B.weight"] = up * (alpha / rank)
    return weights


def merged(weights):
    pipe = stock_sdxl()
    for part, path in LAYERS:
        layer = layer_of(pipe, part, path)
        down, up = (weights[f"{part}.{path}.lora_{end}.weight"] for end in "AB")
        layer.weight.data += (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    return sdxl_outputs(pipe)


def test_a_lora_in_either_naming_acts_alike_in_stock_and_has_all_its_places_in_ours():
    weights, pipe = lora_file(), stock_sdxl()
    expected, plain = merged(weights), sdxl_outputs(stock_sdxl())
    assert (expected - plain).abs().max() > 0.01
    kohya = kohya_weights(weights, unet_config=pipe.unet.config)
    assert {name.partition(".")[0] for name in kohya} == KOHYA
    assert not layers_unknown_to_kohya(weights)
    models = {part: getattr(pipe, part) for part in PARTS}
    for named in (weights, kohya):
        layers = lora_layers(AdapterFile("style", named), models)
        assert (layers.unused, layers.num_layers) == ((), len(LAYERS))
        for part, path in LAYERS:
            held = layers.parts[part]
            bare = path if part != "text_encoder" else path.removeprefix("text_model.")
            for end in "AB":
                wanted = weights[f"{part}.{path}.lora_{end}.weight"]
                assert torch.equal(held[f"{bare}.lora_{end}.weight"], wanted)
        stock = stock_sdxl()
        stock.load_lora_weights(dict(named))
        assert (sdxl_outputs(stock) - expected).abs().max() < 1e-4


def test_kohyas_alphas_count_by_layer():
    kohya = kohya_weights(lora_file(), unet_config=stock_sdxl().unet.config)
    half = {n: x / 2 if n.endswith(".alpha") else x for n, x in kohya.items()}
    models = {part: getattr(stock_sdxl(), part) for part in PARTS}
    full, found = (lora_layers(AdapterFile("style", w), models).parts for w in (kohya, half))
    for part in PARTS:
        for name, matrix in full[part].items():
            wanted = matrix / 2 if "lora_B" in name else matrix
            assert torch.equal(found[part][name], wanted)


def test_the_upsampler_of_a_level_with_attention_is_its_third_layer():
    config = stock_sdxl().unet.config
    assert unet_name("up_blocks.0.upsamplers.0.conv.weight", config) == (
        "output_blocks.2.2.conv.weight"
    )


def embedding(**changes):
    return AdapterFile("pet", {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 24)} | changes)


def test_an_embedding_has_vectors_for_both_text_encoders(tmp_path):
    word, rows = read_embeddings(embedding(), "<pet>", widths=(16, 24))
    assert (word, [tuple(x.shape) for x in rows]) == ("<pet>", [(2, 16), (2, 24)])
    path = tmp_path / "cat.safetensors"
    weights = dict(embedding().weights)
    named = AdapterFile("cat", weights, path)
    save_file(weights, path)
    assert read_embeddings(named, None, widths=(16, 24))[0] == "cat"
    save_file(weights, path, metadata={"modelspec.trigger_phrase": "<tabby>"})
    assert read_embeddings(named, None, widths=(16, 24))[0] == "<tabby>"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (AdapterFile("pet", {"<pet>": torch.ones(2, 16)}), "expected clip_l and clip_g"),
        (embedding(clip_g=torch.ones(2, 16)), "clip_g is an embedding of width 16"),
        (embedding(clip_g=torch.ones(3, 24)), "2 vectors in clip_l and 3 in clip_g"),
        (embedding(clip_g=torch.full((2, 24), torch.nan)), "not finite"),
    ],
)
def test_an_embedding_for_another_model_is_named(file, said):
    with pytest.raises(ValueError, match=said):
        read_embeddings(file, "<pet>", widths=(16, 24))


def test_our_pipeline_opens_and_writes_one_file(exported, tmp_path):
    parts, folder, file = exported
    pipe = LatentDiffPipeline.from_single_file(file, config=folder)
    pipe.save_pretrained(tmp_path / "folder")
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", add_watermarker=False)
    for name in MODELS:
        own, found = parts[name].state_dict(), getattr(stock, name).state_dict()
        assert own.keys() == found.keys()
        assert all(torch.equal(own[key], found[key]) for key in own), name
    again = save_single_file(pipe, tmp_path / "again.safetensors")
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_our_pipeline_loads_a_lora_of_three_parts_and_merges_it():
    weights = lora_file()
    expected = merged(weights)
    for named in (weights, kohya_weights(weights, unet_config=stock_sdxl().unet.config)):
        pipe = LatentDiffPipeline(**tiny_sdxl_parts())
        pipe.load_lora_weights(dict(named), adapter_name="style")
        assert set(pipe.get_list_adapters()) == set(PARTS)
        assert (sdxl_outputs(pipe) - expected).abs().max() < 1e-4
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (sdxl_outputs(pipe) - expected).abs().max() < 1e-4


def test_a_word_of_both_text_encoders_is_pooled_at_the_end_token():
    """Its numbers are above the end token's, where transformers looks with the old eos_token_id."""
    pipe = LatentDiffPipeline(**tiny_sdxl_parts())
    pipe.text_encoder_2.text_model.eos_token_id = 2
    pipe.load_textual_inversion(dict(embedding().weights), token="<pet>")
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert {"<pet>", "<pet>_1"} <= tokenizer.get_added_vocab().keys()
    ids = pipe.tokenizer_2("a <pet> <pet>_1", return_tensors="pt").input_ids
    states = pipe.text_encoder_2(ids)
    end = int((ids[0] == pipe.tokenizer_2.eos_token_id).nonzero()[0])
    wanted = pipe.text_encoder_2.text_projection(states.last_hidden_state[:, end])
    assert torch.allclose(states.text_embeds, wanted, atol=1e-6)


def test_a_word_of_both_text_encoders_makes_stock_s_image():
    call = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 3.0}
    pipe, stock = LatentDiffPipeline(**tiny_sdxl_parts()), stock_sdxl()
    pipe.set_progress_bar_config(disable=True)

    def draw(one, **given):
        return one("a <pet>", generator=torch.Generator().manual_seed(1), **call, **given).images

    plain, weights = draw(pipe), embedding().weights
    pipe.load_textual_inversion(dict(weights), token="<pet>")
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(stock, f"{part}{end}") for part in PAIR)
        stock.load_textual_inversion(
            weights[name], token="<pet>", text_encoder=encoder, tokenizer=tokenizer
        )
    images = draw(pipe)
    assert np.abs(images - draw(stock, height=32, width=32)).max() <= 1 / 255
    assert np.abs(images - plain).max() > 1 / 255


def test_a_folder_that_states_two_prediction_types_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported[1], tmp_path / "model")
    (folder / "latentdiff.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match=r"prediction_type=epsilon, and latentdiff\.json says"):
        LatentDiffPipeline.from_pretrained(folder)
    scheduler = make_ddpm_scheduler(prediction_type="v_prediction")
    LatentDiffPipeline.from_pretrained(folder, scheduler=scheduler)


def test_commands_convert_one_file_and_back(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "CLIP_VOCABULARY", len(exported[0]["tokenizer"]))
    _, folder, file = exported
    one, out = tmp_path / "one.safetensors", tmp_path / "folder"
    assert main(["export", "single-file", str(folder), f"--out={one}"]) == 0
    assert main(["convert", "single-file", str(one), f"--base={folder}", f"--out={out}"]) == 0
    assert f"wrote {out}, which predicts epsilon" in capsys.readouterr().out
    assert load_file(one).keys() == load_file(file).keys()
