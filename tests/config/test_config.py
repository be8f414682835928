"""Settings: which are refused and by which message, and that the written file holds all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import (
    RENAMED,
    flat,
    load_config,
    load_stored_config,
    parse_arguments,
    to_yaml,
)
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig

ROOT = Path(__file__).parents[2]
KINDS = {"vae": VaeConfig, "clip": ClipConfig}  # by the first word of a config's name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    kind = KINDS.get(path.stem.split("_")[0], Config)
    settings = yaml.safe_load(path.read_text())
    overrides = ["--model.pretrained=BASE"] if "finetune" in settings else []
    if settings.get("finetune", {}).get("method") == "textual_inversion":
        overrides.append("--finetune.initializer_token=dog")
    config = load_config(path, overrides, kind=kind)
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "copy.yaml", kind=kind) == config


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {seed: 1, batch_size: 3}\n")
    config = load_config(tmp_path / "a.yaml", ["--train.seed=7", "--output_dir=x"])
    assert (config.train.seed, config.train.batch_size, config.output_dir) == (7, 3, "x")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--train.learnin_rate=1", "did you mean train.learning_rate"),
        ("--train.batch_size=many", "train.batch_size"),
        ("--train.batch_size=0", "at least 1"),
        ("--diffusion.caption_dropout=1.5", r"share in \[0, 1\]"),
        ("--train.learning_rate=nan", "train.learning_rate"),
        ("--diffusion.prediction_type=noise", "prediction_type"),
        ("--train.ema_decay=1", "below 1"),
        (
            "--train.posthoc_ema_sigma_rel=[0.1, 0.5]",
            r"train.posthoc_ema_sigma_rel holds 0.5, expected .*0.28",
        ),
        ("--train.posthoc_ema_sigma_rel=[0.0]", r"train.posthoc_ema_sigma_rel holds 0.0"),
        ("--train.posthoc_ema_sigma_rel=[0.1, 0.1]", "names a width twice"),
        ("--train.posthoc_ema_every_steps=0", "train.posthoc_ema_every_steps=0, expected .* 1"),
        ("--train.keep_every_steps=-1", "train.keep_every_steps=-1"),
        ("--train.export=best", "train.keep_best=true"),
        ("--condition.whole_masks=1.5", "condition.whole_masks=1.5, expected a share"),
        ("--condition.max_noise_level=1000", "condition.max_noise_level=1000"),
    ],
)
def test_bad_settings_are_named(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(Config, [argument])


@pytest.mark.parametrize(
    ("given", "idle", "acting"),
    [
        ("--model.pretrained=a", "diffusion.num_timesteps=500", "model.pretrained="),
        ("--model.pretrained=a", "diffusion.beta_start=0.001", "model.pretrained="),
        ("--model.pretrained=a", "diffusion.beta_end=0.1", "model.pretrained="),
        ("--model.pretrained=a", "diffusion.beta_schedule=linear", "model.pretrained="),
        ("--diffusion.beta_schedule=cosine", "diffusion.beta_end=0.1", "diffusion.beta_schedule="),
        (
            "--finetune.token=<x>",
            "finetune.initializer_token=dog",
            "finetune.method=textual_inversion",
        ),
        ("--model.pretrained=a", "finetune.lora_rank=4", "finetune.method=lora"),
        ("--model.pretrained=a", "finetune.prior_loss_weight=2", "finetune.class_prompt=a dog"),
        ("--model.pretrained=a", "train.text_learning_rate=1", "train.train_text_encoder=true"),
        (
            "--train.seed=1",
            "diffusion.logit_normal_mean=1",
            "diffusion.timestep_sampling=logit_normal",
        ),
        (
            "--train.seed=1",
            "diffusion.logit_normal_std=2",
            "diffusion.timestep_sampling=logit_normal",
        ),
        ("--train.seed=1", "diffusion.snr_gamma=2", "diffusion.loss_weighting=min_snr"),
        ("--train.seed=1", "diffusion.huber_delta=2", "diffusion.loss=huber"),
        ("--train.seed=1", "condition.source=file", "condition.kind=upscale"),
        ("--train.seed=1", "condition.max_noise_level=9", "condition.kind=upscale"),
        ("--train.seed=1", "condition.degradations=[area]", "condition.kind=upscale"),
        ("--train.seed=1", "condition.masks=boxes", "condition.kind=inpaint"),
        ("--train.seed=1", "condition.whole_masks=0", "condition.kind=inpaint"),
        ("--train.seed=1", "condition.dropout=0.2", "condition.kind=instruct_pix2pix"),
        ("--train.seed=1", "data.condition_column=x", "condition.kind=depth"),
        (
            '--finetune.instance_prompts=["x"]',
            "data.num_canaries=2",
            "finetune.instance_prompts=[]",
        ),
        ("--condition.kind=inpaint", "data.inpaint_mask_column=x", "condition.masks=file"),
        ("--train.seed=1", "train.posthoc_ema_every_steps=2", "train.posthoc_ema_sigma_rel=[0.1]"),
    ],
)
def test_settings_without_effect_are_refused_unless_another_makes_them_act(
    given: str, idle: str, acting: str
) -> None:
    name = idle.partition("=")[0]
    with pytest.raises(ValueError, match=rf"{name}=\S+ has no effect: .*Leave out .*{name}"):
        parse_arguments(Config, [given, f"--{idle}"])
    model = ["--model.pretrained=a"] if acting.startswith("finetune") else []
    parse_arguments(Config, [given, f"--{idle}", *model, f"--{acting}"])


@pytest.mark.parametrize(
    ("kind", "argument", "acting"),
    [
        (VaeConfig, "--train_part=decoder", "--pretrained=a"),
        (VaeConfig, "--lpips_weight=2", "--lpips=a"),
        (VaeConfig, "--discriminator_start=2", "--discriminator_weight=1"),
        (ClipConfig, "--vocab_size=600", "--tokenizer="),
    ],
)
def test_settings_without_effect_are_refused_in_the_other_recipes(
    kind: type, argument: str, acting: str
) -> None:
    others = ["--tokenizer=open_clip"] if kind is ClipConfig else []
    with pytest.raises(ValueError, match="has no effect"):
        parse_arguments(kind, [argument, *others])
    parse_arguments(kind, [argument, *others, acting])


def test_a_run_begun_with_settings_without_effect_may_be_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As earlier versions took them; their numbers do not depend on it."""
    stored = tmp_path / "config.yaml"
    stored.write_text(
        "train: {warmup_steps: 3}\nfinetune: {token: <x>}\ndiffusion: {snr_gamma: 2}\n"
    )
    options = [f"--output_dir={tmp_path}", "--train.lr_warmup_steps=3"]
    config = load_config(stored, options)
    assert "without effect, as when" in caplog.text
    assert config == parse_arguments(Config, options)
    assert load_stored_config(stored, Config).train == config.train
    with pytest.raises(ValueError, match=r"snr_gamma=3.0 has no effect"):
        load_config(stored, [*options, "--diffusion.snr_gamma=3"])
    with pytest.raises(ValueError, match=r"Leave out diffusion.snr_gamma, finetune.token"):
        load_config(stored)


def test_a_damaged_config_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {sed: 3}\n")
    with pytest.raises(
        ValueError, match=r"config.yaml, the settings of a run: .*did you mean train.seed"
    ):
        load_stored_config(tmp_path / "config.yaml", Config)


@pytest.mark.parametrize(
    ("argument", "name"),
    [("--train.max_step=5", "train.max_steps"), ("--output=x", "output_dir"), ("--conf=x", "")],
)
def test_abbreviated_options_are_refused_by_the_nearest_name(argument: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting .*{name}"):
        parse_arguments(Config, [argument])


def test_unknown_key_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {rot: here}\n")
    with pytest.raises(ValueError, match=r"data\.root"):
        load_config(tmp_path / "a.yaml")


def test_a_model_cannot_be_both_fine_tuned_and_new() -> None:
    with pytest.raises(ValueError, match=r"model\.pretrained brings its own"):
        parse_arguments(Config, ["--model.pretrained=a", "--model.vae=b"])


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_setting_has_a_place_in_the_yaml() -> None:
    text = to_yaml(Config())
    assert all(name.rsplit(".", 1)[-1] in text for name in flat(Config()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--help"], 0), (["--print_config"], 0), (["--trian.seed=1"], 2), (["--data.root=/no"], 2)],
)
def test_script_exits_as_promised(arguments: list[str], expected: int) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train_t2i.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    if expected == 2:
        assert len(done.stderr.strip().splitlines()) == 1


def test_old_names_of_settings_still_work_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "train: {precision: fp32, seed: 3}\npreview: {held_out_every_steps: 7, num_steps: 5}\n"
    )
    config = load_config(path, ["--data.split_fraction=0.5"])
    assert (config.train.mixed_precision, config.train.seed) == ("fp32", 3)
    assert (config.eval.every_steps, config.preview.num_steps) == (7, 5)
    assert config.data.heldout_fraction == 0.5
    [record] = caplog.records
    for old, new in (
        ("train.precision", "train.mixed_precision"),
        ("preview.held_out_every_steps", "eval.every_steps"),
        ("data.split_fraction", "data.heldout_fraction"),
    ):
        assert f"{old} is now {new}" in record.message


def test_every_renamed_setting_exists_and_its_old_name_is_free() -> None:
    names = [set(flat(kind())) for kind in (Config, VaeConfig, ClipConfig)]
    for old, new in RENAMED.items():
        assert any(new in known for known in names), new
        assert not any(old in known for known in names), old


@pytest.mark.parametrize(
    ("kind", "name"), [(Config, "train.mixed_precision"), (VaeConfig, "mixed_precision")]
)
def test_precision_asked_of_accelerate_launch_stands_where_the_config_names_none(
    kind: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(*arguments: str) -> object:
        return flat(parse_arguments(kind, arguments))[name]

    text = "train: {mixed_precision: fp32}" if "." in name else "mixed_precision: fp32"
    (tmp_path / "named.yaml").write_text(text)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert precision() == "fp16"
    assert precision(f"--{name}=bf16") == "bf16"  # which training then refuses
    assert precision("--config", str(tmp_path / "named.yaml")) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # given where nothing was asked for
    assert precision() == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"mixed_precision.*fp8"):
        precision()


def test_documented_commands_start_without_warnings_of_the_launcher() -> None:
    root = Path(__file__).parents[2]
    for path in (root / "README.md", *root.glob("configs/**/*.yaml"), *root.glob("docs/*.md")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "accelerate launch" in line and "scripts/train" in line:
                assert "--config_file" in line, f"{path}: {line}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.learning_rate=nan", "train.learning_rate=nan, expected a finite number"),
        ("--train.max_steps=2.5", "train.max_steps=2.5, expected a whole number"),
        ("--data.random_flip=maybe", "data.random_flip=maybe, expected true or false"),
        ("--train.optimizer=sgd", "train.optimizer=sgd, expected one of 'adamw'"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type_that_is_expected(option, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse_arguments(Config, [option])


@pytest.mark.parametrize(
    "given", [{"diffusion": {"zero_terminal_snr": True}}, {"train": {"train_text_encoder_2": True}}]
)
def test_settings_that_a_student_has_from_its_teacher_are_refused(
    given: dict[str, dict[str, bool]], tmp_path: Path
) -> None:
    settings = {
        "model": {"pretrained": "base"},
        "distill": {"method": "guided"},
        "data": {"root": "photos"},
        "diffusion": {"caption_dropout": 0.0},
    }
    for section, values in given.items():
        settings[section] = settings.get(section, {}) | values
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    ((section, values),) = given.items()
    with pytest.raises(ValueError, match=rf"{section}\.{next(iter(values))}=True is not for dist"):
        load_config(path)


@pytest.mark.parametrize(
    ("settings", "kind", "files"),
    [
        ([], "none", "none"),
        (["--condition.kind=inpaint"], "inpaint", "none"),
        (["--condition.kind=depth"], "depth", "aspect"),
        (["--condition.kind=upscale", "--condition.source=file"], "upscale", "aspect"),
        (["--condition.kind=instruct_pix2pix"], "instruct_pix2pix", "size"),
        (["--finetune.method=controlnet", "--model.pretrained=m"], "controlnet", "aspect"),
    ],
)
def test_a_config_tells_the_kind_and_the_files_of_its_condition(
    settings: list[str], kind: str, files: str
) -> None:
    config = parse_arguments(Config, settings)
    assert (config.condition_kind, config.condition_files) == (kind, files)
