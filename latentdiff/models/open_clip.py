"""open_clip's models as those of transformers: CLIPTextModel, CLIPTokenizer, and a whole CLIPModel.

Answers for: which text encoders are CLIP's causal transformer and which image encoders its vision
transformer (Radford et al. 2021), and the exact renaming of their weights. Others are refused by
name, since no class of transformers computes the same.
"""

import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from latentdiff.models.weights import mismatched_shapes, refuse_bad_weights, stored_shapes

NUM_CLIP_MERGES = 49152 - 256 - 2


def text_encoder_from_open_clip(
    model: nn.Module, *, eos_token_id: int | None = None
) -> CLIPTextModel:
    """Convert the text encoder of an open_clip model; its prompt embeddings equal open_clip's own.

    Prompt embeddings are the output of its final layer norm for every token, (B, L, D). Take CLIP's
    vocabulary from clip_tokenizer_from_open_clip: it pads with 0, as open_clip does. For a model
    with a tokenizer of its own, eos_token_id is that tokenizer's end token (by default the last
    entry of the vocabulary, as CLIP's is). ValueError names the reason why an encoder is unfit: a
    Hugging Face transformer, no causal mask, a class embedding, layer scale, or custom attention
    blocks.
    """
    encoder = _open_text_encoder(model)
    config = _text_config(encoder, eos_token_id=eos_token_id)
    return clip_text_model(config, _weights(encoder))


def load_open_clip(name: str, weights: str | Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Load the text encoder of a named open_clip model from a safetensors file, with its tokenizer.

    name: as open_clip.list_models() has it, for example "ViT-H-14". ValueError for a name, a file
    or a vocabulary that cannot be used, FileNotFoundError for no file; pickles are not opened.
    """
    import open_clip

    path = Path(weights)
    if name not in open_clip.list_models():
        raise ValueError(f"{name!r} is no open_clip model, expected one of open_clip.list_models()")
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
        raise ValueError(f"the text encoder of {name} is a Hugging Face one, expected CLIP's own")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; pickle files are not opened")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected the weights of {name}")
    model = open_clip.create_model(name)
    _load_text_weights(model, path)
    text_encoder = text_encoder_from_open_clip(model)
    tokenizer = clip_tokenizer_from_open_clip()
    if text_encoder.config.vocab_size != len(tokenizer):
        raise ValueError(
            f"{name} has {text_encoder.config.vocab_size} tokens, expected CLIP's "
            f"{len(tokenizer)}: it has a tokenizer of its own; use "
            "text_encoder_from_open_clip with that one"
        )
    tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return text_encoder, tokenizer


def clip_text_model(config: CLIPTextConfig, weights: dict[str, Tensor]) -> CLIPTextModel:
    """Make a CLIPTextModel that saves its weights under Stable Diffusion's names.

    They begin with "text_model.". transformers 5 drops that prefix for models that it did not load
    with it, and older readers then find none of the weights.
    """
    prefixed = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    return CLIPTextModel.from_pretrained(None, config=config, state_dict=prefixed)


def clip_tokenizer_from_open_clip(*, max_length: int = 77) -> CLIPTokenizer:
    """Return the byte-pair tokenizer of open_clip's CLIP models as a CLIPTokenizer.

    Ids, padding with 0 included, equal open_clip's own for clean text; open_clip also fixes
    mojibake and HTML entities, which this one does not. Special tokens inside a caption are read as
    plain text: id 0 is "!" as well.
    """
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in islice(lines, 1, NUM_CLIP_MERGES + 1)]
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token=tokens[0],
        split_special_tokens=True,
        model_max_length=max_length,
    )


def _load_text_weights(model: nn.Module, path: Path) -> None:
    """Load all but the image encoder; open_clip's own loader would resize what does not fit."""
    _open_text_encoder(model)
    stored = stored_shapes([path])
    mismatched = mismatched_shapes(model, stored)
    refuse_bad_weights(
        f"the text encoder ({path})",
        missing=[name for name in model.state_dict() if _is_text(name) and name not in stored],
        mismatched=[wrong for wrong in mismatched if _is_text(wrong[0])],
    )
    weights = load_file(path)
    model.load_state_dict({k: v for k, v in weights.items() if _is_text(k)}, strict=False)


def _is_text(name: str) -> bool:
    return not name.startswith(("visual.", "logit_"))


def _open_text_encoder(model: nn.Module) -> Any:
    """Return the module that holds transformer, embeddings and ln_final: the model, or its text."""
    encoder = getattr(model, "text", model)
    if not hasattr(encoder, "transformer"):
        raise ValueError(
            f"{type(model).__name__} has no text encoder as open_clip's CLIP or CustomTextCLIP "
            "has; pass a model made by open_clip.create_model"
        )
    if problems := _problems(encoder):
        raise ValueError(
            f"the text encoder of {type(model).__name__} ({type(encoder).__name__}) cannot become "
            f"a CLIPTextModel: {'; '.join(problems)}. Expected CLIP's causal transformer, as in "
            "ViT-B-32, ViT-L-14 or ViT-H-14; choose such a model"
        )
    return encoder


def _problems(encoder: Any) -> list[str]:
    """Return the reasons why CLIPTextModel cannot compute this encoder; empty when it can."""
    if not hasattr(encoder.transformer, "resblocks"):
        return ["it is a Hugging Face transformer or another one of its own kind"]
    problems = []
    if getattr(encoder, "cls_emb", None) is not None:
        problems.append("it appends a class embedding, as CoCa does")
    if getattr(encoder, "attn_mask", None) is None:
        problems.append("its attention has no causal mask")
    blocks = list(encoder.transformer.resblocks)
    kinds = {type(block).__name__ for block in blocks}
    if kinds != {"ResidualAttentionBlock"} or any(
        not isinstance(block.attn, nn.MultiheadAttention) for block in blocks
    ):
        problems.append(f"its blocks are {sorted(kinds)} and not plain ResidualAttentionBlock")
    if any(not isinstance(getattr(block, "ls_1", nn.Identity()), nn.Identity) for block in blocks):
        problems.append("its blocks have layer scale")
    if not problems and _activation(encoder) is None:
        problems.append(f"its activation is {blocks[0].mlp.gelu}")
    return problems


def _activation(encoder: Any) -> str | None:
    """Return transformers' name of the activation, None when CLIPTextModel has no equal."""
    activation = encoder.transformer.resblocks[0].mlp.gelu
    if type(activation).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return None


def _text_config(encoder: Any, *, eos_token_id: int | None) -> CLIPTextConfig:
    vocab_size, width = encoder.token_embedding.weight.shape
    block = encoder.transformer.resblocks[0]
    eos = vocab_size - 1 if eos_token_id is None else eos_token_id
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(encoder.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=len(encoder.positional_embedding),
        hidden_act=_activation(encoder),
        layer_norm_eps=encoder.ln_final.eps,
        bos_token_id=eos - 1,
        eos_token_id=eos,
        pad_token_id=0,
        dtype=block.mlp.c_fc.weight.dtype,
    )


def _weights(encoder: Any) -> dict[str, Tensor]:
    """Return the encoder's weights under CLIPTextModel's names, in one dtype."""
    weights = {
        "embeddings.token_embedding.weight": encoder.token_embedding.weight,
        "embeddings.position_embedding.weight": encoder.positional_embedding,
        "final_layer_norm.weight": encoder.ln_final.weight,
        "final_layer_norm.bias": encoder.ln_final.bias,
    }
    for index, block in enumerate(encoder.transformer.resblocks):
        prefix = f"encoder.layers.{index}."
        weights |= {prefix + name: tensor for name, tensor in block_weights(block).items()}
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def block_weights(block: Any) -> dict[str, Tensor]:
    """Return the weights of a transformer block, of either encoder, under transformers' names."""
    parts = {
        "layer_norm1": block.ln_1,
        "layer_norm2": block.ln_2,
        "self_attn.out_proj": block.attn.out_proj,
        "mlp.fc1": block.mlp.c_fc,
        "mlp.fc2": block.mlp.c_proj,
    }
    weights = {}
    for name, part in parts.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = part.weight, part.bias
    # open_clip keeps query, key and value in one matrix (3D, D)
    for name, weight, bias in zip(
        ("q_proj", "k_proj", "v_proj"),
        block.attn.in_proj_weight.chunk(3),
        block.attn.in_proj_bias.chunk(3),
        strict=True,
    ):
        weights[f"self_attn.{name}.weight"], weights[f"self_attn.{name}.bias"] = weight, bias
    return weights


def clip_from_open_clip(model: Any, *, eos_token_id: int | None = None) -> CLIPModel:
    """Convert an open_clip model; its images' and texts' embeddings equal open_clip's own.

    eos_token_id: the end token of the tokenizer, as for `text_encoder_from_open_clip`. ValueError
    names the reason why either encoder is unfit: no plain vision transformer with a class token,
    for one.
    """
    text = text_encoder_from_open_clip(model, eos_token_id=eos_token_id)
    encoder = model.visual
    if problem := _vision_problem(encoder):
        raise ValueError(
            f"the image encoder ({type(encoder).__name__}) cannot become a CLIPVisionModel: "
            f"{problem}"
        )
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config=_vision_config(encoder).to_dict(),
        projection_dim=encoder.proj.shape[1],
    )
    converted = CLIPModel(config).eval()
    weights = {f"vision_model.{name}": tensor for name, tensor in _vision_weights(encoder).items()}
    for name, tensor in text.state_dict().items():
        weights[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    weights["visual_projection.weight"] = encoder.proj.T
    weights["text_projection.weight"] = getattr(model, "text", model).text_projection.T
    weights["logit_scale"] = model.logit_scale
    weights = {
        name.replace("text_model.text_model.", "text_model."): w for name, w in weights.items()
    }
    with torch.no_grad():
        converted.load_state_dict({name: w.detach().clone() for name, w in weights.items()})
    return converted


def _vision_problem(encoder: Any) -> str:
    """Return the reason why a CLIPVisionModel cannot compute this encoder; empty when it can."""
    if not hasattr(encoder, "conv1") or getattr(encoder, "proj", None) is None:
        return "it is no vision transformer with a linear projection"
    if isinstance(encoder.ln_pre, nn.Identity):
        return "it has no norm before its first layer"
    if encoder.attn_pool is not None or encoder.pool_type != "tok" or encoder.final_ln_after_pool:
        return f"it pools by {encoder.pool_type} and not by its class token"
    kinds = {type(block).__name__ for block in encoder.transformer.resblocks}
    return "" if kinds == {"ResidualAttentionBlock"} else f"its blocks are {sorted(kinds)}"


def _vision_config(encoder: Any) -> CLIPVisionConfig:
    block = encoder.transformer.resblocks[0]
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    return CLIPVisionConfig(
        hidden_size=encoder.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(encoder.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=encoder.image_size[0],
        patch_size=encoder.conv1.kernel_size[0],
        projection_dim=encoder.proj.shape[1],
        hidden_act="quick_gelu" if quick else "gelu",
        layer_norm_eps=encoder.ln_post.eps,
    )


def _vision_weights(encoder: Any) -> dict[str, Tensor]:
    weights = {
        "embeddings.class_embedding": encoder.class_embedding,
        "embeddings.patch_embedding.weight": encoder.conv1.weight,
        "embeddings.position_embedding.weight": encoder.positional_embedding,
        "pre_layrnorm.weight": encoder.ln_pre.weight,  # transformers spells it so
        "pre_layrnorm.bias": encoder.ln_pre.bias,
        "post_layernorm.weight": encoder.ln_post.weight,
        "post_layernorm.bias": encoder.ln_post.bias,
    }
    for index, block in enumerate(encoder.transformer.resblocks):
        prefix = f"encoder.layers.{index}."
        weights |= {prefix + name: tensor for name, tensor in block_weights(block).items()}
    return weights
