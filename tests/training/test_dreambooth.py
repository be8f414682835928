"""Class images next to the subject's: generated once, kept, and half of each step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fakes_finetune import finetuning
from fakes_models import make_components
from fakes_training import read_metrics
from scipy.stats import chi2_contingency, chisquare

from latentdiff.diffusion.timesteps import SamplingOptions, build_timestep_sampler
from latentdiff.training.checkpoint import checkpoint_state, load_checkpoint, save_checkpoint
from latentdiff.training.finetune.dreambooth import PairedOrder, generate_class_images
from latentdiff.training.inputs.batches import BatchLayout, EpochOrder, StepBatchSampler
from latentdiff.training.inputs.randomness import RULE_BY_PLACE, STRATA_RULE, SampleKey
from latentdiff.training.resume import first_checkpoint
from latentdiff.training.text_to_image import train_t2i
from latentdiff.training.text_to_image.setup import setup
from latentdiff.training.text_to_image.train_t2i import train

DREAM = {
    "finetune__instance_prompts": '["a photo of sks shape"]',
    "finetune__class_prompt": "a photo of a shape",
    "finetune__num_class_images": 3,
    "finetune__class_num_steps": 1,
    "finetune__prior_loss_weight": 0.5,
    "diffusion__caption_dropout": 0,
}

NUM_TIMESTEPS = 24
STEPS = {"first_step": 0, "seed": 3}


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


def test_class_images_are_kept_and_topped_up(world, tmp_path, tokenizer):
    def generate(prompt: str, num: int) -> dict[str, int]:
        settings = DREAM | {
            "finetune__class_prompt": prompt,
            "finetune__num_class_images": num,
        }
        folder = generate_class_images(
            finetuning(world, tmp_path, **settings),
            make_components(tokenizer),
            base_hash="base",
            run_folder=tmp_path,
            accelerator=Accelerator(cpu=True),
        )
        assert len(folder) == num
        assert folder[0].captions == (prompt,)
        return files(tmp_path / "class_images")

    three = generate("a dog", 3)
    five = generate("a dog", 5)
    assert len(five) == 5
    assert three.items() <= five.items()
    assert generate("a dog", 2) == five
    assert len(generate("a clock (12:30)", 2)) == 7  # another prompt has images of its own


def test_half_of_each_step_is_of_the_class():
    own = EpochOrder(np.zeros(5, int), batch_size=2, seed=0)
    others = EpochOrder(np.zeros(3, int), batch_size=2, seed=1, partial="fill")
    order = PairedOrder(own, others)
    seen = []
    for step in range(12):
        indices = order.batch(step).indices
        classes = indices[indices >= 5]
        assert len(classes) == len(indices) - len(classes) <= 2
        assert order.count(step) == len(indices)
        seen += classes.tolist()
    assert set(seen) == {5, 6, 7}


def paired_keys(num_steps: int, layout: BatchLayout, **rule: int) -> list[list[SampleKey]]:
    """The keys of steps with five subject images and seven of the class, over all processes."""
    own = EpochOrder(np.zeros(5, int), batch_size=3, seed=0)
    order = PairedOrder(own, EpochOrder(np.zeros(7, int), batch_size=3, seed=1, partial="fill"))
    shares = [
        list(StepBatchSampler(layout, order, **STEPS, rank=rank, last_step=num_steps, **rule))
        for rank in range(layout.num_processes)
    ]
    steps: list[list[SampleKey]] = [[] for _ in range(num_steps)]
    for share in shares:
        for number, batch in enumerate(share):
            steps[number // layout.accumulation] += [key for key in batch if key.weight]
    return [sorted(keys, key=lambda key: key.index_in_epoch) for keys in steps]


def test_subject_and_class_see_every_timestep_equally_often():
    sampler = build_timestep_sampler("stratified", SamplingOptions(NUM_TIMESTEPS))
    seen: dict[bool, list[int]] = {True: [], False: []}
    for keys in paired_keys(3000, BatchLayout.of(6, 0, 1)):
        strata = torch.tensor([key.stratum for key in keys])
        assert sorted(strata.tolist()) == list(range(len(keys))), "a timestep of each stratum"
        u = torch.tensor([key.generator("timestep", seed=0).random() for key in keys])
        t, _ = sampler(u, strata, len(keys))
        assert (t * len(keys) // NUM_TIMESTEPS).tolist() == strata.tolist()
        for key, timestep in zip(keys, t.tolist(), strict=True):
            seen[key.index >= 5].append(timestep)
    for timesteps in seen.values():
        counts = np.bincount(timesteps, minlength=NUM_TIMESTEPS)
        assert chisquare(counts).pvalue > 0.01
    several = [np.bincount(seen[kind], minlength=NUM_TIMESTEPS) for kind in (True, False)]
    assert chi2_contingency(several).pvalue > 0.01


@pytest.mark.parametrize("layout", [(6, 1, 1), (6, 2, 1), (6, 0, 2), (6, 1, 3), (6, 4, 4)])
def test_any_layout_gives_subject_and_class_the_same_draws(layout):
    assert paired_keys(40, BatchLayout.of(*layout)) == paired_keys(40, BatchLayout.of(6, 0, 1))


def test_earlier_runs_keep_the_strata_of_their_places():
    for keys in paired_keys(20, BatchLayout.of(6, 0, 1), strata_rule=RULE_BY_PLACE):
        assert [key.stratum for key in keys] == list(range(len(keys)))


@pytest.mark.parametrize("cache", ["true", "false"])
def test_class_samples_have_their_weight_and_caption(world, tmp_path, cache):
    config = finetuning(
        world, tmp_path / "run", **DREAM, data__cache=cache, train__train_text_encoder="true"
    )
    run = setup(config, tmp_path / "run", Accelerator(cpu=True))
    batches = run.train_data.batches(
        run.layout,
        first_step=0,
        last_step=config.train.max_steps,
        accelerator=run.accelerator,
        seed=config.train.seed,
    )
    batch = next(batches)
    num = len(run.train_data.train)
    is_class = batch["index"] >= num
    assert is_class.sum() == 2
    assert batch["weight"][is_class].tolist() == [0.5, 0.5]
    assert batch["weight"][~is_class].tolist() == [1.0, 1.0]
    assert (batch["input_ids"][is_class] != batch["input_ids"][~is_class]).any()
    assert batch["eps"].flatten(1).unique(dim=0).shape[0] == 4
    assert len(run.train_data.ids) == num + 3
    assert str(run.train_data.ids[num]).endswith("00000.png")


def test_dreambooth_resumes_bitwise_and_keeps_its_images(world, tmp_path):
    assert train(finetuning(world, tmp_path / "whole", **DREAM)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(finetuning(world, tmp_path / "run", **DREAM, train__max_steps=2)) == 0
    before = files(tmp_path / "run" / "class_images")
    AcceleratorState._reset_state(reset_partial_state=True)
    config = finetuning(world, tmp_path / "run", **DREAM)
    assert first_checkpoint(config, tmp_path / "run") is not None
    assert train(config) == 0
    assert files(tmp_path / "run" / "class_images") == before
    last = checkpoint_state(tmp_path / "run" / "checkpoints" / "step-000000004")
    assert last["strata_rule"] == STRATA_RULE
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_runs_of_an_earlier_version_end_by_its_rule_and_are_told(
    world, tmp_path, monkeypatch, caplog
):
    """A run is begun with strata by place, its checkpoints without a rule, and then continued."""
    settings = DREAM | {"diffusion__timestep_sampling": "stratified"}

    def run(name: str, num_steps: int) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert (
            train(finetuning(world, tmp_path / name, **settings, train__max_steps=num_steps)) == 0
        )
        return tmp_path / name / "checkpoints" / f"step-{num_steps:09d}"

    with monkeypatch.context() as earlier:
        earlier.setattr(train_t2i, "strata_rule_of", lambda start: RULE_BY_PLACE)
        run("whole", 4)
        begun = load_checkpoint(run("run", 2))
    state = {name: value for name, value in begun.state.items() if name != "strata_rule"}
    save_checkpoint(
        begun.path.parent,
        step=2,
        tensors=begun.tensors,
        state=state,
        config_hash=begun.config_hash,
        world_size=1,
    )
    caplog.clear()
    continued = checkpoint_state(run("run", 4))
    assert "trains both on all" in caplog.text
    assert continued["strata_rule"] == RULE_BY_PLACE
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_rules_of_a_later_version_are_refused(tmp_path):
    path = save_checkpoint(
        tmp_path, step=1, tensors={}, state={"strata_rule": 3}, config_hash="", world_size=1
    )
    with pytest.raises(ValueError, match="by rule 3, expected 1 or 2"):
        train_t2i.strata_rule_of(path)
