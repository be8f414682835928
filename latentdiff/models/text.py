"""Captions to prompt embeddings, in Stable Diffusion's own convention.

Answers for: token ids (padded to the tokenizer's length with its own pad token, truncated), the
part lost by truncation, prompt embeddings (final-layer-normed last hidden state of a
CLIPTextModel; of SDXL the states before the last layer of two text encoders, not normed, next to
each other), the null caption of classifier-free guidance (Ho & Salimans 2022), and small
tokenizers trained from scratch. Encoders of open_clip models are converted in open_clip.py.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentdiff.models.conditioning import Conditioning

NULL_CAPTION = ""
START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


@dataclass(frozen=True)
class TextEncoders:
    """The text encoder of a model, or SDXL's two, with their tokenizers."""

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return token ids (B, L) of one tokenizer, (B, 2, L) of two; see `tokenize`."""
        return tokenize_all(captions, self.tokenizer, self.tokenizer_2)

    def to(self, device: torch.device) -> "TextEncoders":
        """Move the text encoders to a device; return them."""
        for part in (self.text_encoder, self.text_encoder_2):
            if part is not None:
                part.to(device)
        return self

    def encode(self, input_ids: Tensor) -> Conditioning:
        """Return the embeddings of token ids of `tokenize`, pooled ones too where there are two.

        The empty caption is encoded as any other here; a model that is sampled with zeros in its
        place says so in force_zeros_for_empty_prompt.
        """
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            end_id = self.tokenizer.eos_token_id
            return Conditioning(encode_text(self.text_encoder, input_ids, end_id=end_id))
        skipped = clip_skip_of(self.text_encoder)  # by both, as diffusers does
        states = []
        pairs = (self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)
        for (part, tokenizer), ids in zip(pairs, input_ids.unbind(1), strict=True):
            end_id = tokenizer.eos_token_id
            states.append(encode_penultimate(part, ids, end_id=end_id, skipped=skipped))
        (embeds, _), (more, pooled) = states
        return Conditioning(torch.cat([embeds, more.to(embeds.device)], dim=-1), pooled)

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        """Return the embeddings of captions on the text encoder's device, without autocast."""
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self.encode(self.tokenize(captions))


def tokenize_all(
    captions: Sequence[str], tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer | None = None
) -> Tensor:
    """Return token ids (B, L) of one tokenizer, (B, 2, L) of two; see `tokenize`."""
    ids = tokenize(tokenizer, captions)
    if tokenizer_2 is None:
        return ids
    return torch.stack([ids, tokenize(tokenizer_2, captions)], dim=1)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return token ids (B, L) int64 on the CPU, L = tokenizer.model_max_length, padded and
    truncated. Words of several trained vectors are expanded.
    """
    if isinstance(captions, str):
        raise ValueError("captions is one string, expected a sequence of strings; pass [caption]")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions[{index}] is {caption!r}, expected a string")
    length = _max_length(tokenizer)
    if not captions:
        return torch.empty(0, length, dtype=torch.int64)
    encoded = tokenizer(
        expand_multivector_tokens(tokenizer, captions),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    input_ids: Tensor = encoded.input_ids
    return input_ids


def expand_multivector_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """Name all vectors of a word of textual inversion, "<cat> <cat>_1", where a caption names the
    first, in any case of letters, as the tokenizer finds it (Gal et al. 2023).
    """
    added = tokenizer.get_added_vocab()
    expanded = list(captions)
    for word in added:
        if f"{word}_1" in added:
            more = [f"{word}_{k}" for k in range(1, len(added)) if f"{word}_{k}" in added]
            rest = "".join(f" {name}" for name in more)
            once = re.compile(rf"{re.escape(word)}({re.escape(rest)}|(?!_\d))", flags=re.IGNORECASE)
            whole = (word + rest).replace("\\", r"\\")  # no escape of the template
            expanded = [once.sub(whole, caption) for caption in expanded]
    return expanded


def clip_skip_of(text_encoder: CLIPTextModel | None) -> int:
    """Return how many layers of a text encoder are skipped by default, counted from the last.

    Its config has the number, as `set_clip_skip` leaves it; 0 where it has none. Raises ValueError
    for a config with another value than 0 .. layers - 1.
    """
    if text_encoder is None:
        return 0
    config = text_encoder.config
    return check_clip_skip(
        getattr(config, "clip_skip", 0),
        num_layers=config.num_hidden_layers,
        name="clip_skip of the text encoder's config.json",
    )


def check_clip_skip(value: object, *, num_layers: int, name: str) -> int:
    """Return a number of skipped layers; ValueError, with its name, where a text encoder has too
    few.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_layers:
        raise ValueError(
            f"{name} is {value!r:.80}, expected 0 to {num_layers - 1}: the text encoder has "
            f"{num_layers} layers"
        )
    return value


def set_clip_skip(encoders: TextEncoders, value: int | None) -> None:
    """Let text encoders skip their last layers wherever prompts are encoded; None: as they are.

    Kept in the first one's config, so it is saved with the model; of SDXL it is for both.
    ValueError where one has too few layers.
    """
    if value is None or value == clip_skip_of(encoders.text_encoder):
        return
    for part in (encoders.text_encoder, encoders.text_encoder_2):
        if part is not None:
            num_layers = part.config.num_hidden_layers
            check_clip_skip(value, num_layers=num_layers, name="model.clip_skip")
    encoders.text_encoder.config.clip_skip = value


def null_prompt(empty: Conditioning, *, zeros: bool) -> Conditioning:
    """Return the null prompt of guidance: the empty caption's conditioning, or zeros for its text.

    zeros: the model's force_zeros_for_empty_prompt. Token ids stay, and are zeros once they are
    encoded; sizes and labels stay.
    """
    if not zeros or empty.input_ids is not None:
        return empty
    return empty.with_text(empty.map(torch.zeros_like))


def pool_at_end_token(text_encoder: Any, tokenizer: CLIPTokenizer) -> None:
    """Let a text encoder pool at the end token, not at the token of the highest number.

    The latter is what transformers does for the old eos_token_id of 2, which most configs still
    have; the two are the same until there are new words, whose numbers are higher.
    """
    inner = getattr(text_encoder, "text_model", text_encoder)
    text_encoder.config.eos_token_id = inner.eos_token_id = tokenizer.eos_token_id


def encode_text(
    text_encoder: CLIPTextModel, input_ids: Tensor, *, end_id: int | None = None
) -> Tensor:
    """Return prompt embeddings (B, L, D) of token ids (B, L): the last hidden state after the final
    layer norm, or one before it as `clip_skip_of` says.

    end_id: of the end token. Where layers are skipped, the empty caption is still that of the last
    layer, as diffusers encodes the empty negative prompt. No attention mask, as in Stable
    Diffusion: padding is attended to. dtype is the encoder's (autocast applies).
    """
    _check_length(text_encoder, input_ids)
    input_ids, skipped = input_ids.to(text_encoder.device), clip_skip_of(text_encoder)
    output: Any = text_encoder(input_ids, output_hidden_states=skipped > 0)
    last: Tensor = output.last_hidden_state  # (B, L, D)
    if not skipped:
        return last
    earlier = earlier_layer(text_encoder, output.hidden_states, skipped)
    return torch.where(_is_null(input_ids, end_id), last, earlier)


def encode_penultimate(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
    input_ids: Tensor,
    *,
    end_id: int | None = None,
    skipped: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Return prompt embeddings (B, L, D) as SDXL reads them, and the pooled ones (B, P) if any.

    The hidden state before the last layer, or `skipped` layers earlier, without the final norm;
    the empty caption's is never earlier, as in diffusers. Pooled: the projected state
    of a CLIPTextModelWithProjection at the end token.
    """
    _check_length(text_encoder, input_ids)
    input_ids = input_ids.to(text_encoder.device)
    output: Any = text_encoder(input_ids, output_hidden_states=True)
    embeds: Tensor = output.hidden_states[-2]  # (B, L, D)
    if skipped:
        earlier = output.hidden_states[-2 - skipped]
        embeds = torch.where(_is_null(input_ids, end_id), embeds, earlier)
    return embeds, getattr(output, "text_embeds", None)


def _is_null(input_ids: Tensor, end_id: int | None) -> Tensor:
    """Return which texts are empty, (B, 1, 1) bool: their end token follows the start token."""
    return (input_ids[:, 1] == (-1 if end_id is None else end_id))[:, None, None]


def _check_length(text_encoder: Any, input_ids: Tensor) -> None:
    limit = text_encoder.config.max_position_embeddings
    if input_ids.ndim != 2 or input_ids.shape[1] > limit:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}, expected (B, L) with L at most "
            f"{limit}; set the tokenizer's model_max_length to the text encoder's "
            "max_position_embeddings"
        )


def earlier_layer(
    text_encoder: CLIPTextModel, hidden_states: Sequence[Tensor], skipped: int
) -> Tensor:
    """Return the hidden state (B, L, D) so many layers before the last, after the final norm."""
    text_model = getattr(text_encoder, "text_model", text_encoder)
    normed: Tensor = text_model.final_layer_norm(hidden_states[-(skipped + 1)])
    return normed


def truncated_part(tokenizer: CLIPTokenizer, caption: str) -> str:
    """Return the end of the caption that `tokenize` cuts off, as it was written; "" when all of
    it fits.
    """
    length = _max_length(tokenizer)
    encoded = tokenizer(caption, truncation=False, return_offsets_mapping=True, verbose=False)
    if len(encoded.input_ids) <= length:
        return ""
    start, _ = encoded.offset_mapping[length - 1]  # the end token takes the last place
    return caption[start:].strip()


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, max_length: int = 77
) -> CLIPTokenizer:
    """Train a small CLIP-style byte-pair vocabulary (Sennrich et al. 2016) on captions.

    Laid out as CLIP's: 256 bytes, the same bytes ending a word, merges, start and end token last;
    so no caption has an unknown token and the end token has the highest id. vocab_size >= 514; a
    small corpus gives fewer entries. The result does not depend on the captions' order.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(byte + END_OF_WORD for byte in alphabet)]
    smallest = len(base) + 2
    if vocab_size < smallest or max_length < 3:
        raise ValueError(
            f"vocab_size={vocab_size} and max_length={max_length}, expected at least {smallest} "
            "(every byte, every byte at a word's end, two special tokens) and 3"
        )
    trained = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    template = _clip_tokenizer(base, [], max_length=max_length).backend_tokenizer
    trained.normalizer, trained.pre_tokenizer = template.normalizer, template.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=base,  # fixed ids, so ties are always broken alike
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    ids = trained.get_vocab(with_added_tokens=True)
    return _clip_tokenizer(
        sorted(ids, key=ids.__getitem__), _merges(trained), max_length=max_length
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _clip_tokenizer(
    tokens: Sequence[str], merges: list[tuple[str, str]], *, max_length: int
) -> CLIPTokenizer:
    vocab = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _max_length(tokenizer: CLIPTokenizer) -> int:
    length = tokenizer.model_max_length
    if length > 100_000:  # transformers' stand-in for "not set"
        raise ValueError(
            "the tokenizer has no model_max_length, expected the text encoder's number of "
            "positions (77 for CLIP); set tokenizer.model_max_length"
        )
    return int(length)
