"""Class images next to the subject's: generated once, kept, and half of each step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from fakes_finetune import finetuning
from fakes_models import make_components
from fakes_training import read_metrics

from latentdiff.training.finetune.dreambooth import PairedOrder, generate_class_images
from latentdiff.training.inputs.batches import EpochOrder
from latentdiff.training.resume import first_checkpoint
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
    assert len(generate("a cat", 2)) == 7  # another prompt has images of its own


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


@pytest.mark.parametrize("cache", ["true", "false"])
def test_class_samples_have_their_weight_and_caption(world, tmp_path, cache):
    config = finetuning(
        world, tmp_path / "run", **DREAM, data__cache=cache, train__train_text_encoder="true"
    )
    run = setup(config, tmp_path / "run", Accelerator(cpu=True))
    batches = run.train_data.batches(
        run.layout, first_step=0, last_step=config.train.max_steps, accelerator=run.accelerator
    )
    batch = next(batches)
    num = len(run.train_data.train)
    is_class = batch["index"] >= num
    assert is_class.sum() == 2
    assert batch["weight"][is_class].tolist() == [0.5, 0.5]
    assert batch["weight"][~is_class].tolist() == [1.0, 1.0]
    assert (batch["text"][is_class] != batch["text"][~is_class]).any()
    assert batch["eps"].flatten(1).unique(dim=0).shape[0] == 4
    assert len(run.train_data.ids) == num + 3
    assert str(run.train_data.ids[num]).endswith("00000.png")


def test_dreambooth_resumes_bitwise_and_keeps_its_images(world, tmp_path):
    from accelerate.state import AcceleratorState

    assert train(finetuning(world, tmp_path / "whole", **DREAM)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(finetuning(world, tmp_path / "run", **DREAM, train__max_steps=2)) == 0
    before = files(tmp_path / "run" / "class_images")
    AcceleratorState._reset_state(reset_partial_state=True)
    config = finetuning(world, tmp_path / "run", **DREAM)
    assert first_checkpoint(config, tmp_path / "run") is not None
    assert train(config) == 0
    assert files(tmp_path / "run" / "class_images") == before
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
