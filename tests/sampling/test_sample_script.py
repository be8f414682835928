"""The sample command makes sheets and folders, continues where it stopped, and names bad input."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from fakes_pipeline import lora_weights, tiny_pipeline
from fakes_scripts import run_script
from PIL import Image, PngImagePlugin

from latentdiff.image_grid import draw_grid
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import attach_settings, read_settings, save_png
from latentdiff.sampling.open_pipeline import open_pipeline
from latentdiff.sampling.prompt_list import PromptEntry, plan_jobs, read_prompt_entries


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def run(*arguments):
    """Run the script in this process; return its exit status."""
    return run_script("sample.py", *arguments)


def test_sheet_is_written_and_printed(model, tmp_path, capsys):
    out = tmp_path / "new" / "sheet.png"
    assert run(model, "a red heart", "ein Herz ♥ 漢字 🎈", "--out", out, "--steps", 2) == 0
    assert str(out) in capsys.readouterr().out
    assert Image.open(out).size[0] > 2 * 128


def test_an_empty_prompt_makes_an_image_and_is_warned_of_once(model, tmp_path, caplog):
    assert run(model, "", "a cat", " ", "--out", tmp_path / "sheet.png", "--steps", 1) == 0
    assert caplog.text.count("the prompt is empty: an image of no prompt") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "num_inference_steps"),
        (["--guidance_scale", "nan"], "guidance_scale"),
        (["--seed", "-4"], "seed"),
        (["--scheduler", "ddmi"], "no scheduler 'ddmi'"),
        (["--sampler", "ddmi"], "no scheduler 'ddmi'"),
        (["--sampler=ddmi"], "no scheduler 'ddmi'"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--dtype", "int8"], "dtype"),
        (["--device", "nonsense"], "device"),
        (["--stepz", "3"], "stepz"),
        (["--num_images", "0"], "num_images"),
    ],
)
def test_bad_input_is_one_line_and_status_two(model, tmp_path, capsys, arguments, message):
    assert run(model, "a cat", "--out", tmp_path / "sheet.png", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "sheet.png").exists()


def test_missing_model_is_status_two(tmp_path, capsys):
    assert run(tmp_path / "nowhere", "a cat", "--out", tmp_path / "sheet.png") == 2
    assert "nowhere" in capsys.readouterr().err


def lora_weights_of_unet():
    return {name.removeprefix("unet."): value for name, value in lora_weights().items()}


def records(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_prompts_of_a_file_fill_a_folder_and_a_second_run_completes_it(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a cat"}, {"prompt": "a red heart", "seed": 40, "negative_prompt": "sea"}]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    folder = tmp_path / "images"
    arguments = [model, "--prompt_file", prompts, "--out", folder, "--steps", 1, "--json"]
    arguments += ["--num_images", 2, "--batch_size", 3]
    assert run(*arguments) == 0
    made = records(capsys)
    assert [record["kind"] for record in made] == ["image"] * 4 + ["folder"]
    assert [record["seed"] for record in made[:4]] == [0, 1, 40, 41]
    assert made[2]["negative_prompt"] == "sea"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "000002.png").unlink()
    assert run(*arguments) == 0
    again = records(capsys)
    assert [Path(record["path"]).name for record in again] == ["000002.png", "images"]
    assert again[-1]["made"] == 1
    for path, content in before.items():
        if path.name != "000002.png":
            assert path.read_bytes() == content


def test_image_of_other_settings_is_not_written_over(model, tmp_path, capsys):
    folder = tmp_path / "images"
    assert run(model, "a cat", "--out", folder, "--steps", 1) == 0
    before = (folder / "000000.png").read_bytes()
    assert run(model, "a dog", "--out", folder, "--steps", 2) == 2
    error = capsys.readouterr().err
    assert "000000.png is an image of another num_inference_steps, prompt" in error
    assert (folder / "000000.png").read_bytes() == before


OTHER_SETTINGS = [
    (["--scheduler", "euler"], "scheduler"),
    (["--height", 16], "height"),
    (["--width", 16], "width"),
    (["--guidance_rescale", 0.5], "guidance_rescale"),
    (["--guidance_interval", "[0.1,0.8]"], "guidance_interval"),
    (["--long_prompts", "chunks"], "long_prompts"),
    (["--prompt_weighting", "false"], "prompt_weighting"),
    (["--lora_scale", 0.5], "lora_scale"),
    (["--negative_prompt", "sea"], "negative_prompt"),
    (["--guidance_scale", 2], "guidance_scale"),
    (["--seed", 1], "seed"),
    (["--dtype", "bfloat16"], "dtype, --dtype float32"),
    (["--image", "photo.png"], "strength, image"),
    (["--lora", "lora"], "model"),
]


@pytest.mark.parametrize(("changes", "named"), OTHER_SETTINGS, ids=lambda one: str(one)[:24])
def test_an_image_of_any_other_setting_is_not_taken_for_done(
    model, tmp_path, capsys, changes, named
):
    Image.effect_noise((32, 32), 60).save(tmp_path / "photo.png")
    torch.manual_seed(0)
    LatentDiffPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=lora_weights_of_unet())
    out = tmp_path / "images"
    arguments = [model, "a (red:2) heart", "--out", out, "--steps", 2, "--dtype", "float32"]
    assert run(*arguments) == 0
    assert run(*arguments, "--json") == 0
    assert records(capsys)[-1]["made"] == 0
    given = [tmp_path / one if one in ("photo.png", "lora") else one for one in changes]
    assert run(*arguments, *given) == 2
    assert f"is an image of another {named};" in capsys.readouterr().err


def test_an_image_from_another_image_or_mask_is_not_taken_for_done(model, tmp_path, capsys):
    for k in range(2):
        Image.effect_noise((32, 32), 60 + 20 * k).save(tmp_path / f"photo{k}.png")
        Image.new("L", (32, 32), 255 * k).save(tmp_path / f"mask{k}.png")
    out = tmp_path / "images"
    arguments = [model, "a cat", "--out", out, "--steps", 2, "--strength", 0.5]
    photo, mask = ["--image", tmp_path / "photo0.png"], ["--mask", tmp_path / "mask1.png"]
    assert run(*arguments, *photo, *mask) == 0
    assert run(*arguments, *photo, *mask, "--json") == 0
    assert records(capsys)[-1]["made"] == 0
    for others, named in (
        (["--image", tmp_path / "photo1.png", *mask], "image"),
        ([*photo, "--mask", tmp_path / "mask0.png"], "mask_image"),
        ([*photo, *mask, "--strength", 0.75], "strength"),
        ([*photo, *mask, "--padding_mask_crop", 4], "padding_mask_crop"),
        ([*photo, *mask, "--keep_unmasked", "true"], "keep_unmasked"),
        (photo, "mask_image"),
    ):
        assert run(*arguments, *others) == 2
        assert f"is an image of another {named};" in capsys.readouterr().err


def test_a_folder_of_an_older_version_is_completed(model, tmp_path, capsys):
    """Settings that did not exist then are the defaults; images to start from were not kept."""
    out = tmp_path / "images"
    arguments = [model, "a cat", "--out", out, "--steps", 1]
    assert run(*arguments) == 0
    old = read_settings(out / "000000.png")
    for name in ("guidance_rescale", "guidance_interval", "eta"):
        del old["call"][name]
    old["call"]["long_prompts"] = "cut"
    with Image.open(out / "000000.png") as image:
        save_png(attach_settings(image.copy(), old), out / "000000.png")
    assert run(*arguments, "--json") == 0
    assert records(capsys)[-1]["made"] == 0


def test_a_sheet_among_the_images_of_a_folder_is_named(model, tmp_path, capsys):
    out = tmp_path / "images"
    assert run(model, "a cat", "a dog", "--out", out / "000000.png", "--steps", 1) == 0
    before = (out / "000000.png").read_bytes()
    assert run(model, "a cat", "--out", out, "--steps", 1) == 2
    assert "000000.png is a sheet of 2 images, expected one image" in capsys.readouterr().err
    attach = {"call": {"seed": 0}, "model": ["no", "object"], "scheduler": 3, "inputs": "text"}
    save_png(attach_settings(Image.new("RGB", (4, 4)), attach), out / "000000.png")
    assert run(model, "a cat", "--out", out, "--steps", 1) == 2
    assert "000000.png is an image of another" in capsys.readouterr().err
    assert before != (out / "000000.png").read_bytes()


def test_traces_that_a_folder_lacks_are_made(model, tmp_path, capsys):
    arguments = [model, "a cat", "--out", tmp_path, "--steps", 1]
    assert run(*arguments) == 0
    assert run(*arguments, "--trace", "true") == 0
    names = {"000000.png", "000000.trace.png", "000000.attention.png", "metadata.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    capsys.readouterr()
    assert run(*arguments, "--trace", "true", "--json") == 0
    assert records(capsys)[-1]["made"] == 0


def test_grid_has_an_image_for_each_pair_and_one_seed(model, tmp_path):
    out = tmp_path / "grid.png"
    arguments = ["--steps", "[1,2]", "--guidance_scale", "[1,3,7]", "--seed", 5]
    assert run(model, "a cat", "--out", out, *arguments) == 0
    calls = [settings["call"] for settings in read_settings(out)]
    pairs = [(call["num_inference_steps"], call["guidance_scale"]) for call in calls]
    assert pairs == [(steps, scale) for steps in (1, 2) for scale in (1, 3, 7)]
    assert {call["seed"] for call in calls} == {5}


def test_images_start_from_an_image(model, tmp_path):
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.effect_noise((32, 32), 60).save(photo)
    Image.new("L", (32, 32), 255).save(mask)
    out = tmp_path / "sheet.png"
    arguments = ["--image", photo, "--strength", 0.5, "--steps", 4, "--scheduler", "euler a"]
    assert run(model, "a cat", "--out", out, *arguments) == 0
    assert read_settings(out)[0]["call"]["strength"] == 0.5
    assert read_settings(out)[0]["scheduler"]["class"] == "EulerAncestralDiscreteScheduler"
    assert run(model, "a cat", "--out", out, *arguments, "--mask", mask) == 0


def test_trace_writes_the_chain_and_the_heat_maps(model, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert run(model, "a red heart", "a cat", "--out", out, "--steps", 2, "--trace", "true") == 0
    names = {path.name for path in tmp_path.iterdir()}
    parts = {f"sheet.00000{k}.{kind}.png" for k in (0, 1) for kind in ("trace", "attention")}
    assert names == {"sheet.png"} | parts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", b"\n \n", "holds no prompts"),
        ("list.txt", b"a cat\n\xff\xfe", "list.txt is not UTF-8 text: byte 6"),
        ("list.jsonl", b'{"prompt": "a"}\n{', "line 2 is not valid JSON"),
        ("list.jsonl", b'{"text": "a"}', 'line 1 must be an object with a text "prompt"'),
        ("list.jsonl", b'{"prompt": "a", "sed": 3}', "unknown entries \\['sed'\\]"),
    ],
)
def test_bad_prompt_list_is_an_error_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompt_entries(path)


def test_seeds_of_a_list_do_not_depend_on_the_grid():
    lines = [PromptEntry("a"), PromptEntry("b"), PromptEntry("c", seed=90)]
    settings = {"seed": 3, "negative_prompt": None, "num_images": 2}
    plain = plan_jobs(lines, steps=[5], guidance_scales=[1.0], **settings)
    grid = plan_jobs(lines, steps=[5, 6], guidance_scales=[1.0, 2.0], **settings)
    assert [job.seed for job in plain] == [3, 4, 5, 6, 90, 91]
    assert {(job.prompt, job.seed) for job in grid} == {(job.prompt, job.seed) for job in plain}


def test_labels_wrap_and_images_keep_their_place():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    sheet = draw_grid([red, blue], ["short", "a rather long label " * 9], columns=2)
    assert sheet.getpixel((20, 20)) == (255, 0, 0)
    assert sheet.getpixel((20 + 128 + 8, 20)) == (0, 0, 255)
    one = draw_grid([red], ["short"], columns=4)
    assert one.height < sheet.height
    assert one.width < sheet.width


@pytest.mark.parametrize("label", ["", "\ud800", "\x00\n", "x" * 500, "🎈" * 60, "مرحبا"])
def test_any_label_can_be_shown(label):
    draw_grid([Image.new("RGB", (16, 16))], [label], columns=1)


def test_sheet_without_images_is_refused():
    with pytest.raises(ValueError, match="0 images"):
        draw_grid([], [], columns=2)


@pytest.fixture
def compile_by(monkeypatch):
    """Let UNets be compiled by another of torch's backends than the one that needs a compiler."""

    def choose(backend):
        def compile_(module, **settings):
            torch.nn.Module.compile(module, backend=backend, **settings)

        monkeypatch.setattr(UNet2DConditionModel, "compile", compile_)

    torch.compiler.reset()
    yield choose
    torch.compiler.reset()


def test_compiled_images_are_the_same_and_one_size_is_compiled(model, tmp_path, capsys, compile_by):
    compiled_for = []

    def backend(graph, inputs):
        compiled_for.extend(len(x) for x in inputs if x.ndim == 4 and x.shape[1:] == (4, 8, 8))
        return graph

    compile_by(backend)
    prompts = ["a cat", "a dog", "a red heart"]
    common = [*prompts, "--steps", 2, "--batch_size", 2, "--dtype", "float32"]
    assert run(model, *common, "--out", tmp_path / "compiled", "--compile", "true") == 0
    printed = capsys.readouterr().err
    assert "compiling the U-Net" in printed
    assert "compiled in" in printed
    assert compiled_for == [4]
    assert run(model, *common, "--out", tmp_path / "plain") == 0
    assert len(list((tmp_path / "compiled").glob("*.png"))) == 3
    for path in (tmp_path / "plain").glob("*.png"):
        one, other = (
            np.asarray(Image.open(p), int) for p in (path, tmp_path / "compiled" / path.name)
        )
        assert np.abs(one - other).max() <= 1


def test_a_image_to_start_from_is_compiled_for_as_well(model, tmp_path, compile_by):
    compile_by("eager")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "start.png")
    common = ["a cat", "--image", tmp_path / "start.png", "--steps", 2, "--compile", "true"]
    assert run(model, *common, "--out", tmp_path / "sheet.png") == 0


def test_prompts_are_read_once(model, tmp_path):
    fifo = tmp_path / "prompts.txt"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=["a cat\n"])
    writer.start()
    assert run(model, "--prompt_file", fifo, "--out", tmp_path / "sheet.png", "--steps", 1) == 0
    writer.join()


def test_a_folder_of_another_dtype_is_named(model, tmp_path, capsys):
    common = [model, "a cat", "--out", tmp_path / "images", "--steps", 1, "--dtype"]
    assert run(*common, "float32") == 0
    capsys.readouterr()
    assert run(*common, "bfloat16") == 2
    assert "--dtype float32" in capsys.readouterr().err
    assert run(*common, "float32") == 0


def test_a_failed_compilation_is_one_error_line(model, tmp_path, capsys, compile_by):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    compile_by(backend)
    assert run(model, "a cat", "--out", tmp_path / "a.png", "--steps", 1, "--compile", "true") == 2
    error = capsys.readouterr().err
    assert "compile=true is not possible here: no compiler here" in error
    assert "Traceback" not in error
    assert (
        run(model, "a cat", "--out", tmp_path / "a.png", "--compile", "true", "--trace", "true")
        == 2
    )
    assert "trace" in capsys.readouterr().err


def test_auto_takes_bf16_where_the_processor_has_it(model, monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        pipe = open_pipeline(str(model), dtype="auto", device="cpu", fast=True)
        assert pipe.unet.dtype == dtype
        assert pipe.fast_cpu.is_on


def test_settings_of_an_image_are_used_but_for_those_given(model, tmp_path, capsys):
    first, out = tmp_path / "first", tmp_path / "again"
    given = ["--steps", 2, "--seed", 7, "--guidance_scale", 3, "--scheduler", "dpm++2m-karras"]
    assert run(model, "a cat", "--out", first, "--negative_prompt", "sea", *given) == 0
    assert run(model, "--settings_from", first / "000000.png", "--out", out) == 0
    assert run(model, "--settings_from", first / "000000.png", "--out", out) == 0  # is complete
    assert (out / "000000.png").read_bytes() == (first / "000000.png").read_bytes()
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a dog\nSteps: 2, Sampler: LMS, CFG scale: 4, Seed: 5")
    Image.new("RGB", (4, 4)).save(tmp_path / "webui.png", pnginfo=chunks)
    sheet = tmp_path / "sheet.png"
    assert run(model, "--settings_from", tmp_path / "webui.png", "--seed", 6, "--out", sheet) == 0
    call = read_settings(sheet)[0]["call"]
    assert [call[key] for key in ("prompt", "seed", "guidance_scale")] == ["a dog", 6, 4]
    assert run(model, "--settings_from", model, "--out", sheet) == 2
    assert "Traceback" not in capsys.readouterr().err
