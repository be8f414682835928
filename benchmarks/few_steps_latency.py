"""Seconds of one image: 4 steps of a distilled student against its teacher's guided ones.

    python benchmarks/few_steps_latency.py TEACHER [--student S] [--steps 25] [--tiny FOLDER]

TEACHER: a model's folder; S: its student's, by default the teacher itself with a guidance
embedding, whose images are wrong and whose time is the same. Whole calls, batch 1, on one core and
then on two, each in a process of its own: the teacher's guided steps in stock diffusers in each of
its settings (float32 and bf16, channels_last or not) and in LatentDiffPipeline with
`fast_cpu.is_on`; the student's --student_steps with its own VAE's decoder and with a tiny one:
--tiny, or one of width 16 with random weights. Arms take turns, one call of each a round, so that
whatever else the machine does meets all alike. Seconds are the process' CPU time on one core, the
clock's on two. Prints one JSON line: medians, and ratios of the best settings, the median over
rounds with the lowest and highest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile

import torch
from common import OwnProcess, machine, medians, own_seconds, take_turns
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from latentdiff import LatentDiffPipeline
from latentdiff.cli.command import quieten_libraries
from latentdiff.models.build import build_tiny_vae
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import resolve_model
from latentdiff.models.unet.guidance_embedding import add_guidance_embedding
from latentdiff.pipeline.schedulers import distilled_scheduler

DTYPES = {"": torch.float32, "_bf16": torch.bfloat16}
PROMPT, GUIDANCE_SCALE, TINY_WIDTH = "a red circle", 3.0, 16


def timed(work):
    """Return a work that measures itself, as take_turns takes it."""

    def measured():
        started = own_seconds()
        work()
        return own_seconds() - started

    return measured


def ratio_with_range(times, slow, fast):
    """Return the median over rounds of the seconds of `slow` over those of `fast`, min and max."""
    found = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    return [round(x, 2) for x in (statistics.median(found), min(found), max(found))]


def open_stock(folder, dtype, *, is_channels_last):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    if is_channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def open_ours(folder, dtype, *, tiny=None):
    pipe = LatentDiffPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.fast_cpu.is_on = True
    if tiny is not None:
        pipe.vae = tiny_vae(pipe, tiny).to(dtype)
    return pipe


def tiny_vae(pipe, folder):
    """Return the tiny VAE of a folder; of "", one with random weights."""
    if folder:
        return AutoencoderTiny.from_pretrained(folder)
    codec, channels = LatentCodec(pipe.vae), pipe.unet.config.out_channels
    return build_tiny_vae(factor=codec.factor, latent_channels=channels, width=TINY_WIDTH)


def untrained_student(teacher, folder):
    """Write the teacher with a guidance embedding and a sampler of few steps; return the folder."""
    pipe = StableDiffusionPipeline.from_pretrained(resolve_model(teacher))
    unet = add_guidance_embedding(pipe.unet)
    pipe.register_modules(unet=unet, scheduler=distilled_scheduler(pipe.scheduler))
    pipe.save_pretrained(folder)
    return folder


class Calls:
    """The calls of one image each, in this process, on so many threads."""

    def __init__(self, threads, args):
        torch.set_num_threads(threads)
        quieten_libraries()
        self.args, self.works = args, {}
        teacher, student = (str(resolve_model(one)) for one in (args.teacher, args.student))
        for suffix, dtype in DTYPES.items():
            for name, is_last in (("", False), ("_cl", True)):
                pipe = open_stock(teacher, dtype, is_channels_last=is_last)
                self._add(f"stock{suffix}{name}", pipe, args.steps)
            self._add(f"ours{suffix}", open_ours(teacher, dtype), args.steps)
            pipe = open_stock(student, dtype, is_channels_last=False)
            self._add(f"stock_student{suffix}", pipe, args.student_steps)
            self._add(f"student{suffix}", open_ours(student, dtype), args.student_steps)
            pipe = open_ours(student, dtype, tiny=args.tiny)
            self._add(f"student_tiny{suffix}", pipe, args.student_steps)

    def _add(self, name, pipe, num_steps):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": num_steps, "guidance_scale": GUIDANCE_SCALE}
        generator = torch.Generator()
        self.works[name] = timed(
            lambda: pipe(PROMPT, generator=generator.manual_seed(0), output_type="np", **call)
        )

    def measure(self):
        """Take turns; return the medians and the ratios between the best settings."""
        times = take_turns(self.works, rounds=self.args.rounds)
        seconds = medians(times)

        def best(arm):
            names = [
                name for name in seconds if name.removesuffix("_cl").removesuffix("_bf16") == arm
            ]
            return min(names, key=seconds.get)

        arms = ("stock", "ours", "stock_student", "student", "student_tiny")
        fastest = {arm: best(arm) for arm in arms}
        ratios = {
            f"{slow}/{fast}": ratio_with_range(times, fastest[slow], fastest[fast])
            for slow in ("stock", "ours")
            for fast in ("student", "student_tiny")
        }
        return {"best": fastest, "ratios": ratios, "seconds": seconds, "load": os.getloadavg()[0]}


def main():
    """Measure on each number of cores, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("--student", default="", help="folder of the distilled model")
    parser.add_argument("--steps", type=int, default=25, help="of the teacher")
    parser.add_argument("--student_steps", type=int, default=4)
    parser.add_argument("--tiny", default="", help="folder of a tiny VAE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # of several pipelines
    figures = {"benchmark": "few_steps_latency", "steps": args.steps, "rounds": args.rounds}
    figures |= {"student_steps": args.student_steps}
    with tempfile.TemporaryDirectory(prefix="few-steps-") as folder:
        args.student = args.student or untrained_student(args.teacher, folder)
        for threads in map(int, args.threads.split(",")):
            process = OwnProcess(Calls, threads, args)
            figures[f"threads_{threads}"] = process.call("measure")
            process.close()
            print(json.dumps(figures), file=sys.stderr)
    print(json.dumps(figures | machine()), flush=True)


if __name__ == "__main__":
    main()
