"""Errors become exit codes in one place; commands show nothing of the libraries but errors."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from fakes_app import write_run
from fakes_data import captioned_folder, save_image
from jsonargparse import ArgumentParser

from latentdiff.cli.command import run_command, take_options
from latentdiff.cli.main import main
from latentdiff.config.options import SampleOptions, WebUIOptions
from latentdiff.config.yaml_file import find_config
from latentdiff.program import program
from latentdiff.training.inputs.workers import DeadWorkerError

SHOW = """
import sys
from latentdiff.cli.command import quieten_libraries
quieten_libraries()
from transformers import CLIPTextModel
import diffusers, huggingface_hub, transformers
CLIPTextModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
for library in (diffusers, transformers):
    logger = library.utils.logging.get_logger(f"{library.__name__}.models")
    logger.warning("a warning")
    logger.error("an error")
print(huggingface_hub.utils.are_progress_bars_disabled())
"""


def test_bars_and_warnings_are_silent_and_errors_and_downloads_are_not(
    sd_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SHOW, str(sd_folder / "text_encoder"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout.strip() == "False"
    assert done.stderr.count("an error") == 2
    assert "a warning" not in done.stderr
    assert "it/s" not in done.stderr  # "Loading weights", "Writing model shards"


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that raises."""

    def command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
        """Fail."""
        raise error

    return run_command(command, [], prog="latentdiff fail")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such\n name"), 2),
        (FileNotFoundError("no such file"), 2),
        (FloatingPointError("no such number"), 1),
        (DeadWorkerError("no such worker"), 1),
    ],
)
def test_a_foreseen_error_is_a_message_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(error) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"latentdiff fail: {error}\n")


def test_an_interrupted_command_ends_silently_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_an_unforeseen_error_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        code_of(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["zzz"], "known: demo, "),
        (["export", "pak"], "unknown command export pak; did you mean export pack?"),
        (["export"], "export is a family of commands: export single-file, "),
        (["train", "--train.sed=1"], "did you mean train.seed?"),
        (["inspect", "DIR", "--jsn"], "did you mean json?"),
        (["train", "--train.max_step=5"], "did you mean train.max_steps?"),
        (["inspect", "DIR", "--jso"], "did you mean json?"),
        (["sample", "MODEL", "a cat", "--out=a.png", "--step=3"], "--step"),
        (["cache", "clean"], "invalid choice: 'clean'"),
        (["sample", "MODEL", "a cat"], "add --out sheet.png"),
        (
            ["train"],
            f"begin with a preset: {program()} train --config lora_mini --data.root=photos;",
        ),
        (["train", "--network_dim=8"], "(diffusers, kohya) is finetune.lora_rank here"),
        (["train", "--finetune.network_alpha=8"], "is finetune.lora_alpha here"),
        (["train", "--validation_prompts=x"], "is preview.prompts here"),
        (["train", "--lora_rank=8"], "did you mean finetune.lora_rank?"),
        (["train", "--zzzz=8"], "search: latentdiff train --help WORD"),
        (["sample", "MODEL", "a cat", "--out=a.png", "--seed=first"], "seed"),
        (["export", "merge", "BASE", "--out=a"], "arguments are required: loras"),
        (["export", "pack", "MODEL", "--out=a", "--max_file_mb=much"], "max_file_mb"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("latentdiff")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train --model.vae=latentdiff-vae --data absent", "check --data.root"),
        ("train --model.vae=latentdiff-vae --data=absent", "check --data.root"),
        ("train --model.vae=latentdiff-vae --data {root:\u00a0absent}", "check --data.root"),
        ("train --seed=-1", "train.seed=-1, expected"),
        ("sample latentdiff-mini x --out=a.png --steps=0", "num_inference_steps must be"),
        ("sample latentdiff-mini x --output_dir=a.gif", "out=a.gif must be"),
        ("sample latentdiff-mini x --out=a.png --sampler=x", "scheduler"),
        ("evaluate latentdiff-mini --data.root=absent --output_dir=o --steps=0", "num_inference_"),
        ("demo swiss-roll --steps=0", "max_steps=0"),
        ("sample latentdiff-mini x --outs=a.png", "did you mean --out?"),
        ("train --dat=x", "unknown setting dat"),
    ],
)
def test_a_common_option_is_known_under_its_other_spellings(
    given: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("\u00a0", " ") for word in given.split(" ")]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "train-vae", "train-clip"])
def test_a_run_is_written_to_out_as_to_output_dir(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--out", "there", "--print_config"]) == 0
    assert "\noutput_dir: there\n" in capsys.readouterr().out


def test_options_are_taken_out_of_the_parsed_values() -> None:
    parser = ArgumentParser()
    parser.add_argument("model", type=str)
    parser.add_class_arguments(SampleOptions)
    values = parser.parse_args(["m", "--out=a.png", "--num_inference_steps=[1, 2]"]).as_dict()
    assert take_options(SampleOptions, values) == SampleOptions(
        out="a.png", num_inference_steps=[1, 2]
    )
    assert values == {"model": "m"}
    with pytest.raises(KeyError):
        take_options(WebUIOptions, values)


# ---- ~ in paths ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and, elsewhere, a current folder; shells leave the ~ of --option=~/x alone."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_commands_read_and_write_below_the_home_folder(home: Path) -> None:
    for name in ("a", "b"):
        captioned_folder(home / name, 4)
    (home / "config.yaml").write_text("data: {cache_dir: ~/cache}\n")
    options = ["--config=~/config.yaml", "--html=~/report.html", "--quick"]
    assert main(["inspect", "~/a", *options]) == 0
    assert (home / "report.html").is_file()
    assert (home / "cache").is_dir()
    assert main(["convert", "merge-folders", "~/merged", "~/a", "~/b"]) == 0
    assert len(list((home / "merged").rglob("*.png"))) == 8
    assert not list(Path.cwd().iterdir())


def test_a_model_and_a_run_below_the_home_folder_are_opened(home: Path, sd_folder: Path) -> None:
    for name in ("model", "run/pipeline"):
        shutil.copytree(sd_folder, home / name)
    for name in ("model", "run"):
        assert main(["export", "pack", f"~/{name}", f"--out=~/{name}-packed"]) == 0
        assert (home / f"{name}-packed" / "model_index.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "~/absent"),
        ("convert", "merge-folders", "~/out", "~/absent"),
        ("cache", "--config=~/absent"),
        ("cache", "--config", "~/absent"),
        ("cache", "prune", "--also=~/absent"),
        ("train", "--data.root=~/absent", "--model.vae=latentdiff-vae", "--output_dir=~/run"),
        ("train-vae", "--roots=[~/absent]", "--output_dir=~/run"),
        ("train-clip", "--roots=[~/absent]", "--output_dir=~/run"),
        ("sample", "~/absent", "x", "--out=~/x.png"),
        ("sample", "latentdiff-mini", "--prompt_file=~/absent", "--out=~/x.png"),
        ("sample", "latentdiff-mini", "x", "--image=~/absent", "--out=~/x.png"),
        ("sample", "latentdiff-mini", "x", "--lora=~/absent", "--out=~/x.png"),
        ("app", "latentdiff-mini", "--loras=~/absent"),
        ("evaluate", "latentdiff-mini", "--data=~/absent", "--out=~/out"),
        ("export", "card-sheets", "--score", "~/absent", "~/absent"),
        ("export", "single-file", "~/absent", "--out=~/x.safetensors"),
        ("export", "merge", "latentdiff-mini", "~/absent", "--out=~/out"),
        ("export", "pack", "~/absent", "--out=~/out"),
        ("export", "ema", "~/absent", "--width=0.08", "--out=~/out"),
        ("convert", "open-clip", "ViT-B-32", "~/absent.safetensors", "~/out"),
    ],
)
def test_a_path_that_is_absent_is_looked_for_in_the_home_folder(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert str(home / "absent") in message
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "MODEL", "x", "--out=x.png"),
        ("app", "MODEL"),
        ("evaluate", "MODEL", "--data=PHOTOS", "--out=out", "--split=all"),
        ("train", "--model.pretrained=MODEL", "--data.root=PHOTOS"),
        ("demo", "--model=MODEL"),
        ("export", "single-file", "MODEL", "--out=x.safetensors"),
        ("export", "merge", "MODEL", "absent", "--out=out"),
        ("export", "pack", "MODEL", "--out=out"),
        ("export", "card-sheets", "MODEL", "--data=PHOTOS", "--seen=1"),
    ],
)
def test_a_folder_that_is_neither_a_model_nor_a_run_is_refused_alike(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    (home / "empty").mkdir(parents=True)
    captioned_folder(home / "photos", 4)
    places = {"MODEL": str(home / "empty"), "PHOTOS": str(home / "photos")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert main(arguments) == 2
    assert "expected a model's folder in Stable Diffusion's format or a run's folder" in (
        capsys.readouterr().err
    )


def test_a_run_stands_for_the_model_that_it_exported(
    tmp_path: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sd_folder, run / "pipeline")
    small = ["--num_inference_steps=1", "--height=32", "--width=32"]
    assert main(["sample", str(run), "x", f"--out={tmp_path / 'x.png'}", *small]) == 0
    assert main(["export", "pack", str(run), f"--out={tmp_path / 'packed'}"]) == 0
    assert (tmp_path / "packed" / "model_index.json").is_file()
    assert main(["evaluate", str(run), f"--data={run}", f"--out={tmp_path / 'eval'}"]) == 2
    assert str(run / "pipeline") not in capsys.readouterr().err  # the data, not the model


def test_a_missing_data_folder_is_reported_before_heavy_libraries_are_loaded(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from latentdiff.cli.main import main\n"
        f"status = main(['train', '--data.root={tmp_path}/fotos', '--model.vae=latentdiff-vae'])\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'loaded'\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "fotos does not exist" in done.stderr


def test_inspect_and_report_do_without_heavy_libraries(tmp_path: Path) -> None:
    save_image(tmp_path / "photos" / "1.png", 1).with_suffix(".txt").write_text("a photo")
    run = write_run(tmp_path / "run", {10: 0.5})
    code = (
        "import sys; from latentdiff.cli.main import main\n"
        f"assert main(['inspect', '{tmp_path}/photos', '--config', 'lora_mini']) == 0\n"
        f"assert main(['report', '{run}']) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()


def test_an_unknown_setting_is_answered_by_three_names_at_most(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--zzzz=8"]) == 2
    assert capsys.readouterr().err.count(",") == 2


def test_help_of_train_has_a_command_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "latentdiff train --config lora_mini --data.root=photos" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [["--method", "lcm_lora"], ["--method=lcm_lora"], ["--config", "distill_lcm_lora"]]
)
def test_lcm_lora_takes_its_own_settings_where_no_others_are_given(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not main(["distill", "MODEL", *given, "--data", "photos", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["distill"]["method"] == "lcm_lora"
    assert settings["model"]["pretrained"] == "MODEL"
    assert settings["finetune"]["lora_rank"] == 64
    assert settings["train"]["ema_decay"] == 0.95


def test_the_method_is_that_of_its_option_or_of_the_config_under_any_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that of a word in the value of another option."""
    copy = tmp_path / "mine.yaml"
    shutil.copyfile(find_config("distill_lcm_lora"), copy)
    for given, method in (
        (["--out", "lcm_lora"], "guided"),
        (["--method", "progressive", "--out", "distill_lcm_lora"], "guided"),
        (["--config", str(copy)], "lcm_lora"),
    ):
        assert not main(["distill", "MODEL", "--data", "photos", *given, "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["distill"]["method"] == method
