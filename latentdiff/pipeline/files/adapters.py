"""Loading LoRAs and learned words into a pipeline, next to those that are loaded.

Every check comes before the pipeline is changed. Files are found and read by adapter_file.py, their
meaning is lora_layers.py's and embedding_file.py's, the layers are peft's, by diffusers' loaders.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from latentdiff.models.text import pool_at_end_token
from latentdiff.pipeline.files.adapter_file import (
    EMBEDDING_NAMES,
    LORA_NAMES,
    open_adapter,
)
from latentdiff.pipeline.files.embedding_file import check_new_words, read_embeddings
from latentdiff.pipeline.files.lora_layers import PARTS, UNET, lora_layers

LOADING: dict[str, Any] = {"low_cpu_mem_usage": True}  # no random weights before the loaded ones

logger = logging.getLogger(__name__)


class AdaptersMixin(StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin):
    """Loading of LoRAs and learned words; a mixin for a DiffusionPipeline.

    diffusers' mixin for SDXL also fuses LoRAs of a second text encoder, if there is one.
    """

    unet: Any
    text_encoder: Any
    tokenizer: Any
    text_encoder_2: Any
    tokenizer_2: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a LoRA or DoRA in diffusers', peft's or kohya's naming; those before it stay active.

        A file, a folder, a training run's folder, a hub id, or a dict. Each layer acts at its own
        alpha / rank; `set_adapters` weighs several. Raises FileNotFoundError where there is none,
        ValueError where it is a pickle, damaged, of another kind, or does not fit this model.
        """
        file = open_adapter(
            pretrained_model_name_or_path_or_dict,
            names=LORA_NAMES,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        models: dict[str, Any] = {part: getattr(self, part) for part in PARTS}
        layers = lora_layers(file, models)
        name = self._new_adapter_name(adapter_name)
        for part, weights in layers.parts.items():
            active = _active_adapters(models[part])
            named = {f"{part}.{key}": tensor for key, tensor in weights.items()}
            options = {"adapter_name": name, "_pipeline": self, **LOADING}
            with _without_false_warnings():
                if part == UNET:
                    self.load_lora_into_unet(named, None, models[part], **options)
                else:
                    self.load_lora_into_text_encoder(
                        named, None, models[part], prefix=part, **options
                    )
            for layer in _adapted_layers(models[part]):
                layer.set_adapter([*active, name])
        if layers.unused:
            logger.warning(
                "%d of the LoRA's %d layers have no place in this model and are without effect; it "
                "was trained for another one",
                len(layers.unused),
                layers.num_layers,
            )
        self._check_components()

    @classmethod
    def lora_state_dict(cls, source: Any, **options: Any) -> Any:
        """Return a LoRA's weights in diffusers' naming, as in diffusers, from safetensors only."""
        where = {
            name: options.pop(name, default)
            for name, default in (
                ("weight_name", None),
                ("subfolder", None),
                ("revision", None),
                ("token", None),
                ("cache_dir", None),
                ("local_files_only", False),
            )
        }
        file = open_adapter(source, names=LORA_NAMES, **where)
        return super().lora_state_dict(dict(file.weights), **options)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load new words: a safetensors file or folder, a hub id, a dict, or a list of them.

        token: the words, one a file; by default those of the files, for kohya's and A1111's the
        name of the file. A file for SDXL has vectors of both text encoders, clip_l and clip_g.
        Warns where a word is part of ordinary words. Raises FileNotFoundError or ValueError as
        `load_lora_weights` does, and where a word is known already.
        """
        sources, tokens = _with_tokens(pretrained_model_name_or_path, token)
        readers = self._text_readers()
        widths = [encoder.get_input_embeddings().weight.shape[1] for encoder, _ in readers]
        words: dict[str, list[Tensor]] = {}
        for source, wanted in zip(sources, tokens, strict=True):
            file = open_adapter(
                source,
                names=EMBEDDING_NAMES,
                weight_name=weight_name,
                subfolder=subfolder,
                revision=revision,
                token=None,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
            word, vectors = read_embeddings(file, wanted, widths=widths)
            if word in words:
                raise ValueError(f"{file.name} brings the word {word!r} a second time; pass token=")
            words[word] = vectors
        for k, (_, tokenizer) in enumerate(readers):
            check_new_words({word: vectors[k] for word, vectors in words.items()}, tokenizer)
        for k, (encoder, tokenizer) in enumerate(readers):
            own = [{word: vectors[k]} for word, vectors in words.items()]
            super().load_textual_inversion(own, tokenizer=tokenizer, text_encoder=encoder)
            pool_at_end_token(encoder, tokenizer)
        self._check_components()

    def _text_readers(self) -> list[tuple[Any, Any]]:
        """Return the text encoders that there are, each with its tokenizer."""
        second = self.text_encoder_2, self.tokenizer_2
        return [(self.text_encoder, self.tokenizer), *([second] if second[0] is not None else [])]

    def _new_adapter_name(self, name: str | None) -> str:
        """Return a name for one more LoRA, the same in U-Net and text encoder."""
        known = {one for names in self.get_list_adapters().values() for one in names}
        if name is None:
            numbered = (f"default_{k}" for k in itertools.count())
            return next(one for one in numbered if one not in known)
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"adapter_name must be a text without dots, got {name!r}")
        if name in known:
            raise ValueError(
                f"adapter_name={name!r} is the name of a LoRA that is loaded; choose another, or "
                "call unload_lora_weights first"
            )
        return name

    def _check_components(self) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def _without_false_warnings() -> Iterator[None]:
    """Keep peft and transformers from warning that a LoRA loaded before is lost: it is not."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _adapted_layers(module: nn.Module) -> Iterator[Any]:
    return (layer for layer in module.modules() if hasattr(layer, "lora_A"))


def _active_adapters(module: nn.Module) -> list[str]:
    return sorted({name for layer in _adapted_layers(module) for name in layer.active_adapters})


def _with_tokens(source: Any, token: Any) -> tuple[list[Any], list[Any]]:
    """Return sources and the words that are asked for, one each; None: the source's own."""
    sources = source if isinstance(source, list) else [source]
    if isinstance(source, Tensor) and isinstance(token, list):
        sources = list(source)  # a row for each word
    tokens = token if isinstance(token, list) else [token] * len(sources)
    if len(tokens) != len(sources) or (isinstance(token, str) and len(sources) > 1):
        raise ValueError(
            f"token names {len(tokens)} words for {len(sources)} embeddings, expected a list of "
            "one each"
        )
    pairs = zip(sources, tokens, strict=True)
    return [{word: one} if isinstance(one, Tensor) else one for one, word in pairs], tokens
