"""One loop over prompts and seeds: every image once, in whatever batches and shares."""

import numpy as np
import pytest
from fakes_pipeline import tiny_pipeline
from fakes_sdxl import sdxl_pipeline

from latentdiff.evaluation.metrics.heldout_loss import rank_batches
from latentdiff.pipeline.png_metadata import read_settings
from latentdiff.sampling.batch_sampler import BatchSampler, generate_images, index_batches
from latentdiff.sampling.prompt_list import ImageJob

PROMPTS = ["a red heart", "a cat", "blue sea", "a face", "a table"]


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num", [0, 1, 4, 5, 9])
def test_every_index_counts_once_over_all_ranks(num, num_ranks, pads):
    counted, lengths = [], set()
    for rank in range(num_ranks):
        dealt = list(rank_batches(-(-num // 4), (rank, num_ranks)))
        batches = list(index_batches(num, batch_size=4, pads=pads, batches=dealt))
        lengths.add(len(batches))
        for indices, num_counted in batches:
            assert len(indices) == 4 if pads else 1 <= len(indices) <= 4
            counted += indices[:num_counted]
    assert sorted(counted) == list(range(num))
    assert len(lengths) == 1  # as many passes on each rank


def test_batches_and_shares_do_not_change_an_image():
    pipe = tiny_pipeline()
    call = {"seeds": range(5), "num_inference_steps": 2, "guidance_scale": 3.0}
    alone = dict(generate_images(pipe, PROMPTS, batch_size=1, **call))
    assert list(alone) == list(range(5))
    shared = {}
    for rank in range(2):
        batches = rank_batches(3, (rank, 2))
        shared |= generate_images(pipe, PROMPTS, batch_size=2, pads=True, batches=batches, **call)
    assert shared.keys() == alone.keys()
    for k, image in alone.items():
        difference = np.abs(np.asarray(image, int) - np.asarray(shared[k], int))
        assert difference.max() <= 1


def test_captions_are_sampled_verbatim_and_typed_prompts_may_weigh_words():
    pipe = tiny_pipeline()
    call = {"seeds": [1], "batch_size": 1, "num_inference_steps": 1, "guidance_scale": 3.0}
    prompt = ["a (red:1.5) heart"]
    (_, caption), (_, typed) = (
        *generate_images(pipe, prompt, **call),
        *generate_images(pipe, prompt, prompt_weighting=True, **call),
    )
    assert read_settings(caption)["call"]["prompt_weighting"] is False
    assert caption.tobytes() == pipe(**read_settings(caption)["call"]).images[0].tobytes()
    assert typed.tobytes() == pipe(**read_settings(typed)["call"]).images[0].tobytes()
    assert caption.tobytes() != typed.tobytes()
    assert len(list(generate_images(pipe, ["a clock (12:30)"], **call))) == 1


def test_sdxl_without_a_negative_prompt_is_guided_by_zeros_and_not_by_the_empty_text():
    pipe = sdxl_pipeline()
    shared = {"prompt_weighting": True, "image": None}
    sampler = BatchSampler(pipe, shared, 4, False, False, print)
    jobs = [
        ImageJob(k, k, "a cat", negative, 1, 2, 5.0)
        for k, negative in enumerate([None, "", "a table"])
    ]
    images = [image.tobytes() for _, image, _ in sampler.sample(jobs)]
    call = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2}
    assert images[0] == pipe(**call).images[0].tobytes()
    assert len(set(images)) == 3
