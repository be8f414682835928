"""Settings of fine-tuning: what of a pretrained model learns, and how a subject is taught."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["full", "attention", "cross_attention", "lora", "textual_inversion"]


@dataclass(frozen=True)
class FinetuneConfig:
    """What of model.pretrained learns, LoRA, new words, and prior preservation."""

    method: Method = "full"
    """full: the whole U-Net; attention, cross_attention: those layers of it alone; lora: adapters
    beside some of its layers (Hu et al. 2022); textual_inversion: new words alone (Gal et al.
    2023). train.train_text_encoder adds the text encoder, with lora by adapters"""
    lora_rank: int = 16
    """rank of each adapter"""
    lora_alpha: float = 0.0
    """adapters act lora_alpha / lora_rank times; 0: once"""
    lora_dropout: float = 0.0
    """share of an adapter's inputs left out while training"""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """ends of the names of the U-Net's layers that get adapters; "attn2.to_k" is narrower,
    "ff.net.2" or "conv1" more"""
    lora_kohya: bool = False
    """write lora_kohya.safetensors too, in the naming that ComfyUI and A1111 know best"""
    token: str = ""
    """textual_inversion: the new word, such as "<my-dog>" """
    initializer_token: str = ""
    """textual_inversion: known words that it starts from, such as "dog" """
    num_vectors: int = 1
    """textual_inversion: embeddings that the new word stands for"""
    instance_prompts: tuple[str, ...] = ()
    """captions of every image in place of its own, such as ["a photo of sks dog"]; several: one
    at random each time. The folder then needs no captions"""
    class_prompt: str = ""
    """prior preservation (Ruiz et al. 2023): what the subject is one of, such as "a photo of a
    dog"; as many of the model's own images of it as of the subject are in each step"""
    num_class_images: int = 100
    """images that the model makes of class_prompt before training, kept and used again"""
    class_images_dir: str = ""
    """where they are kept; empty: class_images/ in the run folder"""
    class_num_steps: int = 50
    """sampling steps of these images"""
    class_guidance_scale: float = 7.5
    """classifier-free guidance of these images"""
    prior_loss_weight: float = 1.0
    """weight of a class image's loss beside the subject's"""

    @property
    def is_partial(self) -> bool:
        """Whether weights of the U-Net stay as they are, so that the base model is needed."""
        return self.method != "full"
