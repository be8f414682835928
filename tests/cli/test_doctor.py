"""`latentdiff doctor` judges facts by themselves; the facts of this machine can be read."""

from __future__ import annotations

import json
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pytest

from latentdiff.cli import doctor, machine
from latentdiff.cli.command import run_command
from latentdiff.cli.doctor import as_text, examine, is_usable, next_commands
from latentdiff.cli.machine import Gpu, Machine, Package, Place, Torch, has_kernels, packages
from latentdiff.program import program

GOOD = Machine(
    version="1.0",
    python="3.12.1",
    system="Linux",
    cpu="a processor",
    num_cores=8,
    memory_gb=32.0,
    free_memory_gb=24.0,
    shared_memory_gb=8.0,
    omp_variable=None,
    has_nvidia_driver=False,
    torch=Torch(dtype="bfloat16", attention=("math",), num_threads=8),
    packages=(
        Package("torch", ">=2.11", "2.15.0", fits=True),
        Package("gradio", ">=5", None, fits=False, extras=("ui",)),
    ),
    conflicts=(),
    places=(Place("temporary", "/tmp", 50.0, is_writable=True),),
)
GPU = Gpu("H200", 141.0, 140.0)


def changed(**facts: object) -> Machine:
    """Return the good machine with other facts; torch__X changes one of torch's."""
    own = {name[7:]: facts.pop(name) for name in [*facts] if name.startswith("torch__")}
    return replace(GOOD, torch=replace(GOOD.torch, **own), **facts)


def test_a_machine_that_fits_is_usable_and_told_the_first_commands() -> None:
    findings = list(examine(GOOD))
    assert {finding.level for finding in findings} == {"ok", "note"}
    text = as_text(GOOD, findings)
    assert "usable: training and sampling on the CPU in bfloat16.\n" in text
    assert 'the web UI, latentdiff app: pip install "latentdiff[ui]"' in text
    assert text.endswith(f"{program()} train --config lora_mini --data.root=FOLDER")


OLD = Package("diffusers", ">=0.42", "0.36.0", fits=False)
ABSENT = Package("peft", ">=0.19", None, fits=False)
MIXED = "RuntimeError: operator torchvision::nms does not exist"
FULL = Place("current folder", "/data", 0.01, is_writable=True)
LOCKED = Place("image cache", "/cache", 90.0, is_writable=False)


@pytest.mark.parametrize(
    ("facts", "said", "fix"),
    [
        ({"python": "3.9.2"}, "expected Python 3.11 or newer", "python3.11 -m venv"),
        ({"packages": (OLD,)}, "diffusers is 0.36.0, expected >=0.42", '"diffusers>=0.42"'),
        ({"packages": (OLD, ABSENT)}, "peft is not installed", '"diffusers>=0.42" "peft>=0.19"'),
        ({"torch__error": MIXED}, "different builds", "--force-reinstall torch torchvision"),
        ({"places": (FULL,)}, "0.0 GB free, expected 0.5 GB", "free 0.5 GB"),
        ({"places": (LOCKED,)}, "/cache: 90.0 GB free, not writable", "chmod u+w /cache"),
        ({"free_memory_gb": 0.5}, "0.5 GB free; expected 2 GB", "end other programs"),
        (
            {"torch__gpus": (replace(GPU, has_kernels=False),), "torch__cuda": "12.1"},
            "this torch (CUDA 12.1) has no code for it",
            "pytorch.org",
        ),
    ],
)
def test_what_is_needed_and_does_not_fit_ends_in_1_with_its_fix(
    facts: dict[str, object], said: str, fix: str
) -> None:
    bad = changed(**facts)
    findings = list(examine(bad))
    assert not is_usable(findings)
    assert "not usable yet" in as_text(bad, findings)
    [failed] = {finding for finding in findings if finding.level == "FAIL" and said in finding.text}
    assert fix in failed.fix
    assert failed.fix in next_commands(bad, findings)


XFORMERS = Package("xformers", "", "0.0.35", fits=True, extras=("xformers",))
MULTI_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 4}
MULTI_GPU = {"distributed_type": "MULTI_GPU", "num_processes": 4}
FSDP = {"distributed_type": "FSDP", "num_processes": 2}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"torch__num_threads": 16, "omp_variable": "16"}, "more threads than cores"),
        ({"torch__num_threads": 1, "omp_variable": "1"}, "some cores are idle"),
        ({"has_nvidia_driver": True}, "built without CUDA) sees no GPU"),
        ({"shared_memory_gb": 0.06}, "60 MB shared"),
        ({"free_memory_gb": 4.0}, "enough for the bundled models only"),
        ({"packages": (*GOOD.packages, XFORMERS)}, "xformers is installed, needs CUDA"),
        ({"packages": ()}, "latentdiff is not installed"),
        ({"conflicts": ("gradio 5 wants pillow<13",)}, "gradio 5 wants pillow<13"),
        ({"places": (replace(FULL, free_gb=2.0),)}, "little for a model of SD 1.5's size"),
        ({"accelerate_path": "x.yaml", "accelerate": MULTI_CPU}, "starts one process on CPUs"),
        ({"accelerate_path": "x.yaml", "accelerate": MULTI_GPU}, "torch sees 0 GPUs"),
        ({"accelerate_path": "x.yaml", "accelerate": FSDP}, "does not engage on CPUs"),
    ],
)
def test_what_may_go_wrong_is_a_warning_and_usable(facts: dict[str, object], said: str) -> None:
    warned = changed(**facts)
    findings = list(examine(warned))
    assert is_usable(findings)
    assert [f.level for f in findings if said in f.text] == ["warn"]
    assert "with 1 warning above" in as_text(warned, findings)


def test_a_gpu_is_named_in_the_verdict_and_its_memory_chooses_a_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu = changed(torch__device="cuda:0", torch__gpus=(GPU,))
    assert "on the H200 in bfloat16" in as_text(on_gpu, list(examine(on_gpu)))
    monkeypatch.setattr(doctor, "shipped_configs", lambda: {"lora_sd15_8gb": Path("x")})
    assert "--config lora_sd15_8gb" in next_commands(on_gpu, [])[1]
    small = changed(torch__gpus=(replace(GPU, memory_gb=4.0),))
    assert "--config lora_mini" in next_commands(small, [])[1]


def test_machine_code_runs_on_its_major_version_and_ptx_on_newer_ones() -> None:
    assert has_kernels(["sm_80", "sm_90a"], major=8, minor=6)
    assert has_kernels(["sm_80", "compute_80"], major=12, minor=0)
    assert not has_kernels(["sm_80", "sm_90"], major=12, minor=0)
    assert not has_kernels(["sm_75", "sm_86", "compute_90"], major=6, minor=1)


def test_requirements_are_compared_with_what_is_installed() -> None:
    wanted = ["pytest>=8", "pytest-xdist>=999", "absent-package; extra == 'ui'", "x; extra=='test'"]
    found = {package.name: package for package in packages(wanted)}
    assert found["pytest"].fits
    assert not found["pytest-xdist"].fits
    assert found["absent-package"].extras == ("ui",)
    assert found["absent-package"].installed is None
    assert "x" not in found


def test_every_extra_says_what_it_adds() -> None:
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    extras = set(setup["options.extras_require"]) - machine.NOT_FOR_USERS
    assert extras <= doctor.ADDS.keys()


def test_accelerate_config_is_found_and_may_be_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert machine.accelerate_config() == ("", {})
    path = tmp_path / "accelerate" / "default_config.yaml"
    path.parent.mkdir()
    for text, expected in (("num_processes: 2", {"num_processes": 2}), ("{", {}), ("- 1", {})):
        path.write_text(text)
        assert machine.accelerate_config() == (str(path), expected)


def test_the_command_reads_this_machine_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(doctor.doctor_command, ["--json"], prog="latentdiff doctor")
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["is_usable"] else 1)
    assert report["machine"]["memory_gb"] >= report["machine"]["free_memory_gb"] > 0
    assert {place["use"] for place in report["machine"]["places"]} >= {"image cache", "temporary"}
    assert report["next"]
