"""A twin is its run but for the gradients of some images: order, noise and steps are the same."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from fakes_finetune import finetuning, world
from fakes_training import make_config, read_metrics
from safetensors.torch import load_file

from latentdiff.audit.twin import default_folder, train_twin
from latentdiff.cli.main import main
from latentdiff.config.text_to_image import Config
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.inputs.randomness import SampleKey
from latentdiff.training.inputs.sources import find_images, read_data
from latentdiff.training.inputs.train_data import subject_order
from latentdiff.training.optim.state import load_parameters
from latentdiff.training.text_to_image.setup import Run, setup
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]
STEPS = 4
QUICK = {"train__max_steps": STEPS, "preview__num_nearest": 0, "eval__num_heldout": 1}


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A run from scratch, with dropout, an EMA and half of the images mirrored."""
    config = make_config(world, world / "run", data__random_flip="true", **QUICK)
    assert train(config) == 0
    return world / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's last checkpoint."""
    files = sorted((run / f"checkpoints/step-{STEPS:09d}").glob("*.safetensors"))
    return {f"{f.name}/{name}": x for f in files for name, x in load_file(f).items()}


def are_equal(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def first_uses(config: Config) -> dict[str, int]:
    """Return the step that shows each training image first, by name."""
    folder, _ = read_data(config.data)
    order = subject_order(config, folder)
    steps = [order.batch(step).indices.tolist() for step in range(STEPS)]
    return {
        one.id: next(step for step, used in enumerate(steps) if i in used)
        for i, one in enumerate(folder)
    }


def test_an_empty_list_gives_the_run_bit_for_bit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["twin", str(run), "--without"]) == 0
    assert are_equal(run, run / "twins/again")
    assert read_metrics(run) == read_metrics(run / "twins/again")
    out = capsys.readouterr().out
    assert f"all {STEPS} logged losses are those of the run, bit for bit" in out


def test_losses_before_the_first_use_of_an_image_are_equal_bit_for_bit(
    world: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uses = first_uses(make_config(world, run, **QUICK))
    name = next(name for name, step in uses.items() if step == 2)
    names = tmp_path / "names.txt"
    names.write_text(f"\n{name.partition('/')[2]}\n")  # as it is called within train/
    assert main(["twin", str(run), "--without", str(names), "--out", str(tmp_path / "twin")]) == 0
    before, after = read_metrics(run), read_metrics(tmp_path / "twin")
    assert [before[k] == after[k] for k in (1, 2, 3, 4)] == [True, True, False, False]
    assert not are_equal(run, tmp_path / "twin")
    shown = capsys.readouterr().out
    assert "differs is that of step 3; the 2 before it are equal, bit for bit" in shown


def test_a_twin_of_a_lora_run_that_was_stopped_goes_on(world: Path, tmp_path: Path) -> None:
    run, twin = world / "lora", tmp_path / "twin"
    settings = {"finetune__method": "lora", "train__checkpoint_every_steps": 2} | QUICK
    config = finetuning(world, run, **settings)
    assert train(config) == 0
    name = next(name for name, step in first_uses(config).items() if step == 2)
    assert train_twin(run, [name], twin) == 0
    before, after = read_metrics(run), read_metrics(twin)
    assert [before[k] == after[k] for k in (1, 2, 3)] == [True, True, False]
    whole = weights(twin)
    for path in (f"checkpoints/step-{STEPS:09d}", "pipeline", "lora"):
        shutil.rmtree(twin / path)
    assert train_twin(run, [name], twin) == 0
    again = weights(twin)
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert not are_equal(run, twin)


def test_an_image_loses_its_weight_alone_and_the_others_keep_theirs(world: Path, run: Path) -> None:
    config = make_config(world, run, data__random_flip="true", **QUICK)
    ready = setup(config, run, start_accelerator(config))
    check_samples(ready)
    check_losses(ready)


def check_samples(ready: Run) -> None:
    """A sample of an image without weight is the same but for its weight."""
    dataset = ready.train_data.dataset.dataset
    key = SampleKey(index=3, epoch=1, index_in_epoch=5, stratum=0, weight=1.0)
    own = dataset[key]
    dataset.zero_weight = frozenset({3})
    other = dataset[key]
    dataset.zero_weight = frozenset()
    assert (own.pop("weight"), other.pop("weight")) == (1, 0)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def check_losses(ready: Run) -> None:
    """A step's loss is less by an image's part alone, whatever else is without weight."""
    first = {name: x.detach().clone() for name, x in ready.train_step.parameters.items()}
    (batch,) = ready.train_data.batches(
        ready.layout, first_step=0, last_step=1, accelerator=ready.accelerator, seed=0
    )

    def loss_without(*places: int) -> float:
        load_parameters(ready.train_step.parameters, first)
        weight = batch["weight"].clone()
        weight[list(places)] = 0
        batches = iter([batch | {"weight": weight}])
        return float(ready.train_step.step(batches, step=0, count=4, accumulation=1).loss)

    whole, one, other = loss_without(), loss_without(0), loss_without(3)
    assert loss_without(0, 3) < min(one, other) < max(one, other) < whole
    assert loss_without(0, 3) == pytest.approx(one + other - whole, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--without", "nobody.png"], "no training image of .* is named nobody.png, such as"),
        (["--without", "nothing.txt"], "nothing.txt does not exist"),
        (["--out", "{run}", "--without"], "is the run itself"),
    ],
)
def test_what_cannot_be_a_twin_is_refused(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one.format(run=run) for one in arguments]
    assert main(["twin", str(run), *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_settings_by_which_an_image_counts_without_its_loss_are_refused(
    world: Path, tmp_path: Path
) -> None:
    image = {"data__zero_weight_images": "[a.png]"}
    with pytest.raises(ValueError, match="loss_aware draws the timesteps of all images by the"):
        make_config(world, tmp_path, **image, diffusion__timestep_sampling="loss_aware")
    with pytest.raises(ValueError, match="stop=auto ends each run by its own evaluations"):
        make_config(world, tmp_path, **image, train__stop="auto")


def test_data_that_was_changed_since_is_refused(
    world: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = sorted((world / "data/train").glob("*.png"))[0]
    content = changed.read_bytes()
    changed.write_bytes(content + b"x")
    try:
        assert main(["twin", str(run), "--out", str(tmp_path / "twin"), "--without"]) == 2
    finally:
        changed.write_bytes(content)
    message = capsys.readouterr().err
    assert f"data is not what {run} was trained on: changed  train/{changed.name}: image" in message


def test_names_are_found_by_their_ends_and_only_once(world: Path) -> None:
    folder, _ = read_data(make_config(world, world / "x").data)
    last = folder[9].id
    assert find_images(folder, [last]) == find_images(folder, [last.rpartition("/")[2]]) == {9}
    assert default_folder(Path("r"), [last]) == Path("r/twins") / f"without-train-{last[6:]}"
    names = [default_folder(Path("r"), one) for one in (["a", "b"], ["b", "a"], ["c", "d"])]
    assert names[0] == names[1] != names[2]
