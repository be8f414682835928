"""A LoRA in another program's names acts as before, in ours and in stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_lora import ATTENTION, CONVS, TEXT, evenly, kohya_file, merged_outputs, outputs
from fakes_pipeline import tiny_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.cli.main import main
from latentdiff.pipeline.files.file_metadata import tensors_hash
from latentdiff.sampling.lora_conversion import convert_lora

# stock diffusers tells the names of a text encoder's layers by its out_proj
WORDS = [*TEXT, "encoder.layers.0.self_attn.out_proj"]
STRENGTHS = evenly(ATTENTION, alpha=1.0) | evenly(CONVS, rank=2, alpha=3.0) | evenly(WORDS, rank=3)


@pytest.fixture
def base(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_both_directions_act_at_each_layers_strength(tmp_path, base):
    weights = kohya_file(tiny_pipeline(), STRENGTHS)
    expected = merged_outputs(STRENGTHS, weights)
    save_file(weights, tmp_path / "style.safetensors")
    ours, back = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    written = convert_lora(tmp_path / "style.safetensors", ours, naming="diffusers", base=base)
    assert written.num_layers == len(STRENGTHS)
    convert_lora(ours, back, naming="kohya", base=base)
    assert load_file(back).keys() == weights.keys()
    for path in (ours, back):
        for kind in (tiny_pipeline, lambda: StableDiffusionPipeline.from_pretrained(base)):
            pipe = kind()
            pipe.load_lora_weights(path.parent, weight_name=path.name)
            assert (outputs(pipe) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layers", [ATTENTION, CONVS, TEXT])
def test_dora_keeps_its_norms(layers, tmp_path, base):
    weights = kohya_file(tiny_pipeline(), evenly(layers, alpha=1.0))
    for path in layers:
        prefix = "lora_te_text_model_" if layers is TEXT else "lora_unet_"
        name = prefix + path.replace(".", "_")
        up = weights[f"{name}.lora_up.weight"]
        weights[f"{name}.dora_scale"] = torch.rand(len(up), *[1] * (up.ndim - 1)) + 1
    save_file(weights, tmp_path / "dora.safetensors")
    ours, back = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    convert_lora(tmp_path / "dora.safetensors", ours, naming="diffusers", base=base)
    convert_lora(ours, back, naming="kohya", base=base)
    assert {n: x for n, x in load_file(back).items() if "dora" in n}.keys() == {
        name for name in weights if "dora" in name
    }
    found = []
    for path in (tmp_path / "dora.safetensors", ours, back):
        pipe = tiny_pipeline()
        pipe.load_lora_weights(path)
        found.append(outputs(pipe))
    assert (found[0] - outputs(tiny_pipeline())).abs().max() > 0.01
    assert (found[1] - found[0]).abs().max() < 1e-4
    assert torch.equal(found[2], found[1])


def test_metadata_is_kept_but_for_what_is_of_other_bytes(tmp_path, base):
    weights = kohya_file(tiny_pipeline(), evenly(ATTENTION, alpha=2.0))
    stored = {
        "ss_tag_frequency": '{"10_cat": {"cat": 3}}',
        "ss_network_alpha": "2.0",
        "sshs_model_hash": "old",
        "modelspec.trigger_phrase": "sks cat",
        "modelspec.hash_sha256": "0xold",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }
    save_file(weights, tmp_path / "style.safetensors", metadata=stored)
    ours, back = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    convert_lora(tmp_path / "style.safetensors", ours, naming="diffusers", base=base)
    found = metadata_of(ours)
    assert found["modelspec.trigger_phrase"] == "sks cat"
    assert found["modelspec.implementation"] == "diffusers"
    assert found["modelspec.hash_sha256"] == f"0x{tensors_hash(load_file(ours))}"
    settings = json.dumps({"unet.r": 4, "unet.lora_alpha": 9})  # folded in already when written
    save_file(load_file(ours), ours, metadata=found | {"lora_adapter_metadata": settings})
    convert_lora(ours, back, naming="kohya", base=base, dtype="float16")
    found = metadata_of(back)
    assert "lora_adapter_metadata" not in found
    assert found["ss_network_alpha"] == "4.0"
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_tag_frequency"] == stored["ss_tag_frequency"]
    assert found["sshs_model_hash"] == tensors_hash(load_file(back))
    assert {x.dtype for n, x in load_file(back).items() if "alpha" not in n} == {torch.float16}


def test_the_family_is_told_by_the_widths(tmp_path):
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weights = {
        f"lora_unet_{layer}.lora_down.weight": torch.ones(4, 768),
        f"lora_unet_{layer}.lora_up.weight": torch.ones(320, 4),
        f"lora_unet_{layer}.alpha": torch.tensor(2.0),
    }
    save_file(weights, tmp_path / "style.safetensors")
    ours = tmp_path / "ours.safetensors"
    assert main(["export", "lora", str(tmp_path / "style.safetensors"), f"--out={ours}",
                 "--format=diffusers"]) == 0  # fmt: skip
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    found = load_file(ours)
    assert found.keys() == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
    assert found[f"{name}.lora_B.weight"].unique().item() == 0.5
    assert metadata_of(ours)["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_what_would_lose_layers_or_a_file_is_refused(tmp_path, base):
    weights = kohya_file(tiny_pipeline(), evenly(ATTENTION))
    path, out = tmp_path / "style.safetensors", tmp_path / "out.safetensors"
    save_file(weights, path)
    with pytest.raises(ValueError, match="does not tell which model it is for"):
        convert_lora(path, out, naming="diffusers")
    with pytest.raises(ValueError, match="expected one of diffusers, kohya"):
        convert_lora(path, out, naming="a1111")
    with pytest.raises(ValueError, match="already exists"):
        convert_lora(path, path, naming="diffusers", base=base)
    lost = {name.replace("blocks_0", "blocks_9"): x.clone() for name, x in weights.items()}
    save_file(weights | lost, path)
    with pytest.raises(ValueError, match=r"8 of 16 layers, such as lora_unet.*--base"):
        convert_lora(path, out, naming="diffusers", base=base)
    assert not out.exists()


def test_the_base_model_that_a_lora_was_trained_on_is_named(tmp_path, base, capsys):
    """That is the model of --base, not the one that this model was tuned from."""
    tuned = json.dumps({"base_model": "owner/older", "resolution": 64, "steps": 9})
    Path(base, "latentdiff.json").write_text(tuned)
    weights = kohya_file(tiny_pipeline(), evenly(ATTENTION))
    save_file(weights, tmp_path / "a.safetensors", metadata={"ss_sd_model_name": "theirs"})
    for naming, options in (("kohya", [f"--base={base}"]), ("diffusers", [f"--base={base}"])):
        out = tmp_path / f"{naming}.safetensors"
        command = ["export", "lora", str(tmp_path / "a.safetensors"), f"--format={naming}"]
        assert main([*command, f"--out={out}", *options]) == 0
        assert f"8 layers in the names of {naming}, for base" in capsys.readouterr().out
        found = metadata_of(out)
        assert (found["ss_sd_model_name"], found["modelspec.resolution"]) == ("base", "64x64")
        assert "ss_steps" not in found


def test_a_run_names_the_base_model_of_its_training(tmp_path, base):
    run = tmp_path / "run"
    tiny_pipeline().save_pretrained(run / "pipeline")
    (run / "pipeline" / "latentdiff.json").write_text(json.dumps({"base_model": "owner/model"}))
    (run / "lora").mkdir()
    weights = kohya_file(tiny_pipeline(), evenly(ATTENTION))
    save_file(weights, run / "lora" / "pytorch_lora_weights.safetensors")
    written = convert_lora(run, tmp_path / "out.safetensors", naming="kohya")
    assert written.base == metadata_of(written.path)["ss_sd_model_name"] == "owner/model"
