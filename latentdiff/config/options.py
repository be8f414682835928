"""Options of commands that use a model: sample, app, evaluate, audit, compare, distill, and others.

Imports nothing heavy, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentdiff.config.validation import at_least, at_least_if_given, check_ranges, positive


@dataclass(frozen=True)
class SampleOptions:
    """How images are made, and where they go."""

    out: str
    """a .png file for one labelled sheet, or a folder for a file an image; a folder that holds some
    of the images already is completed"""
    prompt_file: str | None = None
    """a text file with one prompt a line, or .jsonl with prompt and, where they are a line's own,
    negative_prompt, seed, prompt_2 and the other options of SDXL below"""
    settings_from: str | None = None
    """a PNG file of LatentDiff or A1111, whose prompt, seed, steps, guidance, size and scheduler
    are taken, but for those given here"""
    num_inference_steps: int | list[int] | None = None
    """sampling steps, 1 and more, or a list such as [10,20] for a grid; by default the model's own
    where it is distilled, or 50"""
    guidance_scale: float | list[float] | None = None
    """scale of classifier-free guidance, 1 and below: none, or a list such as [2,7] for a grid; by
    default the model's own, or 7.5, for SDXL 5"""
    seed: int = 0
    """seed of the first image, 0 and more; those of the next prompts count up from it"""
    negative_prompt: str | None = None
    """a description of what the images should not show"""
    prompt_2: str | None = None
    """SDXL: what its second text encoder reads, for all prompts; by default the same prompt"""
    negative_prompt_2: str | None = None
    """SDXL: the negative prompt of its second text encoder; by default the same"""
    original_size: list[int] | None = None
    """SDXL: the size that the image is said to have had, [height,width] in pixels; small ones give
    blurred images; by default the image's own"""
    crops_coords_top_left: list[int] | None = None
    """SDXL: the corner at which the image is said to be cropped, [top,left] in pixels; by default
    [0,0], the whole subject in view"""
    target_size: list[int] | None = None
    """SDXL: the size that the image is said to have, [height,width]; by default its own"""
    negative_original_size: list[int] | None = None
    """SDXL: what the negative prompt is told in place of original_size; by default the same"""
    negative_crops_coords_top_left: list[int] | None = None
    """SDXL: the same of crops_coords_top_left"""
    negative_target_size: list[int] | None = None
    """SDXL: the same of target_size"""
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
    condition: str | list[str] | None = None
    """an image file that the model or a ControlNet reads: an image to edit, one in low resolution,
    a map such as depth; of several ControlNets one each"""
    image_guidance_scale: float | None = None
    """guidance towards the image to edit, 1 and more; by default 1.5"""
    noise_level: int | None = None
    """noise that an upscaler adds to its low-resolution image, 0 and more; by default 20"""
    controlnet: str | list[str] | None = None
    """a ControlNet's folder, run or hub id, or several, whose effects add up"""
    controlnet_conditioning_scale: float | list[float] | None = None
    """strength of the ControlNet, in [-10, 10], or one of each; by default 1"""
    window_size: int | None = None
    """for larger images than the model was trained at: the side in pixels of square windows in
    which the U-Net predicts one by one (MultiDiffusion); each step costs a pass a window"""
    window_overlap: float = 0.5
    """least share of a window that the next one covers too, in [0, 0.95]; 0.75 has fewer seams and
    costs about twice 0.5 in one row of windows, four times in a square"""
    vae_tiling: bool = False
    """decode large images tile by tile, in the memory of one tile (diffusers' enable_tiling)"""
    image: str | None = None
    """an image file to start from"""
    mask: str | None = None
    """an image file, white where `image` is to be repainted"""
    padding_mask_crop: int | None = None
    """pixels around what is to be repainted: this part alone is made, at the model's size, and
    pasted back, so that all other pixels stay; by default the whole image is made anew"""
    keep_unmasked: bool = False
    """an inpainting model keeps what `mask` leaves black to what the VAE makes of it, and does not
    make it anew, as diffusers does; models that read no mask always keep it"""
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
    vae: str | None = None
    """a VAE in place of the model's own: tiny, the fast one that its folder carries in vae_tiny/,
    or the folder or hub id of one of the same latents, such as TAESD"""
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
    controlnet: str | list[str] | None = None
    """a ControlNet's folder, run or hub id to choose from, or several; those of `runs` are
    offered too"""
    preview_vae: str | None = None
    """a small VAE of the same latent space, such as TAESD, for previews and, as VAE: tiny, for
    images; by default the one that a model's folder carries in vae_tiny/"""
    dtype: str = "auto"
    """number format: auto, float32, bfloat16 or float16; auto: bfloat16 where the device is fast in
    it"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""
    max_side_px: int = 2048
    """largest height and width that the UI offers, in pixels; at most twice the trained ones, in
    windows eight times"""
    safety_checker: bool = True
    """keep the model's safety checker, if any; false leaves it out, unread"""


@dataclass(frozen=True)
class EvalModelOptions:
    """The images that a model is evaluated on, and how they are read."""

    data: str
    """a captioned folder"""
    split: Literal["heldout", "train", "all"] = "heldout"
    """"heldout" takes test/ or validation/, or the images that training held out by hash; "all" is
    for a folder that the model has never seen, or that is too small to hold out any of it"""
    num_heldout: int = at_least(1, default=1000)
    """maximum number of real images, evenly spaced over the split"""
    caption_column: str = "text"
    """column of the metadata file that holds the caption"""
    heldout_fraction: float = 0.02
    """share held out by a stable hash, in [0, 1], as in training, where no folder is named test or
    validation"""
    batch_size: int = at_least(1, default=32)
    """images at once; lower it when memory runs out"""
    seed: int = 0
    """seed of all random numbers, 0 and more"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""
    safety_checker: bool = True
    """keep the model's safety checker, if any; false leaves it out, unread"""


@dataclass(frozen=True)
class EvaluationOptions:
    """The images that the model generates, and the networks that score them."""

    num_images: int = 128
    """images generated for held-out captions, 8 and more; 0: none"""
    images_per_caption: int = 2
    """generated images of one caption, 1 and more; more where captions are few"""
    num_inference_steps: int | None = at_least_if_given(1)
    """sampling steps; by default the model's own where it is distilled, or 25"""
    guidance_scale: float | None = None
    """scale of classifier-free guidance, of both models alike; by default the scale that the first
    model's folder names, or 7.5"""
    features: str | None = None
    """folder of a feature network (a MobileNet's arch.json, a transformers vision model or a CLIP):
    fidelity, and better features for copies and diversity"""
    dino: str | None = None
    """folder of a DINO, DINOv2 or DINOv3 of transformers: FD and KID of its class token"""
    clip: str | None = None
    """folder of a transformers CLIP, or the name of an open_clip model: CLIP score and CMMD"""
    clip_weights: str | None = None
    """safetensors file of the open_clip model that --clip names"""
    num_train: int = at_least(3, default=5000)
    """maximum number of training images that are searched for copies"""
    class_column: str = ""
    """column of the metadata file that names an image's class; by default, folders"""
    compare: str | None = None
    """another model, measured on the same captions and seeds and compared"""
    step_sweep: list[int] = field(default_factory=list)
    """numbers of sampling steps such as [5,10,25,50]; none by default"""


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is estimated, and on how many steps its sheets are sampled."""

    chain: str = ""
    """bound a shorter chain, such as "25" or "ddim50"; the model's own by default"""
    variance_type: str | None = None
    """fixed_small, fixed_large or learned_range; the model's own by default"""
    draws: int = at_least(1, default=16)
    """timesteps sampled for each estimate of an image, by importance and in strata"""
    repeats: int = at_least(1, default=2)
    """estimates of each image; two or more separate noise from the variation of
    images"""
    pilot: int = at_least(1, default=8)
    """images whose every timestep is evaluated first, to choose the timesteps"""
    compare_variance: list[str] = field(default_factory=list)
    """chains, such as ["25","100"], on which a learned variance is compared with the two fixed
    ones"""
    image_steps: int = at_least(0, default=50)
    """steps of the sheets' chains; 0: no sheets"""


@dataclass(frozen=True)
class SweepOptions:
    """The guidance scales of the sweep, and the images of both sweeps."""

    guidance_sweep: list[float] = field(default_factory=list)
    """scales such as [1,2,4,8]; none by default"""
    sweep_captions: int = at_least(1, default=32)
    """captions of the images"""
    sweep_images: int = at_least(2, default=4)
    """images of each caption"""
    sweep_steps: int = at_least(1, default=25)
    """sampling steps of the guidance sweep"""


@dataclass(frozen=True)
class CaptionAuditOptions:
    """The captions that are audited, and how exactly they are measured."""

    data: str
    """a captioned folder"""
    out: str = ""
    """the folder for captions.json and captions.html; by default audit/ in the run's folder, whose
    report shows the result"""
    split: Literal["train", "heldout", "all"] = "all"
    """the images whose captions are measured, as for evaluate"""
    max_images: int = at_least(1, default=5000)
    """maximum number of images, evenly spaced over the split"""
    trigger_word: str = ""
    """the word that stands for a subject, such as sks: which captions give its identity to other
    words instead; it becomes the first tag of captions that lack it, as in training"""
    caption_column: str = "text"
    """column of the metadata file that holds the caption; of several captions, the first counts"""
    heldout_fraction: float = 0.02
    """as in training, with --split train or heldout"""
    draws: int = at_least(1, default=16)
    """timesteps of each estimate of a caption, by importance and in strata"""
    repeats: int = at_least(2, default=4)
    """estimates of each caption, whose spread gives the standard error"""
    batch_size: int = at_least(1, default=32)
    """images at once; lower it when memory runs out"""
    seed: int = 0
    """seed of timesteps and noise, 0 and more"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""


@dataclass(frozen=True)
class PrivacyOptions:
    """The images that are audited, and how exactly they are measured."""

    data: str
    """the captioned folder that the model was trained on; of test/ or validation/ in it, and of
    images held out by hash, none counts as trained on"""
    out: str = ""
    """the folder for privacy.json and privacy.html; by default audit/ in the run's folder, whose
    report shows the result"""
    heldout: str = ""
    """a captioned folder of images of the same kind that the model never saw; by default the
    held-out split of the data"""
    base: str = ""
    """the model that training started from, whose losses are taken off: the audit finds more"""
    max_images: int = at_least(5, default=500)
    """maximum number of images of each kind, evenly spaced"""
    draws: int = at_least(1, default=16)
    """timesteps and noises at which each image's loss is measured"""
    num_images: int = at_least(0, default=16)
    """images generated of training captions, among which copies are looked for; 0: none"""
    guidance_scale: float | None = None
    """scale of classifier-free guidance of those; by default the model's own, or 7.5"""
    card: bool = False
    """write a line with the result into the README.md of the model's folder too"""
    caption_column: str = "text"
    """column of the metadata file that holds the caption; of several captions, the first counts"""
    heldout_fraction: float = 0.02
    """share of the data that training held out by a stable hash, in [0, 1], as in training"""
    batch_size: int = at_least(1, default=32)
    """images at once; lower it when memory runs out"""
    seed: int = 0
    """seed of noise and images, 0 and more"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""


AttributionMethod = Literal["trak", "d_trak", "tracin", "features"]


@dataclass(frozen=True)
class ExplainOptions:
    """How the training images behind an image are ranked."""

    method: AttributionMethod = "d_trak"
    """gradients of the loss (trak) or of the squared output (d_trak) in the metric of all training
    gradients; gradients of the loss at each checkpoint (tracin); or features alone, the baseline"""
    prompt: str = ""
    """the image's caption; by default the prompt that its PNG file holds"""
    out: str = ""
    """the folder for explain.json and explain.html; by default audit/ in the run's folder"""
    max_images: int = at_least(2, default=2000)
    """maximum number of training images that are ranked, evenly spaced over the folder"""
    draws: int = at_least(1, default=16)
    """timesteps and noises at which each image is measured"""
    projection_size: int = at_least(1, default=8192)
    """numbers that the gradient of all weights is projected to"""
    damping: float = positive(default=0.1)
    """trak and d_trak: what is added to the metric's diagonal, as a share of its mean"""
    features: str = ""
    """folder of a network for features, as for evaluate; by default thumbnails of 16 pixels"""
    num_shown: int = at_least(1, default=24)
    """training images on the page"""
    seed: int = 0
    """seed of noise and projection, 0 and more"""


UNRELATED = (
    "a red car",
    "a green apple",
    "a yellow face",
    "a blue house",
    "a tree",
    "a slice of pizza",
    "a bicycle",
    "an open book",
    "a city at night",
    "a mountain with snow",
    "a cup of coffee",
    "a person with a hat",
    "a rocket",
    "a bird",
    "a guitar",
    "a bunch of flowers",
)


@dataclass(frozen=True)
class CompareSubjectOptions:
    """The prompts of both models, and their sampling settings."""

    prompt: str
    """the tuned model's prompt for the subject, such as "a photo of sks dog" """
    base_prompt: str = ""
    """the base model's prompt for the subject; empty: the same"""
    unrelated: tuple[str, ...] = UNRELATED
    """prompts whose images should not have changed; ten and more"""
    num_seeds: int = 16
    """images of the subject by each model, 2 and more"""
    num_inference_steps: int | None = None
    """sampling steps, 1 and more; by default each model's own where it is distilled, or 30"""
    guidance_scale: float = 5.0
    """scale of classifier-free guidance"""


@dataclass(frozen=True)
class RollOptions:
    """The size of the example, and the known coordinate."""

    max_steps: int = at_least(1, default=6000)
    """optimiser steps"""
    num_timesteps: int = at_least(8, default=100)
    """length of the chain"""
    num_points: int = at_least(100, default=4000)
    """points of each cloud, and of the bound"""
    known: float = 0.5
    """the value of the first coordinate that conditional samples are given"""
    tolerance: float = positive(default=0.1)
    """standard deviation of that value"""
    seed: int = 0
    """seed of all random numbers, 0 and more"""


DistillRecipe = Literal["progressive", "lcm_lora"]
STUDENT_STEPS = (16, 8, 4, 2, 1)  # sampling steps after each halving


@dataclass(frozen=True)
class DistillOptions:
    """The stages of `latentdiff distill`, and what each is measured by."""

    method: DistillRecipe = "progressive"
    """progressive: guidance first, then halvings of the steps, of the whole U-Net; lcm_lora: a LoRA
    for the model and those tuned from it, sampled with the scheduler lcm and no guidance"""
    steps: int = 4
    """sampling steps of the last student: 16, 8, 4, 2 or 1"""
    guided_steps: int = at_least(0, default=0)
    """optimiser steps of the first stage, which learns guidance; 0: for 5/32 of the images of the
    teacher's last training"""
    halving_steps: int = at_least(0, default=0)
    """optimiser steps of each halving; 0: for 1/32, 2/32, 3/32, 4/32 and 6/32 of the images of the
    teacher's last training, for 16, 8, 4, 2 and 1 sampling steps"""
    lora_steps: int = at_least(1, default=1000)
    """optimiser steps of lcm_lora"""
    teacher_images: int = at_least(0, default=0)
    """images of the folder's captions that the teacher draws, with --teacher_num_steps, and the
    student trains on in place of the folder's own: for small folders; 0: none"""
    num_images: int = at_least(10, default=128)
    """captions, held-out ones first, that teacher and student draw from the same seeds"""
    teacher_num_steps: int = at_least(1, default=25)
    """sampling steps of the teacher, with classifier-free guidance"""
    guidance_scale: float | None = None
    """guidance scale of both; by default the teacher's own, within the scales that are learned"""
    measure_batch_size: int = at_least(1, default=16)
    """images drawn at once"""
    clip: str | None = None
    """folder of a transformers CLIP, or the name of an open_clip model: CLIP score"""
    clip_weights: str | None = None
    """safetensors file of the open_clip model that --clip names"""
    features: str | None = None
    """folder of a feature network, as for evaluate: FD of the student's images to the teacher's"""
    max_accuracy_loss: float = 0.1
    """captions of the shapes world: share of right images that a stage may lose"""
    max_clip_loss: float = 0.02
    """CLIP score, a cosine, that a stage may lose"""
    max_distance: float = 0.6
    """distance to the teacher's images that a stage may have, 1 being that of unlike captions"""

    def check(self) -> None:
        """Raise ValueError for options out of range."""
        if self.steps not in STUDENT_STEPS:
            raise ValueError(f"steps={self.steps}, expected 16, 8, 4, 2 or 1")
        check_ranges(self)
