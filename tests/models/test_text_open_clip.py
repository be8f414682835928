"""open_clip text encoders and tokenizer as CLIPTextModel and CLIPTokenizer."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from fakes_models import CAPTIONS, LONG, WORLD
from open_clip.hf_model import HFTextEncoder
from open_clip.model import _build_text_tower  # what create_model builds text encoders with
from open_clip.transformer import TextTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, CLIPTextModel, CLIPTokenizer

from latentdiff.models.open_clip import (
    clip_tokenizer_from_open_clip,
    load_open_clip,
    text_encoder_from_open_clip,
)
from latentdiff.models.text import encode_text, tokenize
from latentdiff.models.weights import stored_shapes

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 16}


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return clip_tokenizer_from_open_clip()


def text_config(**changes) -> dict[str, object]:
    small = {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 4, "layers": 3}
    return small | changes


def make_open_clip(*, quick_gelu: bool = False, **changes) -> nn.Module:
    return randomise(
        open_clip.CLIP(24, VISION, text_config(**changes), quick_gelu=quick_gelu).eval()
    )


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight, biases and norms too, a value that a mistake in renaming would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def own_token_output(model: nn.Module, ids: Tensor) -> Tensor:
    """The output of open_clip's own final layer norm while it encodes the text."""
    encoder = getattr(model, "text", model)
    seen: list[Tensor] = []
    hook = encoder.ln_final.register_forward_hook(lambda module, args, output: seen.append(output))
    encode = getattr(model, "encode_text", model)
    with torch.no_grad():
        encode(ids)
    hook.remove()
    return seen[0]


CONVERTIBLE = [
    {},
    {"quick_gelu": True},
    {"width": 48, "heads": 2, "layers": 1, "mlp_ratio": 2.5},
    {"act_kwargs": {"approximate": "tanh"}},
    {"norm_kwargs": {"eps": 1e-3}, "proj_bias": True},
    {"pool_type": "eos", "eos_id": 1, "proj_type": "none"},
]


@pytest.mark.parametrize("changes", CONVERTIBLE)
def test_converted_tower_equals_open_clips_own_output(changes, tmp_path: Path) -> None:
    model = make_open_clip(**changes)
    ids = torch.randint(0, 600, (3, 16))
    expected = own_token_output(model, ids)
    converted = text_encoder_from_open_clip(model)
    with torch.no_grad():
        torch.testing.assert_close(encode_text(converted, ids), expected, atol=1e-5, rtol=1e-5)
    converted.save_pretrained(tmp_path)
    names = stored_shapes([tmp_path / "model.safetensors"])
    assert all(name.startswith("text_model.") for name in names)
    loaded = CLIPTextModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(encode_text(loaded, ids), encode_text(converted, ids))


def test_custom_text_clip_and_a_bare_tower_are_converted_too() -> None:
    encoder = randomise(
        TextTransformer(context_length=16, vocab_size=600, width=32, heads=4).eval()
    )
    model = open_clip.CustomTextCLIP(
        24,
        VISION,
        text_config(),
    ).eval()
    ids = torch.randint(0, 600, (2, 16))
    for source in (encoder, randomise(model)):
        with torch.no_grad():
            prompt_embeds = encode_text(text_encoder_from_open_clip(source), ids)
        torch.testing.assert_close(
            prompt_embeds, own_token_output(source, ids), atol=1e-5, rtol=1e-5
        )


def test_pooled_output_is_open_clips_for_its_own_tokens(clip_tokenizer) -> None:
    model = make_open_clip(vocab_size=49408)
    clip_tokenizer.model_max_length = 16
    ids = tokenize(clip_tokenizer, CAPTIONS)
    clip_tokenizer.model_max_length = 77
    with torch.no_grad():
        pooled = text_encoder_from_open_clip(model)(ids).pooler_output
        torch.testing.assert_close(
            pooled @ model.text_projection, model.encode_text(ids), atol=1e-5, rtol=1e-5
        )


def test_converted_weights_are_a_copy_in_their_own_dtype() -> None:
    model = make_open_clip().to(torch.bfloat16)
    converted = text_encoder_from_open_clip(model)
    assert converted.dtype == torch.bfloat16
    before = converted.embeddings.token_embedding.weight.clone()
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    assert torch.equal(converted.embeddings.token_embedding.weight, before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"no_causal_mask": True}, "no causal mask"),
        ({"embed_cls": True}, "class embedding"),
        ({"ls_init_value": 0.1}, "layer scale"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"scale_fc": True}, "CustomResidualAttentionBlock"),
    ],
)
def test_other_towers_are_refused_by_name(changes, reason: str) -> None:
    encoder = _build_text_tower(24, open_clip.CLIPTextCfg(**text_config(**changes)))
    with pytest.raises(ValueError, match=f"TextTransformer.* cannot become.*{reason}"):
        text_encoder_from_open_clip(encoder)


def test_hugging_face_towers_and_other_modules_are_refused_by_name() -> None:
    bert = BertConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, model_type="roberta",
    )  # fmt: skip
    encoder = HFTextEncoder("none", 8, config=bert, pooler_type="mean_pooler", proj_type="linear")
    with pytest.raises(ValueError, match=r"HFTextEncoder.* cannot become.*Hugging Face"):
        text_encoder_from_open_clip(encoder)
    with pytest.raises(ValueError, match="Linear has no text encoder"):
        text_encoder_from_open_clip(nn.Linear(2, 2))


def test_coca_is_refused_by_name() -> None:
    model = open_clip.CoCa(
        24,
        multimodal_cfg=text_config(context_length=15, layers=1),
        text_cfg=text_config(context_length=15, embed_cls=True, output_tokens=True),
        vision_cfg=VISION
        | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    )
    with pytest.raises(ValueError, match=r"the text encoder of CoCa .* class embedding"):
        text_encoder_from_open_clip(model)


def open_clip_text_configs() -> dict[str, tuple[dict, bool]]:
    """Text config and quick_gelu of each open_clip model whose encoder is not Hugging Face's."""
    folder = Path(open_clip.__file__).parent / "model_configs"
    configs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {
        name: (config["text_cfg"], config.get("quick_gelu", False))
        for name, config in configs.items()
        if "hf_model_name" not in config["text_cfg"]
    }


def test_every_tower_of_open_clip_is_converted_exactly_or_refused() -> None:
    """All its own configs, shrunk in width and depth: none is accepted and then computed
    wrongly."""
    ids = torch.randint(0, 600, (2, 16))
    encoders: dict[str, bool] = {}
    for config, quick_gelu in open_clip_text_configs().values():
        shrunk = {k: v for k, v in config.items() if k not in ("embed_dim",)} | text_config(
            layers=1
        )
        key = json.dumps([shrunk, quick_gelu], sort_keys=True, default=str)
        if key in encoders:
            continue
        cfg = open_clip.CLIPTextCfg(**shrunk)
        encoder = randomise(_build_text_tower(24, cfg, quick_gelu).eval())
        encoders[key] = encoder.attn_mask is not None and encoder.cls_emb is None
        if not encoders[key]:
            with pytest.raises(ValueError, match="cannot become"):
                text_encoder_from_open_clip(encoder)
            continue
        with torch.no_grad():
            prompt_embeds = encode_text(text_encoder_from_open_clip(encoder), ids)
        torch.testing.assert_close(
            prompt_embeds, own_token_output(encoder, ids), atol=1e-5, rtol=1e-5
        )
    assert any(encoders.values())
    assert not all(encoders.values())


@pytest.fixture
def open_clip_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small open_clip model under a name of its own, with its weights in safetensors."""
    config = {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": text_config(vocab_size=49408),
    }  # fmt: skip
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    model = randomise(open_clip.create_model("small"))
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_named_open_clip_model_is_loaded_with_its_tokenizer(open_clip_weights: Path) -> None:
    encoder, tokenizer = load_open_clip("small", open_clip_weights)
    assert tokenizer.model_max_length == 16
    ids = tokenize(tokenizer, CAPTIONS)
    model = open_clip.create_model("small", pretrained=str(open_clip_weights)).eval()
    with torch.no_grad():
        prompt_embeds = encode_text(encoder, ids)
    assert torch.equal(ids, open_clip.tokenize(CAPTIONS, context_length=16))
    torch.testing.assert_close(prompt_embeds, own_token_output(model, ids), atol=1e-5, rtol=1e-5)


def test_open_clip_files_that_do_not_fit_are_refused(open_clip_weights: Path) -> None:
    with pytest.raises(ValueError, match="'huge' is no open_clip model"):
        load_open_clip("huge", open_clip_weights)
    with pytest.raises(ValueError, match="roberta-ViT-B-32 is a Hugging Face one"):
        load_open_clip("roberta-ViT-B-32", open_clip_weights)
    with pytest.raises(ValueError, match="pickle files are not opened"):
        load_open_clip("small", open_clip_weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_open_clip("small", open_clip_weights.with_name("other.safetensors"))
    save_file({"x": torch.ones(1)}, open_clip_weights)
    with pytest.raises(ValueError, match=r"missing: ln_final\.bias"):
        load_open_clip("small", open_clip_weights)
    open_clip_weights.write_bytes(b"short")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_open_clip("small", open_clip_weights)


def test_weights_of_another_open_clip_model_are_refused_and_not_resized(
    open_clip_weights: Path,
) -> None:
    weights = load_file(open_clip_weights)
    weights["positional_embedding"] = torch.zeros(77, 32)
    save_file(weights, open_clip_weights)
    with pytest.raises(
        ValueError, match=r"positional_embedding is \(77, 32\), expected \(16, 32\)"
    ):
        load_open_clip("small", open_clip_weights)


# --- open_clip's tokenizer ---


def test_tokenizer_of_open_clip_gives_its_ids_padding_included(clip_tokenizer) -> None:
    captions = [
        *CAPTIONS,
        "",
        "hello! world !!",
        "don't   STOP",
        "3 cats, ½ dog",
        "数字 🎈",
        LONG * 3,
    ]
    assert torch.equal(tokenize(clip_tokenizer, captions), open_clip.tokenize(captions))


def test_tokenizer_of_open_clip_saves_and_loads_equal(clip_tokenizer, tmp_path: Path) -> None:
    clip_tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    captions = ["hello! world !!", "", LONG]
    assert torch.equal(tokenize(loaded, captions), tokenize(clip_tokenizer, captions))


def test_tokenizer_of_open_clip_is_clips_but_for_the_padding(
    clip_tokenizer, shared_dir: Path
) -> None:
    clip = CLIPTokenizer.from_pretrained(shared_dir / "weights" / "clip-tokenizer")
    assert clip_tokenizer.get_vocab() == clip.get_vocab()
    for caption in [*CAPTIONS, *WORLD, LONG]:
        assert clip_tokenizer(caption).input_ids == clip(caption).input_ids
    assert clip_tokenizer.pad_token_id == 0
    assert clip.pad_token_id == clip.eos_token_id
