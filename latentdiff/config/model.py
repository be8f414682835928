"""Settings of the networks: which to load, and the shape of those trained from scratch."""

from dataclasses import dataclass, field

from latentdiff.config.validation import at_least, at_least_if_given, check_multiples, share, widths

GROUPS = 32  # of the U-Net's group norms


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net trained from scratch."""

    block_out_channels: tuple[int, ...] = widths(default=(320, 640, 1280, 1280))
    """width of each level, finest first"""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """which levels attend to the text"""
    layers_per_block: int = at_least(1, default=2)
    """residual blocks a level"""
    head_dim: int = at_least(1, default=64)
    """channels of one attention head"""
    dropout: float = share(default=0.0)
    """dropout inside the residual blocks"""


@dataclass(frozen=True)
class TextConfig:
    """A text encoder trained from scratch together with the U-Net."""

    width: int = at_least(1, default=256)
    """width of the prompt embeddings"""
    num_layers: int = at_least(1, default=4)
    """transformer layers"""
    num_heads: int = at_least(1, default=4)
    """attention heads"""
    vocab_size: int = at_least(514, default=2048)
    """entries of the byte-pair vocabulary trained on the captions (at least 514)"""
    max_tokens: int = at_least(3, default=32)
    """tokens a caption may have, start and end included"""


@dataclass(frozen=True)
class ModelConfig:
    """Sources of the components. `pretrained` fine-tunes; without it the U-Net is new."""

    pretrained: str = ""
    """a Stable-Diffusion-format folder or hub id to fine-tune, or "latentdiff-mini", the small
    model that ships; empty trains from scratch"""
    vae: str = ""
    """a VAE's folder; "latentdiff-mini" is that of the small model that ships with the package,
    with 4 latent channels, "latentdiff-vae" one with 8"""
    text_encoder: str = ""
    """a folder with text_encoder/ and tokenizer/, frozen unless train.train_text_encoder is true;
    empty trains a new text encoder"""
    clip_skip: int | None = at_least_if_given(0)
    """last layers of the text encoder that are skipped when captions are encoded, as diffusers
    counts: 1 is what A1111 and kohya call clip skip 2. null: as model.pretrained was trained, else
    0"""
    safety_checker: bool = True
    """with pretrained: keep the model's safety checker, if any; false leaves it out, unread"""
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fit_scaling_factor: bool = True
    """from scratch: set the VAE's scaling_factor to 1 / the measured std of the latents"""

    def check(self) -> None:
        """Raise ValueError for settings that exclude each other."""
        unet = self.unet
        if len(unet.block_out_channels) != len(unet.attention_levels):
            raise ValueError(
                f"model.unet.attention_levels has {len(unet.attention_levels)} entries, expected "
                f"one for each of the {len(unet.block_out_channels)} model.unet.block_out_channels"
            )
        if not self.pretrained:
            check_multiples("model.unet.block_out_channels", unet.block_out_channels, GROUPS)
            check_multiples("model.unet.block_out_channels", unet.block_out_channels, unet.head_dim)
            check_multiples("model.text.width", [self.text.width], self.text.num_heads)
        if self.clip_skip and not (self.pretrained or self.text_encoder):
            raise ValueError(
                f"model.clip_skip={self.clip_skip} skips layers of a text encoder that is trained "
                "already, and a new one has none to spare: set model.text.num_layers instead"
            )
        if self.pretrained and (self.vae or self.text_encoder):
            raise ValueError(
                "model.pretrained brings its own VAE and text encoder; leave model.vae and "
                "model.text_encoder empty, or model.pretrained for training from scratch"
            )
