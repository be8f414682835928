"""Measure the cost of keyed random numbers: per image in a data worker, and in training's process.

    python benchmarks/keyed_randomness.py [--latent_size 64] [--workers 2]

Prints one JSON line. Data workers make the random numbers of a sample; the training process only
takes a finished batch, which is measured in its CPU time. At 1,000 images/s an image has 1,000 us,
and 2 % of that are 20 us: `share_of_step` is the time that random numbers add to the training
process at that speed, over batches of latents and captions alone, to be below 0.02;
`workers_needed` is the number of workers that keep up, on cores like this one's.
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch
from torch.utils.data import DataLoader, Dataset

from latentdiff.data.captions import CaptionTransform
from latentdiff.data.folder.folder import Record
from latentdiff.training.inputs.batches import collate
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.inputs.randomness import SampleKey, sample_generator, standard_normal

CHANNELS, BATCH_SIZE, NUM_BATCHES = 4, 64, 20
IMAGES_PER_SECOND = 1000


class ZeroLatents:
    """Latents that cost nothing, so that only random numbers are measured."""

    def __init__(self, latent_size):
        self.zero = torch.zeros(CHANNELS, latent_size, latent_size)

    def shape(self, index):
        return tuple(self.zero.shape)

    def inputs(self, index, noise, *, flipped, crop):
        return {"z0": self.zero + noise}


class WithoutRandomness(Dataset):
    """Samples without their random numbers."""

    def __init__(self, samples):
        self.sample = samples[SampleKey(0, 0, 0, 0, 1.0)]

    def __getitem__(self, key):
        return {name: self.sample[name] for name in ("z0", "input_ids", "index")}


def microseconds(work, *, repeats=200):
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent_size", type=int, default=64, help="latent pixels a side")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("0.png", "0.png", ("a red star", "a star"), 512, 512, "train")
    samples = LatentDataset(
        ZeroLatents(args.latent_size),
        [record],
        encode_caption=lambda caption: {"input_ids": torch.zeros(77, dtype=torch.int64)},
        seed=0,
        caption_dropout=0.1,
        random_flip=True,
        transform=CaptionTransform(),
    )
    key = SampleKey(index=0, epoch=1, index_in_epoch=5, stratum=5, weight=1.0)
    shape = samples.latents.shape(0)
    sample = microseconds(lambda: samples[key])
    process = _in_the_training_process(samples, num_workers=args.workers)
    without = _in_the_training_process(WithoutRandomness(samples), num_workers=args.workers)
    result = {
        "benchmark": "keyed_randomness",
        "latent_size": args.latent_size,
        "key_us": microseconds(lambda: sample_generator(0, 1, 2, 3, "timestep").random()),
        "noise_us": microseconds(
            lambda: standard_normal(sample_generator(0, 1, 2, 3, "noise"), shape)
        ),
        "sample_us": sample,
        "images_per_second_a_worker": 1e6 / sample,
        "workers_needed": -(-sample * IMAGES_PER_SECOND // 1e6),
        "process_us_per_image": process,
        "process_us_per_image_without_randomness": without,
        "share_of_step": (process - without) * IMAGES_PER_SECOND / 1e6,
        "workers": args.workers,
        "batch_size": BATCH_SIZE,
        "machine": platform.platform(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


def _in_the_training_process(samples, *, num_workers):
    """Return the microseconds an image costs the process that takes batches from data workers.

    CPU time, so that waiting for a worker does not count.
    """
    keys = [[SampleKey(0, 0, k, k, 1.0) for k in range(BATCH_SIZE)]] * NUM_BATCHES
    loader = DataLoader(samples, batch_sampler=keys, num_workers=num_workers, collate_fn=collate)
    batches = iter(loader)
    next(batches)
    times = []
    for _ in range(NUM_BATCHES - 1):
        time.sleep(0.01)  # the step
        started = time.process_time()
        next(batches)
        times.append(time.process_time() - started)
    return statistics.median(times) * 1e6 / BATCH_SIZE


if __name__ == "__main__":
    main()
