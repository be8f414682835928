"""Seconds of a 512 px image of Stable Diffusion 1.5's size: 4 steps of a student, 20 guided, peers.

    python benchmarks/few_steps_sd15.py [--rounds 2] [--threads 1,2] [--engines torch,openvino]

Random weights, batch 1. The parts of a call take turns, one of each a round, on one core and then
on two, each in a process of its own: a guided step (both captions in one pass) of stock diffusers
in channels_last and of LatentDiffPipeline's packed U-Net, a step of a student that reads the
guidance, decoding by the VAE, and by a tiny one of TAESD's size; all in bf16. After them, in
processes of their own, OpenVINO's bf16 passes of the same networks, and stable-diffusion.cpp's
calls from a float16 file, whose step is the difference of two calls, where `openvino` and the
wheel `cyllama`, which holds it, are installed; "skipped" says what was not. Seconds are the
processes' CPU time on one core, the clock's on two. A call is its steps and its decoding: the text
encoder's part, below a hundredth, is not in it. Prints one JSON line.
"""

import argparse
import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from common import OwnProcess, machine, medians, take_turns
from few_steps_latency import timed
from sample_sd15 import fast_pass, inputs, make_unet, make_vae
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.models.build import build_tiny_vae, make_ddpm_scheduler
from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.guidance_embedding import add_guidance_embedding, guidance_features
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.pipeline.files.single_file import bundled_configs, save_single_file

LATENT_SIZE, GUIDED_STEPS, FEW_STEPS, GUIDANCE_SCALE = 64, 20, 4, 7.5


def make_tiny_vae():
    torch.manual_seed(0)
    return build_tiny_vae(factor=8, latent_channels=4).eval().bfloat16()


def random_latents():
    return torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE)


def decoding(vae):
    """Return a work: the decoding of one image's latents, in the layout that is faster."""
    last = {"memory_format": torch.channels_last}
    codec, z = LatentCodec(vae.to(**last)), random_latents().to(**last)
    return lambda: codec.decode(z)


def call_seconds(parts, *, guided, few):
    """Return the seconds of a call by arm, of its parts: steps by name, and decodings."""
    steps = FEW_STEPS * parts[few]
    return {name: GUIDED_STEPS * parts[name] + parts["decode"] for name in guided} | {
        "student": steps + parts["decode"],
        "student_tiny": steps + parts["decode_tiny"],
    }


class Torch:
    """Stock diffusers and ours."""

    def __init__(self, threads, folder):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        unet, (x, t, embeds) = make_unet(), inputs(LATENT_SIZE)
        student, guided, few = add_guidance_embedding(unet).eval(), FastCPU(), FastCPU()
        features = guidance_features(student, GUIDANCE_SCALE, num=1)
        guided.is_on = few.is_on = True
        last = make_unet().to(memory_format=torch.channels_last)
        x_last = x.to(memory_format=torch.channels_last)

        def few_pass():
            with few.speed_up(student, x[:1]):
                student(x[:1], t, encoder_hidden_states=embeds[1:], timestep_cond=features)

        self.works = {
            "stock": lambda: last(x_last, t, encoder_hidden_states=embeds),
            "ours": lambda: fast_pass(guided, unet, x, t, embeds),
            "few": few_pass,
            "decode": decoding(make_vae()),
            "decode_tiny": decoding(make_tiny_vae()),
        }

    def measure(self, rounds):
        """Return the seconds of the parts and of a call by arm."""
        times = take_turns({name: timed(work) for name, work in self.works.items()}, rounds=rounds)
        parts = medians(times)
        seconds = call_seconds(parts, guided=("stock", "ours"), few="few")
        return {"parts": parts, "seconds": seconds}


class Forward(torch.nn.Module):
    """The pass of a U-Net, or the decoding by a VAE, as a module to be traced."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, *others):
        if others:
            t, embeds = others
            return self.network(x, t, encoder_hidden_states=embeds, return_dict=False)[0]
        return self.network.decode(x, return_dict=False)[0]


class OpenVino:
    """OpenVINO's passes of the same networks, each compiled for its inputs."""

    def __init__(self, threads, folder):
        torch.set_grad_enabled(False)
        torch.set_num_threads(threads)
        self.settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def measure(self, rounds):
        """Return the seconds of the parts and of a call by arm."""
        x, t, embeds = (one.float() for one in inputs(LATENT_SIZE))
        unet, parts = make_unet().float(), {}
        parts["openvino"] = self._seconds(unet, (x, t, embeds), rounds=rounds)
        parts["few"] = self._seconds(unet, (x[:1], t, embeds[1:]), rounds=rounds)
        for name, vae in (("decode", make_vae()), ("decode_tiny", make_tiny_vae())):
            parts[name] = self._seconds(vae.float(), (random_latents(),), rounds=rounds)
        return {"parts": parts, "seconds": call_seconds(parts, guided=["openvino"], few="few")}

    def _seconds(self, network, example, *, rounds):
        import openvino

        shapes = [one.shape for one in example]
        model = openvino.convert_model(Forward(network), example_input=example, input=shapes)
        compiled = openvino.Core().compile_model(model, "CPU", self.settings)
        arrays = [one.numpy() for one in example]
        return medians(take_turns({"": timed(lambda: compiled(arrays))}, rounds=rounds))[""]


class StableDiffusionCpp:
    """stable-diffusion.cpp's calls; a guided step is two passes there."""

    def __init__(self, threads, folder):
        torch.set_num_threads(threads)  # of the clock that is read
        self.file, self.tiny, self.threads = folder / "model.safetensors", folder / "tiny", threads
        if not self.file.exists():
            write_single_file(self.file)
            make_tiny_vae().half().save_pretrained(self.tiny)

    def measure(self, rounds):
        """Return the seconds of the parts and of a call by arm; each is called once."""
        one, two = self._seconds([1, 2])
        tiny = self.tiny / "diffusion_pytorch_model.safetensors"
        (one_tiny,) = self._seconds([1], taesd_path=str(tiny))
        few = two - one
        parts = {"few": few, "guided": 2 * few, "decode": one - few, "decode_tiny": one_tiny - few}
        parts = {name: round(seconds, 4) for name, seconds in parts.items()}
        return {"parts": parts, "seconds": call_seconds(parts, guided=["guided"], few="few")}

    def _seconds(self, steps, **options):
        from cyllama import sd

        side = 8 * LATENT_SIZE
        call = {"sample_method": sd.SampleMethod.EULER, "scheduler": sd.Scheduler.DISCRETE}
        call |= {"width": side, "height": side, "cfg_scale": 1.0, "seed": 0}
        found = []
        for num in steps:
            context = sd.SDContextParams(model_path=str(self.file))
            context.n_threads = self.threads
            for name, value in options.items():
                setattr(context, name, value)
            model = sd.SDContext(context)  # generates once: its weights are freed as they are used
            work = partial(model.generate, "a cat", sample_steps=num, **call)
            found.append(timed(work)())
        return found


def write_single_file(path):
    """Write the networks into one file in float16."""
    text = CLIPTextModel(CLIPTextConfig(**bundled_configs("sd1")["text_encoder"]))
    parts = {"unet": make_unet(), "vae": make_vae(), "text_encoder": text.eval()}
    parts = {
        name: part.half().to(memory_format=torch.contiguous_format) for name, part in parts.items()
    }
    info = {"model_info": ModelInfo(), "stated_info": ModelInfo()}
    save_single_file(SimpleNamespace(**parts, scheduler=make_ddpm_scheduler(), **info), path)


def measure(kind, threads, args, folder):
    """Return what one kind measures in a process of its own."""
    process = OwnProcess(kind, threads, folder)
    try:
        return process.call("measure", args.rounds)
    finally:
        process.close()


def main():
    """Measure on each number of cores, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--engines", default=",".join(ENGINES))
    args = parser.parse_args()
    asked = args.engines.split(",")
    engines = [name for name in asked if importlib.util.find_spec(name)]
    figures = {"benchmark": "few_steps_sd15", "skipped": sorted(set(asked) - set(engines))}
    figures |= {"guided_steps": GUIDED_STEPS, "few_steps": FEW_STEPS, "rounds": args.rounds}
    with tempfile.TemporaryDirectory(prefix="few-steps-") as folder:
        for threads in map(int, args.threads.split(",")):
            figures[f"threads_{threads}"] = {
                name: measure(ENGINES[name], threads, args, Path(folder)) for name in engines
            }
    print(json.dumps(figures | machine()), flush=True)


ENGINES = {"torch": Torch, "openvino": OpenVino, "cyllama": StableDiffusionCpp}

if __name__ == "__main__":
    main()
