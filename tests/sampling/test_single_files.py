"""Single files of other programs become folders that stock diffusers opens."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from fakes_pipeline import lora_weights, sd1_shaped
from safetensors.torch import load_file, save_file

from latentdiff.cli.main import main
from latentdiff.program import program
from latentdiff.sampling import conversion
from latentdiff.sampling.conversion import export_single_file
from latentdiff.sampling.single_files import folder_of_single_file, folder_of_vae


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A model's folder, and the same in one file of half precision."""
    pipe = sd1_shaped()
    pipe.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(conversion, "CLIP_VOCABULARY", len(pipe.tokenizer))
    file = export_single_file(tmp_path / "base", tmp_path / "model.safetensors", dtype="float16")
    return str(tmp_path / "base"), file


def test_a_whole_model_becomes_a_folder_in_the_files_dtype(tmp_path, exported, capsys):
    base, file = exported
    command = ["convert", "single-file", str(file), f"--base={base}"]
    assert main([*command, f"--out={tmp_path / 'folder'}"]) == 0
    assert f"{program()} sample {tmp_path / 'folder'}" in capsys.readouterr().out
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float16)
    original = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        own, found = getattr(original, part).state_dict(), getattr(stock, part).state_dict()
        assert own.keys() == found.keys()
        assert all(torch.equal(own[name], found[name]) for name in own)
    stored = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    with pytest.raises(ValueError, match="already exists"):
        folder_of_single_file(file, tmp_path / "folder", base=base)


def test_a_vae_in_either_naming_or_of_a_whole_model_becomes_a_folder(tmp_path, exported):
    base, whole = exported
    original = AutoencoderKL.from_pretrained(base, subfolder="vae").half()
    weights = load_file(whole)
    bare = {n.removeprefix("first_stage_model."): x for n, x in weights.items() if "first" in n}
    save_file(bare, tmp_path / "compvis.safetensors")
    save_file(original.state_dict(), tmp_path / "diffusers.safetensors")
    for file in (whole, tmp_path / "compvis.safetensors", tmp_path / "diffusers.safetensors"):
        out = folder_of_vae(file, tmp_path / f"{file.stem}-vae", base=base, scaling_factor=0.25)
        found = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float16)
        assert found.config.scaling_factor == 0.25
        given = tmp_path / f"{file.stem}-given"
        own = folder_of_single_file(whole, given, base=base, vae=str(file)).vae.state_dict()
        assert all(torch.equal(own[name], x) for name, x in found.state_dict().items())
        own = original.state_dict()
        assert all(torch.equal(own[name], x) for name, x in found.state_dict().items())


def test_what_is_no_such_file_is_named(tmp_path, exported):
    base, whole = exported
    out = tmp_path / "out"
    save_file(lora_weights(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="a LoRA"):
        folder_of_single_file(tmp_path / "lora.safetensors", out)
    with pytest.raises(ValueError, match="no VAE of this kind, it holds a LoRA"):
        folder_of_vae(tmp_path / "lora.safetensors", out)
    with pytest.raises(ValueError, match=r"of another shape|missing"):
        folder_of_vae(whole, out, family="sdxl")  # by Stable Diffusion XL's config
    with pytest.raises(ValueError, match="family=xl, expected one of sd1, sd2, sdxl"):
        folder_of_vae(whole, out, family="xl")
    (tmp_path / "old.ckpt").touch()
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:99])
    for name, message in (
        ("old.ckpt", "pickle"),
        ("absent.safetensors", "no file here"),
        ("cut.safetensors", "cut.safetensors"),
    ):
        for convert in (folder_of_single_file, folder_of_vae):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                convert(tmp_path / name, out, base=base)
    assert not out.exists()
