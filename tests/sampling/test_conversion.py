"""LoRAs merged into a folder, and a folder as one file."""

from __future__ import annotations

import logging

import pytest
import torch
from fakes_finetune import generate, open_ours
from fakes_pipeline import lora_weights, sd1_shaped, tiny_pipeline, tiny_safety_checker
from fakes_scripts import run_script
from fakes_training import make_config, make_world
from safetensors.torch import load_file, save_file

from latentdiff.config.options import EvalModelOptions
from latentdiff.evaluation.eval_set import open_eval_model
from latentdiff.models.build import make_ddpm_scheduler
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.adapter_file import stored_metadata
from latentdiff.sampling import conversion
from latentdiff.sampling.conversion import export_single_file, merge_loras
from latentdiff.sampling.open_pipeline import open_pipeline
from latentdiff.training.text_to_image.components import pretrained_components


def test_merged_folder_makes_the_images_of_its_loras(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    one = lora_weights()
    two = {name: 0.5 * tensor.roll(1, 0) for name, tensor in one.items()}
    for name, weights in (("one", one), ("two", two)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    pipe = open_ours(tmp_path / "base")
    plain = generate(pipe)
    pipe.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "two.safetensors", adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    expected = generate(pipe)
    assert (expected - plain).abs().max() > 1 / 255
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    merged = merge_loras(tmp_path / "base", files, tmp_path / "merged", weights=[0.7, 0.4])
    assert (generate(open_ours(merged)) - expected).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="already exists"):
        merge_loras(tmp_path / "base", files, merged)
    with pytest.raises(ValueError, match="1 weights for 2 LoRAs"):
        merge_loras(tmp_path / "base", files, tmp_path / "new", weights=[1.0])


def test_every_command_can_leave_out_a_safety_checker_that_does_not_open(tmp_path, monkeypatch):
    """As in folders whose safety checker was deleted, or is a pickle."""
    pipe, folder = sd1_shaped(**tiny_safety_checker()), tmp_path / "model"
    pipe.save_pretrained(folder)
    torch.save({}, folder / "safety_checker" / "pytorch_model.bin")
    (folder / "safety_checker" / "model.safetensors").unlink()
    save_file(lora_weights(), tmp_path / "lora.safetensors")
    monkeypatch.setattr(conversion, "CLIP_VOCABULARY", len(pipe.tokenizer))
    world = make_world(tmp_path)
    training = {"model__vae": "", "model__pretrained": folder}
    with pytest.raises(ValueError, match=r"pickle.*safety_checker=None.*safety_checker=false"):
        pretrained_components(make_config(world, tmp_path / "run", **training))
    config = make_config(world, tmp_path / "run", **training, model__safety_checker="false")
    assert pretrained_components(config).safety_checker is None
    out = tmp_path / "cat.png"
    options = ["--steps", 1, "--out", out, "--height", 32, "--width", 32]
    assert run_script("sample.py", folder, "a cat", *options) == 2
    assert run_script("sample.py", folder, "a cat", *options, "--safety_checker=false") == 0
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged"
    assert run_script("merge_lora.py", folder, lora, "--out", merged) == 2
    without = "--safety_checker=false"
    assert run_script("merge_lora.py", folder, lora, "--out", merged, without) == 0
    assert run_script("pack_model.py", folder, "--out", tmp_path / "packed", without) == 0
    data = EvalModelOptions(data=str(world / "data"), num_heldout=2, safety_checker=False)
    assert open_eval_model(str(folder), data).components.safety_checker is None
    assert open_pipeline(str(folder), safety_checker=False).safety_checker is None
    export_single_file(folder, tmp_path / "model.safetensors")


def test_single_file_comes_back_bit_for_bit(tmp_path, monkeypatch):
    pipe = sd1_shaped()
    pipe.scheduler = make_ddpm_scheduler(prediction_type="v_prediction", zero_terminal_snr=True)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"vocabulary.*use the folder in diffusers.*lora_sd15_8gb"):
        export_single_file(tmp_path / "model", tmp_path / "model.safetensors")
    monkeypatch.setattr(conversion, "CLIP_VOCABULARY", len(pipe.tokenizer))
    file = export_single_file(tmp_path / "model", tmp_path / "model.safetensors")
    stored = load_file(file)
    assert {"v_pred", "ztsnr"} <= stored.keys()
    hint = stored_metadata(file)["modelspec.usage_hint"]
    assert hint == "the node ModelSamplingDiscrete (sampling v_prediction, zsnr true) in ComfyUI"
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in stored
    loaded = LatentDiffPipeline.from_single_file(file, config=tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        own, back = getattr(pipe, part).state_dict(), getattr(loaded, part).state_dict()
        assert own.keys() == back.keys()
        assert all(torch.equal(own[name], back[name]) for name in own)
    half = export_single_file(tmp_path / "model", tmp_path / "half.safetensors", dtype="float16")
    assert {x.dtype for name, x in load_file(half).items() if "." in name} == {torch.float16}
    with pytest.raises(ValueError, match="safetensors"):
        export_single_file(tmp_path / "model", tmp_path / "model.ckpt")


def test_lora_layers_without_effect_are_logged(tmp_path, caplog):
    weights = lora_weights()
    other = {n.replace("blocks.0", "blocks.9"): x for n, x in weights.items()}
    pipe = tiny_pipeline()
    with caplog.at_level(logging.WARNING, "latentdiff"):
        pipe.load_lora_weights(dict(weights))
    assert not [r for r in caplog.records if r.name.startswith("latentdiff")]
    with caplog.at_level(logging.WARNING, "latentdiff"):
        tiny_pipeline().load_lora_weights(weights | other)
    assert f"{len(weights) // 2} of the LoRA's {len(weights)} layers" in caplog.text


def test_kohya_lora_of_another_model_is_refused():
    weights = {
        "lora_unet_nowhere_to_q.lora_down.weight": torch.ones(2, 8),
        "lora_unet_nowhere_to_q.lora_up.weight": torch.ones(8, 2),
        "lora_unet_nowhere_to_q.alpha": torch.tensor(2.0),
    }
    with pytest.raises(ValueError, match="LoRA"):
        tiny_pipeline().load_lora_weights(weights)
