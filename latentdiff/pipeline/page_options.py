"""What scripts/app.py may be told; imports nothing heavy, so that --help is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageOptions:
    """How the playground's page is served.

    Args:
        host: address to listen on; 0.0.0.0 lets others in.
        port: to listen on.
        loras: a folder of LoRA files to choose from.
        preview_vae: a small VAE of the same latent space, such as TAESD, for previews.
        dtype: float32, bfloat16 or float16; auto: bfloat16 where the device is fast in it.
        device: cpu, cuda, mps; the best there is by default.
        max_side_px: largest height and width.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    loras: str | None = None
    preview_vae: str | None = None
    dtype: str = "auto"
    device: str | None = None
    max_side_px: int = 1024
