"""The geometric judge: exact on clean renderings, tolerant of soft ones, silent on garbage."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from latentdiff.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SIZES,
    Scene,
    all_scenes,
    render,
    sample_pair,
)
from latentdiff.evaluation.metrics.shapes_judge import (
    SceneReading,
    accuracy,
    follows,
    judge_image,
    shape_centres,
)

SINGLE = Scene("star", "red", "large", "teal")
PAIR = Scene("star", "red", "small", "teal", "left of", "ring", "blue", "large")


def pairs(count: int) -> list[Scene]:
    """Pairs of all relations and sizes, among them shapes of one kind and one colour."""
    rng = np.random.default_rng(0)
    scenes = [sample_pair(rng, is_heldout=False) for _ in range(count)]
    return [
        replace(
            scene,
            relation=RELATIONS[i % 4],
            other_kind=scene.other_kind if i % 5 else scene.kind,
            other_colour=scene.other_colour if i % 3 else scene.colour,
        )
        for i, scene in enumerate(scenes)
    ]


SCENES = all_scenes() + pairs(100)
SOME = all_scenes()[::4] + pairs(60)


def render_images(scenes: list[Scene], *, seed: int = 0, size_px: int = 64) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [render(scene, rng, size_px=size_px) for scene in scenes]


def noisy(image: Image.Image, rng: np.random.Generator, *, strength: float) -> Image.Image:
    pixels = np.asarray(image) + rng.normal(0, strength, (*image.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_every_clean_rendering_is_read_exactly():
    assert set(accuracy(render_images(SCENES), SCENES).values()) == {1.0}


def test_blur_keeps_the_reading():
    blurred = [image.filter(ImageFilter.GaussianBlur(1.5)) for image in render_images(SOME)]
    assert min(accuracy(blurred, SOME).values()) >= 0.95


@pytest.mark.parametrize("blur", [0.0, 1.5])
def test_noise_keeps_the_reading(blur: float):
    rng = np.random.default_rng(1)
    soft = [image.filter(ImageFilter.GaussianBlur(blur)) for image in render_images(SOME)]
    images = [noisy(image, rng, strength=15) for image in soft]
    assert min(accuracy(images, SOME).values()) >= 0.95


def test_small_colour_shifts_keep_the_reading():
    rng = np.random.default_rng(2)
    shifted = []
    for image in render_images(SOME):
        pixels = 0.92 * np.asarray(image) + 8 + rng.uniform(-12, 12, 3)
        shifted.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert min(accuracy(shifted, SOME).values()) >= 0.95


@pytest.mark.parametrize("size_px", [48, 128, 200])
def test_the_image_s_size_does_not_matter(size_px: int):
    scenes = SOME[::3]
    assert min(accuracy(render_images(scenes, size_px=size_px), scenes).values()) == 1.0


def test_an_array_reads_as_its_image():
    [image] = render_images([SINGLE])
    assert (
        judge_image(np.asarray(image))
        == judge_image(image)
        == SceneReading("star", "red", "large", "teal")
    )


def test_two_shapes_are_read_left_or_upper_first():
    [image] = render_images([replace(PAIR, relation="below")])
    assert judge_image(image) == SceneReading(
        "ring", "blue", "large", "teal", "above", "star", "red", "small"
    )


def test_the_centres_of_shapes_are_mirrored_with_the_image():
    for scene, num in ((SINGLE, 1), (PAIR, 2)):
        image = render(scene, np.random.default_rng(0))
        centres = shape_centres(image)
        assert len(centres) == num
        mirrored = shape_centres(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        expected = [(1 - x, y) for x, y in centres[::-1]]
        np.testing.assert_allclose(mirrored, expected, atol=0.005)
    first, other = (shape_centres(render(SINGLE, np.random.default_rng(k)))[0] for k in (0, 1))
    assert np.abs(np.subtract(first, other)).max() > 0.05
    assert shape_centres(Image.new("RGB", (64, 64), BACKGROUNDS["pink"])) == []


def test_an_empty_image_shows_its_background_alone():
    assert judge_image(Image.new("RGB", (64, 64), BACKGROUNDS["pink"])) == SceneReading(
        background="pink"
    )


def test_colours_without_a_name_are_not_read():
    pixels = np.full((64, 64, 3), (120, 20, 250), np.uint8)
    pixels[20:44, 20:44] = (0, 255, 120)
    reading = judge_image(pixels)
    assert (reading.background, reading.colour, reading.kind) == (None, None, "square")


def test_shapes_of_no_size_are_named_without_a_size():
    pixels = np.full((64, 64, 3), BACKGROUNDS["white"], np.uint8)
    pixels[27:37, 27:37] = COLOURS["red"]
    assert judge_image(pixels) == SceneReading("square", "red", None, "white")


def test_garbage_has_no_kind():
    rng = np.random.default_rng(3)
    across, down = np.meshgrid(*[np.arange(64) - 31.5] * 2)
    ground, colour = np.array(BACKGROUNDS["white"]), np.array(COLOURS["blue"])
    named = 0
    for _ in range(40):  # soft ellipses, and snow
        width, height = rng.uniform(6, 12, 2)
        blob = np.exp(-((across / width) ** 2 + (down / height) ** 2) / 2)[..., None]
        named += (
            judge_image((blob * colour + (1 - blob) * ground).astype(np.uint8)).kind is not None
        )
        named += judge_image(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).kind is not None
    assert named == 0


def test_three_shapes_are_no_scene():
    pixels = np.full((64, 64, 3), BACKGROUNDS["white"], np.uint8)
    for x, y in ((4, 4), (40, 4), (22, 40)):
        pixels[y : y + 16, x : x + 16] = COLOURS["red"]
    assert judge_image(pixels) == SceneReading(background="white")


def test_a_torn_shape_is_still_one():
    pixels = np.array(render_images([Scene("ring", "blue", "large", "white")])[0])
    is_blue = np.linalg.norm(pixels - np.array(COLOURS["blue"]), axis=2) < 100
    middle = int(np.argwhere(is_blue).mean(axis=0)[0])
    pixels[middle : middle + 3] = BACKGROUNDS["white"]
    assert judge_image(pixels) == SceneReading("ring", "blue", "large", "white")


def test_follows_names_each_attribute_of_the_caption():
    reading = SceneReading("star", "blue", "large", "teal")
    assert follows(reading, SINGLE) == {
        "kind": True,
        "colour": False,
        "size": True,
        "background": True,
        "all": False,
    }


def test_a_relation_may_be_named_from_either_side():
    reading = SceneReading("star", "red", "small", "teal", "left of", "ring", "blue", "large")
    told_back = Scene("ring", "blue", "large", "teal", "right of", "star", "red", "small")
    assert follows(reading, PAIR)["all"]
    assert follows(reading, told_back)["all"]
    assert not follows(reading, replace(told_back, relation="left of"))["all"]
    wrong = follows(reading, replace(PAIR, relation="above"))
    assert [name for name, shown in wrong.items() if not shown] == ["relation", "all"]


def test_the_number_of_shapes_must_agree():
    one, two = render_images([SINGLE, PAIR])
    assert not follows(judge_image(two), SINGLE)["all"]
    assert not follows(judge_image(one), PAIR)["all"]


def test_other_scenes_captions_score_at_chance():
    scenes = all_scenes()[::5]
    order = np.random.default_rng(4).permutation(len(scenes))
    scores = accuracy(render_images(scenes), [scenes[i] for i in order])
    for name, num_values in (("kind", 6), ("colour", 6), ("size", 2), ("background", 7)):
        assert scores[name] == pytest.approx(1 / num_values, abs=0.15)
    assert scores["all"] < 0.05
    assert (len(KINDS), len(COLOURS), len(SIZES), len(BACKGROUNDS)) == (6, 6, 2, 7)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), got float64 \(8, 8, 3\)"):
        judge_image(np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="1 images and 2 scenes"):
        accuracy(render_images([SINGLE]), [SINGLE, PAIR])
