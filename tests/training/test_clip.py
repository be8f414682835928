"""The CLIP recipe: batches, conversion, and that it learns to tell images apart."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.config.clip import ClipConfig
from latentdiff.data.folder.folder import read_folder
from latentdiff.evaluation.metric_nets import load_clip
from latentdiff.models.open_clip import clip_from_open_clip
from latentdiff.models.text import encode_text, tokenize, train_tokenizer
from latentdiff.training.clip.pairs import DistinctCaptions, Pairs
from latentdiff.training.clip.train_clip import attention_kernel, build_clip, train_clip

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 215, 40),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}
TINY = {
    "resolution": 16,
    "patch_size": 4,
    "width": 32,
    "num_layers": 1,
    "text_width": 32,
    "text_num_layers": 1,
    "head_dim": 16,
    "embed_dim": 16,
    "vocab_size": 600,
    "max_tokens": 12,
    "num_workers": 0,
    "mixed_precision": "fp32",
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colours side by side, captioned; all 36 pairs to train on and a second set held out."""
    root = tmp_path_factory.mktemp("squares")
    for split in ("train", "test"):
        (root / split).mkdir()
        rows = []
        for left, right in ((a, b) for a in COLOURS for b in COLOURS):
            pixels = np.zeros((24, 24, 3), np.uint8)
            pixels[:, :12], pixels[:, 12:] = COLOURS[left], COLOURS[right]
            name = f"{left}-{right}.png"
            Image.fromarray(pixels).save(root / split / name)
            rows.append({"file_name": name, "text": f"{left} on the left and {right} on the right"})
        lines = "\n".join(json.dumps(row) for row in rows)
        (root / split / "metadata.jsonl").write_text(lines)
    return root


def test_a_batch_holds_no_caption_twice_and_depends_on_seed_and_step_alone(squares: Path) -> None:
    folders = [read_folder(squares).split("train")] * 2
    batches = DistinctCaptions(folders, batch_size=16, seed=3)
    batch = batches.batch(5)
    assert len({key.caption for key in batch}) == len(batch) == 16
    assert batch == DistinctCaptions(folders, batch_size=16, seed=3).batch(5)
    assert batch != batches.batch(6)
    assert len(DistinctCaptions(folders, batch_size=64, seed=0).batch(0)) == 36


def test_one_caption_for_all_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("the same")
    with pytest.raises(ValueError, match="expected two or more"):
        DistinctCaptions([read_folder(tmp_path)], batch_size=2, seed=0)


def test_images_whose_caption_speaks_of_sides_are_not_mirrored(squares: Path) -> None:
    folder = read_folder(squares).split("train")
    pairs = Pairs([folder], 16, min_crop=1.0, random_flip=True, seed=0)
    for key in DistinctCaptions([folder], batch_size=16, seed=1).batch(0):
        pixels, caption = pairs[key]
        left = caption.split()[0]
        seen = ((pixels[:, 8, 2] + 1) * 127.5).round().tolist()
        assert seen == pytest.approx(COLOURS[left], abs=2)


def test_the_converted_model_embeds_as_open_clip_does() -> None:
    tokenizer = train_tokenizer(["a red heart", "a blue car"], vocab_size=600, max_length=12)
    torch.manual_seed(0)
    model = build_clip(ClipConfig(**TINY), tokenizer).eval()
    converted = clip_from_open_clip(model, eos_token_id=tokenizer.eos_token_id)
    pixels = torch.randn(3, 3, 16, 16)
    ids = tokenize(tokenizer, ["a red heart", "", "a blue car and a red car"])
    with torch.no_grad():
        ours = converted.get_image_features(pixel_values=pixels)
        texts = converted.get_text_features(input_ids=ids)
        ours, texts = (getattr(x, "pooler_output", x) for x in (ours, texts))
        torch.testing.assert_close(ours, model.encode_image(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(texts, model.encode_text(ids), atol=1e-5, rtol=1e-5)


def test_a_resnet_image_tower_is_refused() -> None:
    model = open_clip.model.CLIP(
        16,
        {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8},
        {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 1, "layers": 1},
    )
    with pytest.raises(ValueError, match="ModifiedResNet"):
        clip_from_open_clip(model)


def test_scaled_gradients_of_fp16_teach_what_fp32_does(squares: Path, tmp_path: Path) -> None:
    """On the CPU, where both compute in fp32: what differs is the scaling."""
    losses = {}
    for precision in ("fp32", "fp16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = TINY | {"mixed_precision": precision, "output_dir": str(tmp_path / precision)}
        assert not train_clip(
            ClipConfig(
                roots=(str(squares),),
                max_steps=6,
                batch_size=12,
                learning_rate=3e-3,
                log_every_steps=1,
                **settings,
            )
        )
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["fp32"]) == 6
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=1e-4)


def test_learns_to_tell_images_apart_and_exports_clip_and_text_encoder(
    squares: Path, tmp_path: Path
) -> None:
    config = ClipConfig(
        output_dir=str(tmp_path),
        roots=(str(squares),),
        max_steps=120,
        batch_size=36,
        learning_rate=3e-3,
        lr_warmup_steps=10,
        **TINY,
    )
    assert train_clip(config) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    name = squares.name
    assert report[f"recall@1/caption_of_image/{name}"] > 0.8  # chance: 1 / 36
    assert report[f"recall@1/image_of_caption/{name}"] > 0.8
    clip = load_clip(tmp_path / "clip")
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[0, 0], pixels[1, 2] = 1.0, 1.0
    assert clip.embed_pixels(pixels).shape == (2, 16)
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompt_embeds = encode_text(
        text_encoder, tokenize(tokenizer, ["red on the left and blue on the right"])
    )
    assert prompt_embeds.shape == (1, 12, 32)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_attention_in_bf16_on_a_cpu_is_of_plain_products_and_has_their_gradients(
    precision: str,
) -> None:
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile() as record, attention_kernel(torch.device("cpu"), precision):
        scaled_dot_product_attention(q, k, v).sum().backward()
    names = {event.name for event in record.events()}
    assert ("aten::_scaled_dot_product_attention_math" in names) == (precision == "bf16")
    plain = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    for wanted, x in zip(torch.autograd.grad(plain.sum(), (q, k, v)), (q, k, v), strict=True):
        torch.testing.assert_close(x.grad, wanted, atol=1e-5, rtol=0)
