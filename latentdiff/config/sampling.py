"""Options of the commands `sample` and `app`; imports nothing heavy, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleOptions:
    """How images are made, and where they go."""

    out: str
    """a .png file for one labelled sheet, or a folder for a file an image; a folder that holds some
    of the images already is completed"""
    prompt_file: str | None = None
    """a text file with one prompt a line, or .jsonl with prompt, negative_prompt and seed"""
    settings_from: str | None = None
    """a PNG file of LatentDiff or A1111, whose prompt, seed, steps, guidance, size and scheduler
    are taken, but for those given here"""
    num_inference_steps: int | list[int] = 50
    """sampling steps, 1 and more, or a list such as [10,20] for a grid"""
    guidance_scale: float | list[float] | None = None
    """scale of classifier-free guidance, 1 and below: none, or a list such as [2,7] for a grid; by
    default the model's own, or 7.5"""
    seed: int = 0
    """seed of the first image, 0 and more; those of the next prompts count up from it"""
    negative_prompt: str | None = None
    """a description of what the images should not show"""
    num_images: int = 1
    """images of each prompt, 1 and more"""
    batch_size: int = 4
    """images made at once, 1 and more; lower it when memory runs out"""
    scheduler: str | None = None
    """scheduler by its name, such as ddim, euler, dpm++2m-karras, unipc or lcm; by default the
    model's own"""
    height: int | None = None
    """height in pixels, a multiple of the VAE's factor, mostly 8; by default the model's own"""
    width: int | None = None
    """width in pixels, as the height"""
    image: str | None = None
    """an image file to start from"""
    mask: str | None = None
    """an image file, white where `image` is to be repainted"""
    strength: float | None = None
    """share of the chain that is run from `image`, in (0, 1]: how much of it is made anew; by
    default 0.8"""
    guidance_rescale: float = 0.0
    """share of the rescaled guided prediction, in [0, 1], against over-exposure (Lin et al.
    2024)"""
    guidance_interval: list[float] | None = None
    """guided part of the chain, two shares such as [0.1,0.8]; by default all of it"""
    long_prompts: str = "truncate"
    """prompts of too many tokens: truncate, or chunks, which encodes them in parts"""
    prompt_weighting: bool = True
    """"(red:1.3) apple" weighs "red" by 1.3; false: prompts are taken verbatim, as captions are in
    training"""
    clip_skip: int | None = None
    """layers of the text encoder that are skipped, counted from the last, 0 and more; by default
    the model's own"""
    lora: str | None = None
    """a LoRA file or folder"""
    lora_scale: float | None = None
    """strength of the LoRA, in [-10, 10]; by default 1, as trained"""
    dtype: str = "auto"
    """number format: auto, float32, bfloat16 or float16; auto: bfloat16 where the device is fast in
    it"""
    fast: bool = True
    """on a CPU use packed layers, whose float32 images are within 1/255 of diffusers' layers;
    false: diffusers' layers"""
    compile: bool = False
    """compile the U-Net by torch.compile before the first image, which takes minutes and is kept
    for later runs; a guidance_interval or scales of 1 and more compile twice. Meant for GPUs: on a
    CPU `fast` alone is faster"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""
    safety_checker: bool = True
    """keep the model's safety checker, if any; false leaves it out, unread"""
    trace: bool = False
    """also write each image's chain and each word's heat map next to it"""


@dataclass(frozen=True)
class WebUIOptions:
    """How the web UI is served."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 admits other machines"""
    port: int = 7860
    """port to listen on, in 0..65535; 0: any free one"""
    runs: str | None = None
    """a folder of training runs, to watch and to make images with"""
    lora_dir: str | None = None
    """a folder of LoRA files to choose from"""
    preview_vae: str | None = None
    """a small VAE of the same latent space, such as TAESD, for previews"""
    dtype: str = "auto"
    """number format: auto, float32, bfloat16 or float16; auto: bfloat16 where the device is fast in
    it"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""
    max_side_px: int = 1024
    """largest height and width that the UI offers, in pixels"""
    safety_checker: bool = True
    """keep the model's safety checker, if any; false leaves it out, unread"""
