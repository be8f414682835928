"""Folders, hub repositories and cards of models that read an image, and of ControlNets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, MultiControlNetModel
from fakes_conditions import controlnet_of, photo
from fakes_pipeline import ddim, pipeline_of, tiny_pipeline, tiny_safety_checker, tiny_unet
from fakes_sdxl import sdxl_pipeline, sdxl_unet

from latentdiff.models.compatibility import condition_kinds
from latentdiff.models.components import Download, load_components
from latentdiff.models.unet.controlnet import make_controlnet, open_controlnet
from latentdiff.models.weights import weight_patterns
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo, write_model_info
from latentdiff.pipeline.files.single_file import save_single_file
from latentdiff.pipeline.files.stock_format import info_of_stock
from latentdiff.pipeline.png_metadata import save_png
from latentdiff.sampling.sample import options_from_image

LOADING = "latentdiff.pipeline.files.loading"


def with_controlnets(num=1):
    pipe = tiny_pipeline(scheduler=ddim())
    pipe.load_controlnet([controlnet_of(pipe.unet, seed) for seed in range(num)])
    return pipe


@pytest.fixture(scope="module")
def two_nets(tmp_path_factory):
    """The folder of a model with two ControlNets, that were opened from this machine."""
    folder = Path(tmp_path_factory.mktemp("nets"))
    pipe = tiny_pipeline(scheduler=ddim())
    for k in range(2):
        controlnet_of(pipe.unet, k).save_pretrained(folder / f"net{k}")
    pipe.load_controlnet([folder / "net0", folder / "net1"])
    pipe.save_pretrained(folder / "model")
    return folder / "model"


def test_the_run_of_a_controlnet_says_how_it_is_used(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    controlnet_of(tiny_unet(), 0).save_pretrained(tmp_path / "controlnet")
    write_model_info(tmp_path / "controlnet", ModelInfo(base_model="latentdiff-mini"))
    message = rf"holds a ControlNet, .* sample latentdiff-mini PROMPT --controlnet {tmp_path} --con"
    for open_model in (LatentDiffPipeline.from_pretrained, load_components):
        with pytest.raises(FileNotFoundError, match=message):
            open_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="sample latentdiff-mini PROMPT"):
        LatentDiffPipeline.from_pretrained(tmp_path / "controlnet")


def test_a_variant_is_that_of_the_stored_controlnets_too(tmp_path):
    with_controlnets(2).save_pretrained(tmp_path, variant="fp16")
    again = LatentDiffPipeline.from_pretrained(tmp_path, variant="fp16")
    assert len(again.controlnets) == 2
    with pytest.raises(ValueError, match="no weights of variant None"):
        open_controlnet(tmp_path / "controlnet")


@pytest.mark.parametrize(
    ("variant", "fetched", "left"),
    [
        (None, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        (None, "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.bin"),
        ("fp16", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
        (
            "fp16",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16.bin",
        ),
    ],
)
def test_one_variant_of_weights_is_fetched(variant, fetched, left):
    patterns = weight_patterns(variant)
    assert any(Path(fetched).match(pattern) for pattern in patterns)
    assert not any(Path(left).match(pattern) for pattern in patterns)


def test_controlnets_are_left_out_by_an_empty_list_and_replaced_by_others(two_nets):
    assert len(LatentDiffPipeline.from_pretrained(two_nets).controlnets) == 2
    assert LatentDiffPipeline.from_pretrained(two_nets, controlnet=[]).controlnets == []
    nets = [make_controlnet(tiny_unet(), factor=4, seed=9)]
    multi = LatentDiffPipeline.from_pretrained(two_nets, controlnet=MultiControlNetModel(nets * 2))
    assert multi.controlnets == nets * 2


def test_several_controlnets_come_from_the_hub(two_nets, tmp_path, monkeypatch):
    fetched = shutil.copytree(two_nets, tmp_path / "snapshot")
    (fetched / "controlnet_1" / "config.json").unlink()  # as diffusers leaves it
    asked = []

    def snapshot(repo_id, allow_patterns, **where):
        asked.append((repo_id, allow_patterns))
        name = Path("controlnet_1", "config.json")
        shutil.copy(two_nets / name, fetched / name)

    monkeypatch.setattr(f"{LOADING}.Download.download", lambda repo_id, **options: str(fetched))
    monkeypatch.setattr(f"{LOADING}.hf_hub_download", lambda *_, **__: None)
    monkeypatch.setattr(f"{LOADING}.snapshot_download", snapshot)
    assert len(LatentDiffPipeline.from_pretrained("someone/cats").controlnets) == 2
    assert asked == [("someone/cats", ["controlnet_*/config.json"])]
    assert LatentDiffPipeline.from_pretrained("someone/cats", controlnet=[]).controlnets == []
    assert len(asked) == 1


def test_a_class_of_ours_is_downloaded(monkeypatch):
    """diffusers looks the class of an index up among its own, which has not ours."""
    from diffusers.pipelines.pipeline_loading_utils import _get_pipeline_class

    found = _get_pipeline_class(Download, {"_class_name": "LatentDiffPipeline"})
    assert found is Download
    known, _ = Download._get_signature_keys(found)
    assert {"unet", "vae", "safety_checker", "text_encoder_2", "controlnet"} <= set(known)


def test_no_config_names_a_path_of_this_machine(two_nets):
    texts = [path.read_text() for path in two_nets.rglob("*.json")]
    assert len(texts) > 6
    assert not [text for text in texts if str(two_nets.parent) in text]


def card_and_info(folder):
    return (folder / "README.md").read_text(), json.loads(
        (folder / "latentdiff.json").read_text() if (folder / "latentdiff.json").exists() else "{}"
    )


def test_the_stated_kind_is_that_of_the_pipeline_now(two_nets, tmp_path):
    card, info = card_and_info(two_nets)
    assert info["condition_kind"] == "controlnet"
    assert "diffusers.StableDiffusionControlNetPipeline` opens it" in card
    pipe = LatentDiffPipeline.from_pretrained(two_nets)
    pipe.unload_controlnet()
    pipe.save_pretrained(tmp_path / "plain")
    card, info = card_and_info(tmp_path / "plain")
    assert "condition_kind" not in info
    assert "diffusers.StableDiffusionPipeline` opens it" in card
    assert "condition=" not in card
    pipe = pipeline_of("depth")
    pipe.model_info = ModelInfo()  # as of a model of the hub
    pipe.save_pretrained(tmp_path / "depth")
    card, info = card_and_info(tmp_path / "depth")
    assert info["condition_kind"] == "depth"
    assert "diffusers.StableDiffusionDepth2ImgPipeline` opens it" in card


@pytest.mark.parametrize(
    ("channels", "line"),
    [(5, None), (8, "Plain `diffusers.StableDiffusionXLInstructPix2PixPipeline` opens it too")],
)
def test_the_card_names_the_class_of_the_index(channels, line, tmp_path):
    sdxl_pipeline(unet=sdxl_unet(in_channels=channels)).save_pretrained(tmp_path)
    card, _ = card_and_info(tmp_path)
    assert (line in card) if line else ("opens it too" not in card)


def test_a_controlnet_is_of_the_dtype_of_its_model():
    pipe = tiny_pipeline(scheduler=ddim()).to(torch.bfloat16)
    pipe.load_controlnet(controlnet_of(tiny_unet(), 0))
    images = pipe("a cat", condition=photo(), num_inference_steps=1, output_type="latent").images
    assert torch.isfinite(images).all()


def changed(**config):
    net = make_controlnet(tiny_unet(), factor=4, seed=0)
    net.register_to_config(**config)
    return net


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (changed(conditioning_channels=1), "reads 1 channels .* the 3 of an RGB image"),
        (changed(layers_per_block=2), "its layers_per_block is 2 and the U-Net's 1"),
        (make_controlnet(tiny_unet(), factor=8, seed=0), "shrinks images 8 times and the VAE 4"),
    ],
)
def test_a_controlnet_of_another_model_is_refused_wherever_it_comes_in(net, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline().load_controlnet(net)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(controlnet=net)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(controlnet=MultiControlNetModel([net]))


def test_a_controlnet_of_levels_named_one_by_one_fits():
    unet = tiny_unet()
    unet.register_to_config(layers_per_block=[1, 1])
    pipe = tiny_pipeline(unet=unet)
    pipe.load_controlnet(changed())
    assert len(pipe.controlnets) == 1


def test_a_controlnet_comes_before_offloading():
    pipe = tiny_pipeline(scheduler=ddim())
    pipe.enable_model_cpu_offload(device="cpu")
    net = controlnet_of(pipe.unet, 0)
    with pytest.raises(ValueError, match="load it before enable_model_cpu_offload"):
        pipe.load_controlnet(net)
    assert net.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("depth", "is of the kind depth, .* keep the folder"),
        ("upscale", "is of the kind upscale"),
        ("instruct_pix2pix", "is of the kind instruct_pix2pix"),
        ("controlnet", r"a ControlNet is loaded, and .* call unload_controlnet\(\)"),
    ],
)
def test_a_kind_that_no_single_file_is_opened_of_is_not_written_as_one(kind, message, tmp_path):
    pipe = with_controlnets() if kind == "controlnet" else pipeline_of(kind)
    with pytest.raises(ValueError, match=message):
        save_single_file(pipe, tmp_path / "model.safetensors")


def test_a_tiny_vae_does_not_encode_what_a_model_edits(tmp_path):
    pipeline_of("instruct_pix2pix").save_pretrained(tmp_path)
    tiny = AutoencoderTiny(
        **{f"{part}_block_out_channels": (8,) * 3 for part in ("encoder", "decoder")},
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    with pytest.raises(ValueError, match=r"latents of its own VAE, .* at another scale; leave vae"):
        LatentDiffPipeline.from_pretrained(tmp_path, vae=tiny)
    pipe = pipeline_of("instruct_pix2pix")
    pipe.vae = tiny  # its own
    pipe.save_pretrained(tmp_path / "tiny")
    assert LatentDiffPipeline.from_pretrained(tmp_path / "tiny").vae_scale_factor == 4


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_of_others_is_read_as_diffusers_reads_it(tmp_path):
    pipeline_of("upscale", max_noise_level=100).save_pretrained(tmp_path)
    (tmp_path / "latentdiff.json").unlink()
    change_json(tmp_path / "vae" / "config.json", scaling_factor=0.18215)
    pipe = LatentDiffPipeline.from_pretrained(tmp_path)
    assert (pipe.condition_kind, pipe.model_info.max_noise_level) == ("upscale", 100)
    assert pipe.vae.config.scaling_factor == 0.08333
    change_json(tmp_path / "low_res_scheduler" / "scheduler_config.json", beta_end=0.03)
    with pytest.raises(ValueError, match=r"scheduler_config.json has beta_end=0.03, expected 0.02"):
        LatentDiffPipeline.from_pretrained(tmp_path)
    sdxl_pipeline(unet=sdxl_unet(in_channels=8)).save_pretrained(tmp_path / "edit")
    change_json(tmp_path / "edit" / "model_index.json", is_cosxl_edit=True)
    with pytest.raises(ValueError, match="is a CosXL edit model"):
        LatentDiffPipeline.from_pretrained(tmp_path / "edit")


def test_the_class_of_a_folder_tells_kinds_of_as_many_channels_apart(tmp_path):
    """Latents of three channels: an image in low resolution has as many as latents to edit."""
    unet, index = {"in_channels": 6}, {"_class_name": "StableDiffusionUpscalePipeline"}
    assert condition_kinds(unet, latent_channels=3) == ["instruct_pix2pix", "upscale"]
    assert info_of_stock(ModelInfo(), tmp_path, index).condition_kind == "upscale"
    known = ModelInfo(condition_kind="depth")
    assert info_of_stock(known, tmp_path, index).condition_kind == "depth"


def test_a_depth_model_is_saved_without_its_safety_checker_in_so_many_words(tmp_path, caplog):
    pipe = pipeline_of("depth")
    pipe.register_modules(**tiny_safety_checker())
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "safety_checker").exists()
    assert any("has no safety checker" in text for text in caplog.messages)


def test_settings_of_an_image_of_a_controlnet_name_what_is_lost(tmp_path, caplog):
    call = {"num_inference_steps": 1, "seed": 1, "controlnet_conditioning_scale": 0.5}
    image = with_controlnets()("a cat", condition=photo(), **call).images[0]
    path = save_png(image, tmp_path / "cat.png")
    _, options = options_from_image(str(path), has_image=False)
    assert options["controlnet_conditioning_scale"] == 0.5
    said = "give it by --condition, and its ControlNet by --controlnet"
    assert any(said in text for text in caplog.messages)
    caplog.clear()
    options_from_image(str(path), has_image=False, has_condition=True)
    assert not caplog.messages
