"""The parts of the evaluation on images whose answers are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from fakes_clip import random_clip
from fakes_pipeline import tiny_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from latentdiff.data.shapes import Scene, all_scenes, render
from latentdiff.evaluation.eval_set import RealImages
from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metric_nets import (
    load_clip,
    load_dino,
    load_features,
    load_open_clip_scorer,
)
from latentdiff.evaluation.metrics.clip import Clip, wrap_open_clip
from latentdiff.evaluation.metrics.features import (
    THUMBNAILS,
    FeatureSets,
    embed_sets,
    features_from_module,
)
from latentdiff.evaluation.report.clip_score import clip_section
from latentdiff.evaluation.report.fidelity import (
    diversity_section,
    fidelity_section,
    mean_distance,
)
from latentdiff.evaluation.report.html_report import evaluation_html
from latentdiff.evaluation.report.memorization import memorization_section
from latentdiff.evaluation.report.prompt_following import (
    is_scene,
    prompt_following_section,
    scene_of,
)
from latentdiff.evaluation.report.section import ReportRow, Section, derangement, share_by_caption

CPU = torch.device("cpu")


def thumbnails(generated: Tensor, heldout: Tensor, train: Tensor | None) -> FeatureSets:
    return embed_sets(THUMBNAILS, generated, heldout, train, batch_size=64, device=CPU)


def soft_images(n: int, *, seed: int) -> Tensor:
    """Return smooth random images, (n, 3, 32, 32) uint8."""
    small = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(small, size=32, mode="bilinear")).round().byte()


def as_images(x: Tensor) -> RealImages:
    names = tuple(f"image {i}" for i in range(len(x)))
    return RealImages(names, names, ("",) * len(x), x)


def render_scenes(
    captioned: list[Scene], shown: list[Scene], *, per_caption: int = 1
) -> GeneratedImages:
    """Render scenes in place of a model."""
    rng = np.random.default_rng(0)
    images = [np.asarray(render(scene, rng)) for scene in shown for _ in range(per_caption)]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return GeneratedImages(
        tuple(s.caption for s in captioned), x.unflatten(0, (-1, per_caption)), 0
    )


def test_planted_copies_are_found_and_no_heldout_image() -> None:
    train, heldout = soft_images(300, seed=0), soft_images(120, seed=1)
    noise = torch.randint(-6, 7, (20, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    copies = (train[:200:10].int() + noise).clamp(0, 255).byte()
    images = torch.cat([copies, heldout[:20]])
    generated = GeneratedImages(tuple(map(str, range(20))), images.view(20, 2, 3, 32, 32), 0)
    features = thumbnails(generated.flat, heldout, train)
    section = memorization_section(features, generated, as_images(train), num_train_in_all=300)
    assert section.figures["copies"]["estimate"] == 0.5
    assert section.figures["false_alarms"]["estimate"] == 0
    assert all(one["is_copy"] for one in section.figures["nearest"])
    assert {len(group) for group in section.groups} == {2}
    left, right = section.groups[0]
    apart = np.asarray(left.image, float) - np.asarray(right.image, float)
    assert np.abs(apart).max() <= 6
    assert "A COPY of image" in right.note


def test_diversity_is_nought_for_one_image_and_one_for_any() -> None:
    same = soft_images(10, seed=0)[:, None].expand(-1, 3, -1, -1, -1)
    loose = soft_images(120, seed=1).view(40, 3, 3, 32, 32)
    for x, wanted in ((same, 0.0), (loose, 1.0)):
        features = thumbnails(x.flatten(0, 1), x[:, 0], None)
        section = diversity_section(features, per_caption=x.shape[1])
        assert section.figures["relative"]["estimate"] == pytest.approx(wanted, abs=0.1)
    x = torch.tensor([[[0.0, 0], [3, 4], [0, 4]]], dtype=torch.float64)
    assert float(mean_distance(x)) == pytest.approx((5 + 4 + 3) / 3)


def test_renderings_follow_their_captions_and_not_shuffled_ones() -> None:
    scenes = all_scenes()[::14]
    section, scores = prompt_following_section(
        {"heldout": render_scenes(scenes, scenes, per_caption=2)}, seed=0
    )
    figures = section.figures["heldout"]
    assert figures["all"]["estimate"] == 1
    assert figures["all"]["low"] < 1
    assert figures["all"]["num_samples"] == len(scenes)
    assert figures["shuffled_captions"]["all"]["estimate"] == 0
    assert 0.05 < figures["shuffled_captions"]["colour"]["estimate"] < 0.35
    assert scores["heldout"].values.tolist() == [1.0] * len(scenes)
    wrong, _ = prompt_following_section(
        {"heldout": render_scenes(scenes, scenes[1:] + scenes[:1])}, seed=0
    )
    assert wrong.figures["heldout"]["all"]["estimate"] == 0


def test_captions_of_the_shapes_world_are_read_back() -> None:
    pair = Scene("star", "red", "small", "teal", "above", "ring", "blue", "large")
    for scene in (all_scenes()[100], pair):
        assert scene_of(scene.caption) == scene
    assert not is_scene("a cat")


def colour_clip() -> Clip:
    """A CLIP that knows colours: an image is its mean colour, a text the colour it names."""
    colours = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}

    def embed_pixels(pixels: Tensor) -> Tensor:
        return F.normalize((pixels + 1).mean((2, 3)) + 1e-6, dim=1)

    def embed_texts(texts: Any) -> Tensor:
        return torch.tensor([colours[text] for text in texts])

    return Clip(embed_pixels, embed_texts, "colours", "0")


def test_clip_score_is_the_mean_cosine_over_captions() -> None:
    captions = ("red", "green", "blue")
    plain = torch.eye(3).mul(255).byte()[:, :, None, None].expand(-1, -1, 8, 8)
    grey = torch.full_like(plain, 128)
    generated = GeneratedImages(captions, torch.stack([plain, grey], 1), 0)  # one right, one grey
    section, score = clip_section(
        colour_clip(), generated, as_images(plain), batch_size=2, device=CPU, seed=0
    )
    wanted = 100 * (1 + 3**-0.5) / 2
    assert score.values.tolist() == pytest.approx([wanted] * 3, abs=0.01)
    figures = section.figures
    assert figures["score"]["estimate"] == pytest.approx(wanted, abs=0.01)
    assert figures["real_images"]["estimate"] == pytest.approx(100, abs=0.01)
    assert figures["shuffled_captions"]["estimate"] == pytest.approx(50 * 3**-0.5, abs=0.01)
    assert figures["recall_at_1"]["estimate"] == 1


def test_fidelity_is_best_for_the_real_images_and_knows_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 5, generator=generator)
    near, far = real + 0.01, real + torch.tensor([4.0, 0, 0, 0, 0])
    kinds = ["cat"] * 30 + ["dog"] * 25 + [""] * 5
    found = {}
    for name, generated in (("near", near), ("far", far)):
        features = FeatureSets("net", "0", generated, real, real[:50])
        section = fidelity_section(features, classes=kinds, real_classes=kinds)
        found[name] = section.figures
    assert found["near"]["heldout"]["precision"]["estimate"] > 0.95
    assert found["near"]["heldout"]["recall"]["estimate"] > 0.95
    assert found["far"]["heldout"]["fd"]["value"] == pytest.approx(16, rel=1e-4)
    assert found["far"]["heldout"]["kid"]["low"] > found["near"]["heldout"]["kid"]["high"]
    assert set(found["far"]["classes"]) == {"cat", "dog"}
    assert found["far"]["heldout"]["num_generated"] == 60
    assert "biased" in found["far"]["heldout"]["fd"]["caution"]


def test_dino_gives_the_class_token_at_its_preprocessors_size(tmp_path: Path) -> None:
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=70,
            patch_size=14,
        )
    ).eval()
    model.save_pretrained(tmp_path / "dino")
    told = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [1] * 3}
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(told))
    dino, pixels = load_dino(tmp_path / "dino"), torch.rand(2, 3, 28, 28) * 2 - 1
    with torch.no_grad():
        expected = model(pixel_values=pixels / 2).pooler_output
    torch.testing.assert_close(dino.embed(pixels), expected)
    assert (dino.name, len(dino.hash)) == ("dino", 64)
    (tmp_path / "dino" / "preprocessor_config.json").unlink()
    assert load_dino(tmp_path / "dino").embed(pixels).shape == (2, 16)
    random_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="holds a clip, expected a DINO"):
        load_dino(tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match="expected the folder of a DINO"):
        load_dino(tmp_path)


def test_features_come_from_a_transformers_folder_a_clip_or_any_module(tmp_path: Path) -> None:
    pixels = torch.rand(2, 3, 24, 24) * 2 - 1
    vit = ViTModel(
        ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    vit.save_pretrained(tmp_path / "vit")
    features = load_features(tmp_path / "vit")
    assert features.embed(pixels).shape == (2, 16)
    assert features.name == "vit"
    assert len(features.hash) == 64
    assert load_features(tmp_path / "vit").hash == features.hash
    random_clip().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    clip = load_features(tmp_path / "clip")
    expected = load_clip(tmp_path / "clip").embed_pixels(pixels)
    torch.testing.assert_close(clip.embed(pixels), expected)
    own = features_from_module(nn.AdaptiveAvgPool2d(1), "mean colour")
    torch.testing.assert_close(own.embed(pixels), pixels.mean((2, 3)))
    with pytest.raises(FileNotFoundError, match="arch"):
        load_features(tmp_path)


def test_shares_count_captions_not_images() -> None:
    answers = torch.tensor([[1, 0], [1, 1], [0, 0]]).bool()
    share = share_by_caption(answers)
    assert share.estimate == pytest.approx(0.5)
    assert share.num_samples == 3
    sure = share_by_caption(torch.ones(9, 4).bool())
    assert (sure.estimate, sure.num_samples) == (1, 9)
    assert sure.low < 0.8
    assert share_by_caption(answers[:, :1]).estimate == pytest.approx(2 / 3)


@pytest.mark.parametrize("num", [2, 3, 50])
def test_derangement_maps_no_index_to_itself(num: int) -> None:
    other = derangement(num, seed=0)
    assert sorted(other.tolist()) == list(range(num))
    assert not (other == torch.arange(num)).any()


def test_subsample_takes_different_captions() -> None:
    x = soft_images(6, seed=0)
    images = RealImages(tuple("aabbcd"), tuple("uvwxyz"), ("",) * 6, x)
    assert images.subsample(9).ids == ("u", "w", "y", "z")
    assert images.subsample(2).captions == ("a", "d")


def test_page_escapes_everything_that_others_wrote() -> None:
    bad = '<img src=x onerror="alert(1)">\x1b'
    section = Section("s", bad, {}, [ReportRow(bad, bad, bad)], [bad])
    page = evaluation_html(title=bad, facts={bad: bad}, sections=[section], skipped={bad: bad})
    assert "<img" not in page
    assert "\x1b" not in page
    assert page.count("&lt;img") >= 8


def test_open_clip_model_is_read_from_safetensors(tmp_path: Path) -> None:
    encoder = {"layers": 1, "width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "head_width": 8}
    config = {"embed_dim": 8, "vision_cfg": encoder | vision, "text_cfg": encoder | text}
    path, weights = tmp_path / "tiny-clip-of-a-test.json", tmp_path / "tiny.safetensors"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    model = open_clip.create_model(path.stem).eval()
    save_file(model.state_dict(), weights)
    clip = load_open_clip_scorer(path.stem, weights)
    pixels, captions = torch.rand(2, 3, 16, 16) * 2 - 1, ["a cat", "a red ball"]
    expected = wrap_open_clip(model, open_clip.get_tokenizer(path.stem))
    torch.testing.assert_close(clip.score(pixels, captions), expected.score(pixels, captions))
    assert clip.name == "open_clip tiny-clip-of-a-test"
    save_file({"logit_scale": torch.zeros(())}, weights)
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_open_clip_scorer(path.stem, weights)
