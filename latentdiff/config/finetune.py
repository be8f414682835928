"""Settings of a run that starts from a trained model: which weights train, and what they learn.

A subject or style (fine-tuning), or the model's own answers in fewer sampling steps (distillation).
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from latentdiff.config.choices import AdapterType, FinetuneMethod
from latentdiff.config.validation import at_least, between, share_below_1

DistillMethod = Literal["none", "guided", "progressive", "lcm_lora"]
GuidanceWeighting = Literal["none", "inverse_square"]

FIXED_BY_DISTILLATION: dict[str, Any] = {  # settings with the one value that it takes
    "finetune.method": "full",
    "finetune.class_prompt": "",
    "train.train_text_encoder": False,
    "train.train_text_encoder_2": False,
    "train.stop": "never",  # no evaluation measures a student
    "train.keep_best": False,
    "eval.num_samples": 0,
    "diffusion.prediction_type": "",
    "diffusion.zero_terminal_snr": False,  # the teacher knows its own noise levels alone
    "diffusion.loss_weighting": "none",
    "diffusion.loss": "mse",
    "diffusion.learned_variance": False,
    "diffusion.caption_dropout": 0.0,
    "diffusion.offset_noise": 0.0,
    "diffusion.input_perturbation": 0.0,
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Trainable weights of model.pretrained, LoRA, textual inversion, and prior preservation."""

    method: FinetuneMethod = "full"
    """full: the whole U-Net; attention, cross_attention: those layers of it alone; lora: adapters
    on some of its layers (Hu et al. 2022); textual_inversion: new words alone (Gal et al. 2023);
    controlnet: a copy of its encoder that reads an image, RGB next to each (Zhang et al. 2023).
    train.train_text_encoder adds the text encoder, with lora by adapters"""
    adapter_type: AdapterType = "lora"
    """lora: what each adapter is: lora; dora (Liu et al. 2024), which trains the norm of each
    output's weights apart and takes longer; or lokr (Yeh et al. 2023), a Kronecker product, whose
    file is smaller, on the U-Net alone"""
    lora_rank: int = at_least(1, default=16)
    """rank of each adapter; of lokr, of the larger factor"""
    lokr_factor: int = at_least(-1, default=-1)
    """rows and columns of lokr's smaller factor where they divide the layer's; -1: near the square
    root"""
    lora_alpha: float = at_least(0, default=0.0)
    """adapters are scaled by lora_alpha / lora_rank; 0: by 1"""
    lora_dropout: float = share_below_1(default=0.0)
    """share of an adapter's inputs dropped while training"""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """ends of the names of the U-Net's layers that get adapters; "attn2.to_k" is narrower,
    "ff.net.2" or "conv1" more"""
    init_lora: str = ""
    """lora: a LoRA to start from, as kohya's network_weights: a file, folder, run or hub id in
    diffusers', peft's or kohya's naming. Rank and layers are its own"""
    lora_kohya: bool = True
    """lora: also write lora_kohya.safetensors, the same LoRA under the layer names that kohya's
    scripts, ComfyUI and A1111 load. lora/ is the one for diffusers"""
    token: str = ""
    """textual_inversion: the new word, such as "<my-dog>" """
    initializer_token: str = ""
    """textual_inversion: known words that initialise the new one, such as "dog" """
    num_vectors: int = at_least(1, default=1)
    """textual_inversion: number of embeddings of the new word"""
    init_embedding: str = ""
    """textual_inversion: an embedding to start from, in place of initializer_token and num_vectors:
    learned_embeds.safetensors, or A1111's as safetensors"""
    instance_prompts: tuple[str, ...] = ()
    """captions of every image in place of its own, such as ["a photo of sks dog"]; several: one
    at random each time. The folder then needs no captions"""
    class_prompt: str = ""
    """prior preservation (Ruiz et al. 2023): the subject's class, such as "a photo of a dog"; each
    step holds as many of the model's own images of the class as of the subject"""
    num_class_images: int = at_least(1, default=100)
    """images of class_prompt that the model generates before training, kept and used again"""
    class_images_dir: str = ""
    """folder of the class images; empty: class_images/ in the run folder"""
    class_num_steps: int = at_least(1, default=50)
    """sampling steps of the class images"""
    class_guidance_scale: float = at_least(0, default=7.5)
    """classifier-free guidance of the class images"""
    prior_loss_weight: float = at_least(0, default=1.0)
    """weight of a class image's loss, where the subject's has 1"""

    @property
    def is_partial(self) -> bool:
        """Whether some weights of the U-Net stay frozen, so that the base model is needed."""
        return self.method != "full"

    def check(self) -> None:
        """Raise ValueError for settings that do not fit `method`."""
        if self.method == "lora" and not self.lora_targets:
            raise ValueError(
                'finetune.lora_targets is empty, expected names such as ["to_q", "to_v"]'
            )
        if self.lokr_factor == 0:
            raise ValueError("finetune.lokr_factor=0, expected -1 or a number of at least 1")
        if self.adapter_type == "lokr" and self.init_lora:
            raise ValueError(
                "finetune.init_lora starts adapters of lora and dora, and finetune.adapter_type is "
                "lokr: leave one of them out"
            )
        if self.method == "textual_inversion":
            self._check_token()

    def _check_token(self) -> None:
        token = self.token
        inside = token[1:-1]
        is_word = token[:1] == "<" and token[-1:] == ">" and inside.replace("-", "").isalnum()
        if not is_word or token != token.lower():
            raise ValueError(
                f"finetune.token={token!r}, expected a new word in angle brackets of small letters,"
                ' digits and hyphens, such as "<my-dog>"'
            )
        if not self.initializer_token.strip() and not self.init_embedding:
            raise ValueError(
                "finetune.initializer_token is empty, expected a known word to start from, such "
                'as "dog", or set finetune.init_embedding'
            )


@dataclass(frozen=True)
class DistillConfig:
    """One stage of distillation: model.pretrained teaches a copy of itself."""

    method: DistillMethod = "none"
    """none: plain training; guided: the student learns the guided prediction, in one pass, for
    every guidance scale (Meng et al. 2023); progressive: one step of the student is two of its
    teacher, which is a guided student itself (Salimans & Ho 2022); lcm_lora: a LoRA learns the
    guided model's clean end from any timestep (latent consistency, Luo et al. 2023)"""
    num_steps: int = between(1, 1000, default=32)
    """sampling steps of the student; it learns at the timesteps of these alone, but for lcm_lora,
    where they are those that the model is to be sampled in"""
    min_guidance: float = at_least(1, default=1.0)
    """lowest guidance scale that the student learns; 1 is no guidance"""
    max_guidance: float = at_least(1, default=8.0)
    """highest guidance scale that the student learns"""
    guidance_weighting: GuidanceWeighting = "none"
    """weight of errors at a guidance scale; inverse_square: 1 / scale^2 times a constant, as what
    guidance adds grows with the scale and errors at high ones would drown those at low ones"""
    guidance_lr_factor: float = at_least(1, default=1.0)
    """learning rate of the guidance embedding, in units of train.learning_rate; it begins at zero,
    and at 1 a short stage hardly learns to tell the scales apart"""

    @property
    def is_on(self) -> bool:
        """Whether the run distils."""
        return self.method != "none"


def check_distillation(config: Any) -> None:
    """Raise ValueError for settings of a run that exclude distillation."""
    distill = config.distill
    if not distill.is_on:
        return
    if not config.model.pretrained:
        raise ValueError(
            f"distill.method={distill.method} needs the model that teaches; set model.pretrained"
        )
    if distill.max_guidance < distill.min_guidance:
        raise ValueError(
            f"distill.max_guidance={distill.max_guidance:g} is below distill.min_guidance="
            f"{distill.min_guidance:g}, expected scales that rise"
        )
    if config.train.optimizer == "prodigy" and distill.guidance_lr_factor != 1:
        raise ValueError(
            f"distill.guidance_lr_factor={distill.guidance_lr_factor:g}, and "
            "train.optimizer=prodigy has one learning rate for all that is trained: "
            "set distill.guidance_lr_factor=1"
        )
    is_lora = distill.method == "lcm_lora"
    if is_lora and not config.train.ema:
        raise ValueError(
            "distill.method=lcm_lora needs train.ema=true: its target is the average of its weights"
        )
    for name, value in (
        FIXED_BY_DISTILLATION | ({"finetune.method": "lora"} if is_lora else {})
    ).items():
        if (given := attrgetter(name)(config)) != value:
            raise ValueError(
                f"{name}={given} is not for distillation, whose student learns from its teacher "
                f"alone; set {name}={str(value).lower() if isinstance(value, bool) else value!r}"
            )
    if config.diffusion.timestep_sampling == "loss_aware":
        raise ValueError(
            "diffusion.timestep_sampling=loss_aware has no form for the few timesteps of a "
            "student; set diffusion.timestep_sampling=stratified"
        )
