"""Options of the commands `sample` and `app`; imports nothing heavy, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleOptions:
    """Options of sampling, besides the prompts.

    Args:
        out: a .png file for one labelled sheet, or a folder for a file an image; a folder that
            holds some of the images already is completed.
        prompt_file: a text file with one prompt a line, or .jsonl with prompt, negative_prompt and
            seed.
        settings_from: a PNG file of LatentDiff or A1111, whose prompt, seed, steps, guidance, size
            and scheduler are taken, but for those given here.
        steps: number of steps, or a list such as [10,20] for a grid.
        guidance_scale: scale of guidance, or a list for a grid; by default the model's own, or 7.5.
        seed: of the first image; the next prompts count up from it.
        negative_prompt: a description of what the images should not show.
        num_images: images a prompt.
        batch_size: images made at once; lower it when memory runs out.
        scheduler: by name, such as dpm++2m-karras; the model's own by default.
        height: in pixels.
        width: in pixels.
        image: an image to start from.
        mask: an image that is white where `image` is to be repainted.
        strength: in (0, 1], how much of the image is made anew.
        guidance_rescale: in [0, 1].
        guidance_interval: guided part of the chain, such as [0.1,0.8].
        long_prompts: "truncate", or "chunks" to encode long prompts in parts.
        prompt_weighting: "(red:1.3) apple" weighs "red" by 1.3; false: prompts are taken verbatim,
            as captions are in training.
        clip_skip: layers of the text encoder that are skipped, counted from the last; none is 0.
        lora: a LoRA file or folder.
        lora_scale: strength of the LoRA; 1 as trained.
        dtype: float32, bfloat16 or float16; auto: bfloat16 where the device is fast in it.
        fast: on a CPU use packed layers, whose float32 images are within 1/255 of diffusers'
            layers; false: diffusers' layers.
        compile: compile the U-Net by torch.compile before the first image, which takes minutes
            and is kept for later runs; a guidance_interval or scales of 1 and more compile twice.
            Meant for GPUs: on a CPU `fast` alone is faster.
        device: cpu, cuda, mps; the best there is by default.
        safety_checker: false opens the model without its safety checker.
        trace: also write each image's chain and each word's heat map next to it.
    """

    out: str
    prompt_file: str | None = None
    settings_from: str | None = None
    steps: int | list[int] = 50
    guidance_scale: float | list[float] | None = None
    seed: int = 0
    negative_prompt: str | None = None
    num_images: int = 1
    batch_size: int = 4
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: list[float] | None = None
    long_prompts: str = "truncate"
    prompt_weighting: bool = True
    clip_skip: int | None = None
    lora: str | None = None
    lora_scale: float | None = None
    dtype: str = "auto"
    fast: bool = True
    compile: bool = False
    device: str | None = None
    safety_checker: bool = True
    trace: bool = False


@dataclass(frozen=True)
class WebUIOptions:
    """Options of the web UI.

    Args:
        host: address to listen on; 0.0.0.0 admits other machines.
        port: to listen on.
        loras: a folder of LoRA files to choose from.
        preview_vae: a small VAE of the same latent space, such as TAESD, for previews.
        dtype: float32, bfloat16 or float16; auto: bfloat16 where the device is fast in it.
        device: cpu, cuda, mps; the best there is by default.
        max_side_px: largest height and width.
        safety_checker: false opens the model without its safety checker.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    loras: str | None = None
    preview_vae: str | None = None
    dtype: str = "auto"
    device: str | None = None
    max_side_px: int = 1024
    safety_checker: bool = True
