"""A PNG file carries what made it."""

import logging

import numpy as np
import pytest
from fakes_pipeline import tiny_pipeline
from PIL import Image

from latentdiff.pipeline import checks
from latentdiff.pipeline.png_metadata import attach_settings, read_settings, save_png


def test_plainly_saved_image_carries_its_settings_and_can_be_made_again(tmp_path):
    pipe = tiny_pipeline()
    pipe.set_scheduler("euler a")
    result = pipe(
        ["a red heart", "Ünïcode ♥ 漢字"],
        negative_prompt="sea",
        seed=[4, 9],
        num_images_per_prompt=1,
        num_inference_steps=3,
        guidance_scale=3.5,
        guidance_interval=(0.1, 0.9),
    )
    path = tmp_path / "image.png"
    result.images[1].save(path)
    settings = read_settings(path)
    assert settings == result.settings[1]
    assert settings["call"]["prompt"] == "Ünïcode ♥ 漢字"
    assert settings["call"]["seed"] == 9
    assert settings["scheduler"]["class"] == "EulerAncestralDiscreteScheduler"
    assert len(settings["model"]["fingerprint"]) == 16
    again = pipe(**settings["call"]).images[0]
    difference = np.abs(np.asarray(again, int) - np.asarray(Image.open(path), int))
    assert difference.max() <= 1


def test_settings_of_an_older_image_make_it_again(tmp_path, caplog):
    pipe = tiny_pipeline()
    call = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2}
    image = pipe(**call).images[0]
    old = read_settings(image)
    old["call"]["long_prompts"] = "cut"  # its name then
    path = save_png(attach_settings(image.copy(), old), tmp_path / "old.png")
    checks._warn_of_cut.cache_clear()
    with caplog.at_level(logging.WARNING, logger="latentdiff"):
        again = [pipe(**read_settings(path)["call"]) for _ in range(2)]
    assert all(np.array_equal(one.images[0], image) for one in again)
    assert again[0].settings[0]["call"]["long_prompts"] == "truncate"
    assert [record.message for record in caplog.records] == [
        'long_prompts="cut" is now called "truncate"; the old name still works'
    ]


def test_fingerprint_changes_with_the_weights():
    pipe = tiny_pipeline()
    call = {"prompt": "a cat", "num_inference_steps": 1, "seed": 1}
    first, same = pipe(**call), pipe(**call)
    pipe.unet.conv_in.weight.data += 1e-3
    other = pipe(**call)
    marks = [result.settings[0]["model"]["fingerprint"] for result in (first, same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_settings_survive_a_copy_and_an_atomic_write(tmp_path):
    image = attach_settings(Image.new("RGB", (4, 4)), {"call": {"seed": 1}})
    assert read_settings(image.copy()) == {"call": {"seed": 1}}
    path = save_png(image, tmp_path / "new" / "one.png")
    assert read_settings(path) == read_settings(image)
    assert [file.name for file in path.parent.iterdir()] == ["one.png"]


def test_other_formats_still_save(tmp_path):
    image = attach_settings(Image.new("RGB", (4, 4)), {"call": {}})
    for name in ("one.jpg", "one.webp", "one.png"):
        image.save(tmp_path / name)


def test_files_without_settings_are_errors_by_kind(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    broken = attach_settings(Image.new("RGB", (4, 4)), {})
    broken.info["latentdiff"] = "{"
    with pytest.raises(ValueError, match=r"plain.png holds no settings"):
        read_settings(tmp_path / "plain.png")
    for name in ("text.png", "empty.png"):
        with pytest.raises(ValueError, match="not a readable image"):
            read_settings(tmp_path / name)
    with pytest.raises(ValueError, match="damaged settings"):
        read_settings(broken)
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "nowhere.png")


def test_truncated_png_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "cut.png"
    attach_settings(Image.effect_noise((64, 64), 50), {"call": {}}).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises((ValueError, OSError), match=r"cut\.png|truncated"):
        read_settings(path)
