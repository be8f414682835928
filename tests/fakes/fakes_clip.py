"""A CLIP of a few thousand random parameters."""

import torch
from fakes_pipeline import tiny_tokenizer
from transformers import CLIPConfig, CLIPModel


def random_clip() -> CLIPModel:
    """A transformers CLIP of a few thousand random parameters, for images of 16 pixels."""
    torch.manual_seed(5)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tokenizer = tiny_tokenizer()
    text = {
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(vision_config=layers | vision, text_config=layers | text, projection_dim=8)
    return CLIPModel(config).eval().requires_grad_(False)
