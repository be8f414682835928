"""Conditions in training: they stay with their images, whole runs are exact, mistakes are named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from fakes_data import noise_image, write_jsonl
from fakes_models import make_vae
from fakes_training import make_config, read_metrics, write_world
from PIL import Image
from safetensors.torch import load_file

from latentdiff import LatentDiffPipeline
from latentdiff.audit.verify import verify
from latentdiff.config.io import load_config
from latentdiff.config.model import ConditionConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.online_encode import OnlineImages
from latentdiff.data.captions import CaptionTransform
from latentdiff.data.images import uint8_to_pixels
from latentdiff.evaluation.metrics.heldout_loss import Triples, triple_losses
from latentdiff.models.build import make_ddpm_scheduler, schedule_of
from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.models.components import load_components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.image_conditions import depth_channels
from latentdiff.pipeline.conditioning.image_condition import read_condition
from latentdiff.training.inputs.cache_commands import build_caches, prune_caches
from latentdiff.training.inputs.caption_dropout import is_caption_dropped, is_condition_dropped
from latentdiff.training.inputs.conditions import (
    ConditionEncoder,
    FixedCondition,
    condition_source,
    fixed_condition,
)
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.inputs.encode import cache_latents, crop_plan
from latentdiff.training.inputs.randomness import SampleKey
from latentdiff.training.inputs.sources import read_data
from latentdiff.training.inputs.train_data import condition_plan
from latentdiff.training.report.charts import rise_step, rise_text
from latentdiff.training.report.run_record import read_runs
from latentdiff.training.text_to_image.components import check_components
from latentdiff.training.text_to_image.preview import (
    encoded,
    generate_share,
    image_guidance_scale,
    make_preview_pipeline,
    prompt_seed,
)
from latentdiff.training.text_to_image.train_t2i import train

SIZES = [(52, 40), (40, 52), (44, 44), (64, 40), (40, 64), (48, 48), (56, 40), (40, 40)]
DATA = {"resolution": 32, "buckets": True, "bucket_multiple": 8, "random_flip": True}


def marked_folder(root: Path) -> Path:
    """Images whose conditions and inpainting masks are made of their own pixels."""
    rows = []
    for i, (width, height) in enumerate(SIZES):
        image, split = noise_image(i, width=width, height=height), "test" if i > 5 else "train"
        (root / split).mkdir(parents=True, exist_ok=True)
        image.save(root / split / f"{i}.png")
        image.save(root / split / f"same-{i}.png")
        mask = image.convert("L").point(lambda v: 255 * (v >= 128))
        mask.save(root / split / f"{i}.inpaint_mask.png")
        rows.append({"file_name": f"{i}.png", "text": f"image {i}", "condition": f"same-{i}.png"})
    write_jsonl(root / "train" / "metadata.jsonl", rows[:6])
    write_jsonl(root / "test" / "metadata.jsonl", rows[6:])
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("conditions")
    marked_folder(folder / "data")
    return write_world(folder, DATA)


@pytest.fixture(autouse=True)
def _one_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def config_of(world: Path, run: Path, kind: str, **changes: Any) -> Config:
    settings = {"condition__kind": kind, "eval__every_steps": 4, "train__max_steps": 4} | changes
    return make_config(world, run, **settings)


def samples(world: Path, config: Config) -> Any:
    """Yield (sample, image pixels, latents, index, flipped, crop) of two epochs of samples."""
    torch.manual_seed(0)
    vae, accelerator = make_vae(), Accelerator(cpu=True)
    folder, _ = read_data(
        config.data,
        condition=config.condition_files,
        inpaint_masks=config.condition.reads_mask_files,
    )
    source = condition_source(
        folder,
        config.condition,
        config.data,
        kind=config.condition_kind,
        vae=vae,
        accelerator=accelerator,
    )
    latents = cache_latents(folder, vae, config.data, accelerator=accelerator)
    images = OnlineImages(folder, crop_plan(folder, config.data), 4, LatentCodec(vae).factor)
    dataset = LatentDataset(
        images,
        folder,
        encode_caption=lambda _: {},
        transform=CaptionTransform(),
        seed=3,
        caption_dropout=0.0,
        random_flip=True,
        conditions=source,
    )
    for epoch in range(2):
        for index in range(len(folder)):
            key = SampleKey(index, epoch, index, 0, 1.0)
            flipped = bool(key.generator("flip", seed=3).random() < 0.5)
            crop = float(key.generator("crop", seed=3).random())
            pixels = images.pixels(index, flipped=flipped, crop=crop)
            yield dataset[key], pixels, latents, (index, flipped, crop)


@pytest.mark.parametrize("kind", CONDITION_KINDS)
@pytest.mark.parametrize(
    "crops", [{"data__num_crops": 3}, {"data__num_crops": 0, "data__cache": False}]
)
def test_image_condition_and_mask_never_come_apart(
    world: Path, tmp_path: Path, kind: str, crops: dict[str, Any]
) -> None:
    """Conditions made of the image's own pixels are these pixels under flip, crop and bucket."""
    files: dict[str, Any] = {"inpaint": {"condition__masks": "file", "condition__whole_masks": 0}}
    files["upscale"] = {"condition__source": "file", "condition__max_noise_level": 0}
    config = config_of(world, tmp_path, kind, **crops, **files.get(kind, {}))
    flips, shapes = set(), set()
    for sample, pixels, latents, (index, flipped, crop) in samples(world, config):
        flips.add(flipped)
        shapes.add(tuple(pixels.shape))
        image = uint8_to_pixels(pixels[None])
        if kind == "inpaint":
            assert torch.equal(sample["condition_pixels"], pixels)
            grey = np.asarray(Image.fromarray(pixels.numpy()).convert("L")) >= 128
            assert (grey == sample["hidden"][0].numpy()).mean() > 0.95  # but for its resizing
            assert (grey == sample["hidden"][0].flip(-1).numpy()).mean() < 0.95
        elif kind == "instruct_pix2pix" and config.data.cache:
            raw, _ = latents.raw_moments(index, flipped=flipped, crop=crop)
            assert torch.equal(sample["condition"], raw)
        elif kind == "instruct_pix2pix":
            assert torch.equal(sample["condition_pixels"], pixels)
        elif kind == "upscale":
            expected = F.avg_pool2d(image, 4)[0]
            assert (sample["condition"] - expected).abs().mean() < 0.02  # noised at level 0
        else:
            grey = torch.from_numpy(
                np.array(Image.fromarray(pixels.numpy()).convert("L"), np.float32) / 255
            )
            expected = depth_channels(grey[None, None], tuple(s // 4 for s in grey.shape))[0]
            torch.testing.assert_close(sample["condition"], expected, atol=1e-5, rtol=0)
    assert flips == {True, False}
    assert len(shapes) > 1


def test_a_small_condition_has_the_place_of_its_image(tmp_path: Path) -> None:
    """A low-resolution file of another size is read where the image is cropped."""
    from latentdiff.data.cache.decode_ahead import CropPlan
    from latentdiff.data.conditions import Companions, ConditionMaps
    from latentdiff.data.folder.folder import read_folder

    image = noise_image(0, width=96, height=64)
    image.save(tmp_path / "0.png")
    image.resize((24, 16), Image.Resampling.BOX).save(tmp_path / "0.condition.png")
    (tmp_path / "0.txt").write_text("x")
    folder = read_folder(tmp_path, condition="aspect")
    plan = CropPlan(np.array([[64, 64]], np.int32), (0.0, 1.0))
    own = Companions.of(folder, plan, "condition")
    maps = ConditionMaps(own.folder, own.plan, 4, "upscale")
    for crop, left in ((0.2, 0), (0.9, 8)):
        low_res = np.asarray(Image.open(tmp_path / "0.condition.png"), np.float32) / 127.5 - 1
        expected = torch.from_numpy(low_res[:, left : left + 16]).permute(2, 0, 1)
        torch.testing.assert_close(maps.mask(0, flipped=False, crop=crop), expected)
        mirrored = maps.mask(0, flipped=True, crop=crop)
        torch.testing.assert_close(mirrored, expected.flip(-1))


def test_condition_and_caption_are_dropped_alone_and_together_as_often() -> None:
    keys = [SampleKey(k, 0, k, 0, 1.0) for k in range(4000)]
    rates = {"caption_dropout": 0.1, "seed": 1}
    found = [
        (is_caption_dropped(k, **rates), is_condition_dropped(k, condition_dropout=0.1, **rates))
        for k in keys
    ]
    for which in ((True, False), (False, True), (True, True)):
        assert found.count(which) / len(keys) == pytest.approx(0.05, abs=0.012)
    assert not any(is_condition_dropped(k, condition_dropout=0.0, **rates) for k in keys)


@pytest.fixture(scope="module")
def runs(world: Path) -> dict[str, Path]:
    """A run of four steps of each kind."""
    folders = {}
    for kind in CONDITION_KINDS:
        AcceleratorState._reset_state(reset_partial_state=True)
        folders[kind] = world / kind
        assert train(config_of(world, folders[kind], kind)) == 0
    return folders


@pytest.mark.parametrize("kind", CONDITION_KINDS)
def test_a_run_measures_its_condition_use_from_step_0_and_shows_it(
    runs: dict[str, Path], kind: str
) -> None:
    use, match = (read_metrics(runs[kind], name) for name in ("condition_use", "condition_match"))
    assert list(use) == list(match) == [0, 4]
    assert use[0] == match[0] == 0.0  # the widened model equals its base
    assert use[4] != 0.0
    assert read_metrics(runs[kind], "condition_use_se").keys() == use.keys()
    (run,) = read_runs([str(runs[kind])])
    assert rise_step(run) is None or rise_step(run) > 0
    assert ("ignores its condition" in rise_text(run)) == (rise_step(run) is None)
    sheet = Image.open(runs[kind] / "samples" / "step-000000004.png")
    labels = [tile["label"] for tile in json.loads(sheet.text["tiles"])]
    assert labels[:2] == ["condition", "image 6"]
    assert labels.count("condition") == 2
    assert "image 7" in labels


@pytest.mark.parametrize(("kind", "image_guidance"), [("instruct_pix2pix", 1.5), ("depth", None)])
def test_a_sheet_shows_what_the_export_makes(
    runs: dict[str, Path], kind: str, image_guidance: float | None
) -> None:
    components = load_components(runs[kind] / "pipeline")
    pipe = LatentDiffPipeline.from_pretrained(runs[kind] / "pipeline")
    image = noise_image(3, width=32, height=32)
    read = read_condition(
        image,
        kind=kind,
        info=pipe.model_info,
        num_controlnets=0,
        noise_level=None,
        scale=None,
        num_prompts=1,
        num_images=1,
        has_image=False,
    )
    codec = LatentCodec(components.vae)
    given = read.tensors(codec, shape=(1, 4, 8, 8), generator=None, device="cpu")
    fixed = FixedCondition("image 6", given["condition"][0])
    call = {"accelerator": Accelerator(cpu=True), "seed": 0, "num_steps": 2, "guidance_scale": 4.0}
    scale = image_guidance_scale(load_config(runs[kind] / "config.yaml"))
    assert scale == image_guidance
    sheet = generate_share(
        components, ["image 6"], conditions=[fixed], image_guidance=scale, **call
    )[0]
    exported = pipe(
        "image 6",
        condition=image,
        seed=prompt_seed(0, "image 6"),
        num_inference_steps=2,
        guidance_scale=4.0,
    ).images[0]
    assert np.abs(np.asarray(sheet, float) - np.asarray(exported, float)).max() <= 1


@pytest.mark.parametrize("kind", CONDITION_KINDS)
def test_an_export_names_its_kind_and_stocks_pipeline(runs: dict[str, Path], kind: str) -> None:
    folder = runs[kind] / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == CONDITION_KINDS[kind].pipeline
    info = json.loads((folder / "latentdiff.json").read_text())
    assert info["condition_kind"] == kind
    assert ("condition_dropout", 0.1) in info.items() or kind != "instruct_pix2pix"
    pipe = LatentDiffPipeline.from_pretrained(folder)
    assert pipe.condition_kind == kind
    assert pipe.model_info.max_noise_level == (350 if kind == "upscale" else None)
    with pytest.raises(ValueError, match=f"kind {kind}|inpainting model"):
        pipe("a cat", num_inference_steps=1)
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock).__name__ == CONDITION_KINDS[kind].pipeline


@pytest.mark.parametrize("kind", CONDITION_KINDS)
def test_a_resumed_run_and_another_layout_are_the_same_run(
    world: Path, runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    whole = read_metrics(runs[kind])
    quick = {"eval__every_steps": 0, "eval__num_heldout": 1, "preview__num_steps": 1}
    for steps in (2, 4):
        config = config_of(world, tmp_path / "resumed", kind, train__max_steps=steps, **quick)
        assert train(config) == 0
    assert read_metrics(tmp_path / "resumed") == whole
    if kind in ("inpaint", "upscale"):  # whose masks, degradations and noise are random
        layout = {"train__micro_batch_size": 3, "data__num_workers": 1}
        assert train(config_of(world, tmp_path / "micro", kind, **layout, **quick)) == 0
        losses = list(read_metrics(tmp_path / "micro").values())
        assert losses == pytest.approx(list(whole.values()), rel=1e-4)


@pytest.mark.parametrize("kind", ["instruct_pix2pix", "depth"])
def test_cached_conditions_are_built_ahead_and_kept_while_in_use(
    world: Path, tmp_path: Path, kind: str
) -> None:
    settings = {"data__cache_dir": tmp_path / "cache", "data__random_flip": False}
    config = config_of(world, tmp_path / "run", kind, **settings)
    accelerator = Accelerator(cpu=True)
    built = [str(one) for one in build_caches(config, accelerator=accelerator)]
    assert "6 training conditions, " in "; ".join(built)
    assert prune_caches([config]) == []
    assert prune_caches([config_of(world, tmp_path, "none", **settings)]) != [] or (
        kind == "instruct_pix2pix"  # whose conditions are the images here: one entry for both
    )


def test_a_model_of_a_kind_is_trained_on_as_that_kind_only(
    world: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    base = {"model__vae": "", "model__pretrained": runs["depth"] / "pipeline"}
    check_components(config_of(world, tmp_path, "depth", **base))
    check_components(config_of(world, tmp_path, "depth", **base, finetune__method="lora"))
    with pytest.raises(ValueError, match=r"of the kind depth.*set condition\.kind=depth"):
        check_components(config_of(world, tmp_path, "inpaint", **base))
    with pytest.raises(ValueError, match=r"of the kind depth.*condition\.kind=none"):
        check_components(config_of(world, tmp_path, "none", **base))


def test_lora_is_refused_where_the_first_layer_must_be_trained(
    world: Path, sd_folder: Path, tmp_path: Path
) -> None:
    base = {"model__vae": "", "model__pretrained": sd_folder, "finetune__method": "lora"}
    with pytest.raises(ValueError, match=r"widens the U-Net's first layer.*finetune\.method=full"):
        check_components(config_of(world, tmp_path, "inpaint", **base))


def test_a_folder_without_conditions_is_refused_with_the_fix(world: Path, tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("x")
    config = config_of(world, tmp_path / "run", "depth", data__root=tmp_path)
    with pytest.raises(ValueError, match=r"image without a condition: 0\.png.*condition_column"):
        train(config)


@pytest.fixture(scope="module")
def control_run(world: Path, sd_folder: Path) -> tuple[Path, Path]:
    """A ControlNet's run of four steps, and its base."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = control_config(world, world / "control", sd_folder)
    assert train(config) == 0
    return world / "control", sd_folder


def control_config(world: Path, run: Path, base: Path, **changes: Any) -> Config:
    settings = {"model__vae": "", "model__pretrained": base, "finetune__method": "controlnet"}
    return config_of(world, run, "none", **settings, **changes)


def test_a_controlnet_begins_without_effect_and_stock_opens_it(
    control_run: tuple[Path, Path],
) -> None:
    run, base = control_run
    use = read_metrics(run, "condition_use")
    assert use[0] == 0.0
    assert use[4] != 0.0
    assert not (run / "pipeline").exists()
    assert verify(str(run)).is_proven
    assert json.loads((run / "controlnet" / "latentdiff.json").read_text())["condition_kind"] == (
        "controlnet"
    )
    stock = StableDiffusionControlNetPipeline.from_pretrained(
        base, controlnet=ControlNetModel.from_pretrained(run / "controlnet"), safety_checker=None
    )
    stock.set_progress_bar_config(disable=True)
    components = load_components(base)
    control, zt = torch.rand(1, 3, 32, 32), torch.randn(1, 4, 8, 8)
    fixed = FixedCondition("image 6", control[0])
    call = {"latents": zt, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    pipe = make_preview_pipeline(components, stock.controlnet)
    pipe.encoded = encoded(fixed, is_control=True)
    ours = pipe("image 6", **call).images
    theirs = stock("image 6", image=control, **call).images
    assert (ours - theirs).abs().max() < 1 / 255


def test_a_controlnet_is_resumed_exactly_and_its_base_stays(
    world: Path, control_run: tuple[Path, Path], tmp_path: Path
) -> None:
    run, base = control_run
    quick = {"eval__every_steps": 0, "eval__num_heldout": 1, "preview__num_steps": 1}
    for steps in (2, 4):
        config = control_config(world, tmp_path / "run", base, train__max_steps=steps, **quick)
        assert train(config) == 0
    assert read_metrics(tmp_path / "run") == read_metrics(run)
    names = load_file(run / "checkpoints/step-000000004/model.safetensors").keys()
    assert all(name.startswith("controlnet.") for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition__kind": "depth"}, "controlnet and condition.kind exclude each other"),
        ({"train__train_text_encoder": True}, "trains the ControlNet alone"),
        ({"model__pretrained": ""}, "needs a model that is trained already"),
    ],
)
def test_settings_that_a_controlnet_excludes_are_named(
    world: Path, sd_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"model__vae": "", "model__pretrained": sd_folder, "finetune__method": "controlnet"}
    with pytest.raises(ValueError, match=message):
        make_config(world, tmp_path, **settings | changes)


def test_triples_keep_a_controlnets_images_as_bytes_and_one_null_of_a_size() -> None:
    image = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).view(3, 32, 32)
    encoder = ConditionEncoder("controlnet", make_vae())
    kept = [fixed_condition({"control": image}, encoder)["condition"] for _ in range(2)]
    assert all(one.dtype == torch.uint8 for one in kept)
    assert encoder.null(kept[0]) is encoder.null(kept[1])
    z0 = torch.zeros(2, 4, 8, 8)
    text, t = Conditioning(torch.zeros(2, 3, 2)), torch.tensor([1, 2])
    null = [encoder.null(one) for one in kept]
    triples = Triples(z0, z0, t, text, text[:1], None, kept, null, condition_field="control")
    seen = []

    def denoise(zt: torch.Tensor, t: torch.Tensor, given: Conditioning) -> torch.Tensor:
        seen.append(given.control)
        return zt

    schedule, device = schedule_of(make_ddpm_scheduler()), torch.device("cpu")
    triple_losses(denoise, schedule, triples, prediction_type="epsilon", device=device)
    expected = torch.cat(
        [image[None].expand(8, -1, -1, -1).float() / 255, torch.zeros(2, 3, 32, 32)]
    )
    assert torch.equal(seen[0], expected)


def test_the_hidden_image_without_anything_to_see_is_encoded_once_for_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, encoded = ConditionEncoder("inpaint", make_vae()), []
    whole = LatentCodec.encode

    def encode(codec: LatentCodec, *arguments: Any) -> torch.Tensor:
        encoded.append(1)
        return whole(codec, *arguments)

    monkeypatch.setattr(LatentCodec, "encode", encode)
    first, second = (encoder.null(torch.full((5, 8, 8), float(k))) for k in range(2))
    assert torch.equal(first, second)
    assert len(encoded) == 1
    assert encoder.null(torch.zeros(5, 4, 8)).shape == (5, 4, 8)


@pytest.mark.parametrize(
    ("settings", "kind", "cached"),
    [
        ({"kind": "inpaint"}, "inpaint", False),
        ({"kind": "upscale"}, "upscale", False),
        ({"kind": "upscale", "source": "file"}, "upscale", True),
        ({"kind": "depth"}, "depth", True),
        ({"kind": "instruct_pix2pix"}, "instruct_pix2pix", True),
        ({}, "controlnet", False),
    ],
)
def test_the_plan_says_cached_of_what_a_source_caches(
    tmp_path: Path, settings: dict[str, Any], kind: str, cached: bool
) -> None:
    config = Config(condition=ConditionConfig(**settings))
    text = condition_plan(config, kind)
    assert ("cached" in text) == cached
    assert ("at every step" in text) != cached
    text = condition_plan(replace(config, data=replace(config.data, cache=False)), kind)
    assert "at every step" in text


@pytest.mark.parametrize("kind", [*CONDITION_KINDS, "controlnet"])
def test_the_device_of_the_step_makes_conditions_where_no_vae_is(kind: str) -> None:
    encoder = ConditionEncoder(kind, make_vae())
    assert encoder.uses_vae == (kind in ("inpaint", "instruct_pix2pix"))
    if encoder.uses_vae:
        return
    batch = {encoder.field: torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}
    encoder.encode(batch, device=torch.device("meta"))
    assert (batch[encoder.field].device.type == "meta") == (kind == "controlnet")
