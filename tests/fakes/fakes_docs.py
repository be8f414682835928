"""The commands of README and docs, read from their ```sh blocks and run on tiny stand-ins."""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from latentdiff.cli.help import CommandParser, help_of
from latentdiff.cli.main import COMMANDS, main
from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)

# Commands that do not run here, by page and by their first words, and why. Options, values and
# files that ship are checked all the same.
NOT_RUN = {
    "docs/attribution.md": {
        "latentdiff": "needs a run of its own; tests/audit explains and trains",
        "python benchmarks/attribution.py": "half an hour; test_benchmark_attribution.py",
    },
    "docs/audit.md": {"latentdiff": "needs a run of its own; tests/audit audits one"},
    "docs/conditions.md": {"latentdiff": "tests/training/test_conditions.py trains each kind"},
    "docs/runs.md": {"python benchmarks/stopping.py": "20 minutes; its options are checked"},
    "docs/verify.md": {"latentdiff": "needs a run of its own; tests/audit verifies several"},
    "docs/containers.md": {"docker": "needs docker and downloads an image"},
    "docs/data.md": {
        "latentdiff inspect OWNER/NAME": "downloads a data set; tests/data/test_hub_dataset.py",
        "latentdiff train --config lora_mini --data.root=OWNER/NAME": "the same",
    },
    "docs/distillation.md": {
        "latentdiff distill latentdiff-mini --method lcm_lora": "another distillation; "
        "tests/training/test_distill_stages.py",
        "latentdiff sample latentdiff-mini a red apple --lora": "the same",
        "latentdiff export single-file": (
            "needs CLIP's vocabulary; tests/sampling/test_distilled_models.py"
        ),
    },
    "docs/finetuning.md": {
        "latentdiff train --config lora_sd15_8gb": "how the table was made; test_finetune.py",
        "latentdiff train --config full_sd15_24gb": "the same",
        "latentdiff train --config dreambooth_sd15_8gb": "the same",
        "latentdiff train --config textual_inversion_sd15_8gb": "the same",
        "latentdiff compare": "the same; docs/evaluation.md runs one",
        "latentdiff train --config lora_mini --data.root=photos --finetune.init_lora": (
            "continues a run of before; tests/training/test_initial_weights.py"
        ),
        "latentdiff train --config textual_inversion_mini": "the same",
        "latentdiff train --config lora_mini --data.root=photos --model.clip_skip": (
            "another training like those above it; tests/training/test_clip_skip.py"
        ),
        "latentdiff train --config lora_mini --data.root=photos --train.optimizer": (
            "three more of these; tests/training/test_optimizers.py"
        ),
        "python -c": "converts a file of another tool, which the reader has",
    },
    "docs/sdxl.md": {
        "latentdiff train": "needs the weights of SDXL; tests/training/test_sdxl_training.py",
        "latentdiff sample": "the same; tests/sampling/test_sample_sdxl.py",
    },
    "docs/tutorials/few_steps.md": {
        "latentdiff distill": "docs/distillation.md has it run",
        "latentdiff sample": "the same",
        "latentdiff train-vae": "docs/vae_clip.md has it run",
    },
    "docs/tutorials/image_conditions.md": {
        "latentdiff train --config edges_mini": "a ControlNet as that of layouts, which runs",
        "latentdiff sample latentdiff-mini a photo --controlnet": "the same",
    },
    "docs/tutorials/trust.md": {
        "latentdiff audit": "takes long on any model; tests/audit audits several",
    },
    "docs/watching.md": {
        "latentdiff train": "trackers of others' packages; tests/training/test_trackers.py"
    },
    "latentdiff/assets/mini/README.md": {
        "": "how the model that ships was made, hours on data that does not ship"
    },
    "latentdiff/assets/vae_4ch/README.md": {
        "": "how the VAE that ships was made, hours on data that does not ship"
    },
    "latentdiff/assets/vae/README.md": {
        "": "how the model that ships was made, hours on data that does not ship"
    },
}
SETTINGS = {"train": Config, "train-vae": VaeConfig, "train-clip": ClipConfig}
PROGRAMS = ("accelerate", "docker", "latentdiff", "make", "pip", "python", "torchrun")

# The most of each option; a page's own value is kept where it is smaller.
TRAIN = {
    **{"train.max_steps": 2, "train.batch_size": 2, "train.micro_batch_size": 1},
    **{"preview.num_steps": 1, "preview.num_nearest": 2, "eval.num_heldout": 2},
    **{"data.resolution": 32, "data.num_workers": 0},
}
CLASS_IMAGES = {"finetune.num_class_images": 2, "finetune.class_num_steps": 1}
OPTIONS = {
    "train-vae": {"max_steps": 2, "batch_size": 2, "max_minutes": 0, "resolution": 32},
    "train-clip": {"max_steps": 2, "batch_size": 2, "resolution": 16, "width": 32},
    "sample": {"num_inference_steps": 1},
    "evaluate": {
        **{"num_images": 8, "num_inference_steps": 1, "num_heldout": 2, "num_train": 4, "draws": 4},
        **{"pilot": 1, "image_steps": 0, "sweep_captions": 2, "sweep_images": 2, "sweep_steps": 1},
    },
    "distill": {
        **{"guided_steps": 1, "halving_steps": 1, "num_images": 10, "teacher_num_steps": 1},
        **{"train.batch_size": 2, "preview.num_nearest": 2, "max_distance": 1000},
    },
    "demo swiss-roll": {"max_steps": 5, "num_timesteps": 8, "num_points": 100},
    "compare": {"num_inference_steps": 1, "num_seeds": 2},
    "demo": {"num_train": 6, **TRAIN},
}
SCRATCH = (
    *("--model.unet.block_out_channels=[32,32]", "--model.unet.attention_levels=[false,true]"),
    *("--model.unet.layers_per_block=1", "--model.unet.head_dim=16"),
)
SCRATCH_TEXT = (
    *("--model.text.width=32", "--model.text.num_layers=1", "--model.text.num_heads=2"),
    "--model.text.vocab_size=560",
)
SMALL_VAE = ("--block_out_channels=[8,16]",)
SMALL_CLIP = ("--text_width=32", "--num_layers=1", "--text_num_layers=1", "--vocab_size=560")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its first line there, and its kind, such as sh."""

    page: str
    line: int
    kind: str
    text: str


def pages() -> list[Path]:
    """Return README, the pages of docs/ and the cards of the models that ship."""
    cards = (ROOT / "latentdiff" / "assets").glob("*/README.md")
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(cards)]


def blocks(text: str, page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        yield Block(page, line, fence["kind"], fence["text"])


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a block.

    A line may go on after a backslash, and NAME="words" stands for $NAME in the lines after it.
    """
    text = block.text.replace("\\\n", " ")
    for name, value in re.findall(r'^([A-Z]+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f'{name}="{value}"', "").replace(f"${name}", value)
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def inline_commands(text: str) -> Iterator[str]:
    """Yield what a page's prose and tables call a command: `latentdiff ...`, `make ...`."""
    found = re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", FENCE.sub("", text))
    yield from (" ".join(one.split()) for one in found)


@cache
def options_of(name: str) -> set[str]:
    """Return the names of a command's options, without dashes."""
    if not COMMANDS[name].function:
        return {"help"}
    found = help_of(COMMANDS[name].load(), prog=name)
    return {one.name for one in (*found.options, *found.settings)}


def reason_not_to_run(words: Sequence[str], page: str) -> str:
    """Return why a page's command is only checked; empty where it runs."""
    text, reasons = " ".join(words), NOT_RUN.get(page, {})
    return next((why for begin, why in reasons.items() if text.startswith(begin)), "")


def check_command(words: Sequence[str]) -> None:
    """Check a documented command without running it: its options, values and files that ship."""
    program, *arguments = words
    if program == "docker":
        known = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
        assert set(re.findall(r"--build-arg (\w+)", " ".join(arguments))) <= known
        if "latentdiff" in arguments and arguments[0] == "run":
            check_command(arguments[arguments.index("latentdiff") :])
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        source = (ROOT / arguments[0]).read_text()
        unknown = [
            word for word in arguments if word.startswith("--") and f'"{word}"' not in source
        ]
        assert not unknown, f"{arguments[0]} has no {unknown}"
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert f"    {arguments[3]}: " in (ROOT / "setup.cfg").read_text()  # a registered marker
    elif program == "latentdiff":
        name, given = _named(arguments)
        if name in SETTINGS:
            parse_arguments(SETTINGS[name], given)
            return
        with suppress(_ParsedError):
            COMMANDS[name].load()(_CheckParser(prog=name), given)
    else:
        run_command(words)


class _CheckParser(CommandParser):
    """A parser that ends a command when its arguments are parsed."""

    def parse_args(self, *arguments: Any, **named: Any) -> Any:
        super().parse_args(*arguments, **named)
        raise _ParsedError


class _ParsedError(Exception):
    """The arguments are parsed."""


def run_command(words: Sequence[str]) -> None:
    """Run a documented command, shortened. Raises AssertionError where it fails.

    `make`, `pip` and an example, which tests/examples runs, are only looked up, and of what starts
    processes the files: their installs need the network.
    """
    program, *arguments = words
    if program == "latentdiff":
        AcceleratorState._reset_state(reset_partial_state=True)  # a command is a process
        status = main(shortened(arguments))
        assert status == 0, f"exit code {status}"
    elif program == "make":
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(known), f"the Makefile has no {arguments}"
    elif program == "pip":
        _check_pip(arguments)
    elif program == "python" and arguments[0].startswith("examples/"):
        assert (ROOT / arguments[0]).is_file()
        assert (
            Path(arguments[0]).stem
            in (ROOT / "tests" / "examples" / "test_examples.py").read_text()
        )
    elif program in ("accelerate", "torchrun"):
        files = [word for word in arguments if word.endswith((".py", ".yaml"))]
        assert all((ROOT / name).is_file() for name in files), files
    else:
        raise AssertionError(f"{program} is not run in documentation; see NOT_RUN")


def _check_pip(arguments: Sequence[str]) -> None:
    extras = re.findall(r"^([\w-]+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert arguments[0] == "install"
    for extra in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(extras), f"setup.cfg has no extra {extra}"


def shortened(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with its numbers capped, and networks of a few thousand."""
    name, given = _named(arguments)
    if name == "train":
        return [name, *_shortened_training(given)]
    given = _capped(given, OPTIONS.get(name, {}))
    extra = {"train-vae": SMALL_VAE, "train-clip": SMALL_CLIP}.get(name, ())
    is_new = "--pretrained" not in " ".join(given)
    return [*name.split(), *given, *(extra if is_new else ())]


def _named(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return a command's name, of one or two words, and its own arguments."""
    name = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in COMMANDS)
    return name, [*arguments[len(name.split()) :]]


def _shortened_training(given: list[str]) -> list[str]:
    config: Any = parse_arguments(Config, given)
    caps = TRAIN | (CLASS_IMAGES if config.finetune.class_prompt else {})
    if config.train.stop == "auto":  # which asks for four evaluations
        caps |= {"train.max_steps": 4, "eval.every_steps": 1}
        caps |= {"eval.num_samples": 4} if config.eval.num_samples else {}
    extra = ["--train.mixed_precision=fp32"]
    if config.train.optimizer == "adamw8bit":
        extra.append("--train.optimizer=adamw")
    if not config.model.pretrained:
        extra += SCRATCH if config.model.text_encoder else (*SCRATCH, *SCRATCH_TEXT)
    return [*_capped(given, caps), *extra]


def _capped(given: Sequence[str], caps: dict[str, int]) -> list[str]:
    """Set each option to its cap, or leave a smaller number that is given."""
    kept, left = list(given), dict(caps)
    for index, word in enumerate(kept):
        option, equals, value = word.partition("=")
        cap = left.pop(option[2:], None) if option.startswith("--") else None
        if cap is None:
            continue
        if equals:
            kept[index] = f"{option}={_smaller(value, cap)}"
        else:
            kept[index + 1] = _smaller(kept[index + 1], cap)
    return [*kept, *(f"--{name}={cap}" for name, cap in left.items())]


def _smaller(value: str, cap: int) -> str:
    return str(min(int(value), cap)) if value.isdigit() else value
