"""What a fine-tune starts from: a LoRA or an embedding that somebody trained before.

Files are found and read as the pipeline reads them (pipeline/files), so the start is what sampling
with that file loaded gives. Does not answer for: adding them to the model (lora.py,
textual_inversion.py).
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from latentdiff.config.finetune import FinetuneConfig
from latentdiff.models.components import Components
from latentdiff.pipeline.files.adapter_file import (
    EMBEDDING_NAMES,
    LORA_NAMES,
    AdapterFile,
    open_adapter,
)
from latentdiff.pipeline.files.embedding_file import read_embeddings
from latentdiff.pipeline.files.file_metadata import tensors_hash
from latentdiff.pipeline.files.lora_layers import LoraLayers, lora_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitialWeights:
    """A LoRA's layers, or an embedding's vectors, and the sha256 of the file's tensors.

    vectors: (n, D) for each text encoder.
    """

    lora: LoraLayers | None = None
    vectors: Sequence[Tensor] | None = None
    file_hash: str = ""


def open_initial_file(settings: FinetuneConfig) -> AdapterFile | None:
    """Open the file that the settings name; None where they name none.

    FileNotFoundError or ValueError, with the setting's name, for one that is not there, a pickle,
    or damaged.
    """
    name = "init_lora" if settings.init_lora else "init_embedding"
    path = settings.init_lora or settings.init_embedding
    if not path:
        return None
    try:
        return open_adapter(
            path,
            names=LORA_NAMES if settings.init_lora else EMBEDDING_NAMES,
            weight_name=None,
            subfolder=None,
            revision=None,
            token=None,
            cache_dir=None,
            local_files_only=False,
        )
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"finetune.{name}: {error}") from error


def read_initial_weights(components: Components, settings: FinetuneConfig) -> InitialWeights:
    """Read what the training starts from, for this model, which is not changed.

    Raises ValueError for a file of another kind, or for another model.
    """
    if (file := open_initial_file(settings)) is None:
        return InitialWeights()
    file_hash = tensors_hash(file.weights)
    try:
        if settings.init_embedding:
            encoders = components.text_encoder, components.text_encoder_2
            widths = [one.config.hidden_size for one in encoders if one is not None]
            _, vectors = read_embeddings(file, settings.token, widths=widths)
            return InitialWeights(vectors=vectors, file_hash=file_hash)
        if any(".lokr_" in name for name in file.weights):
            raise ValueError(
                f"{file.name} is a LoKr, and only LoRA and DoRA can be trained further"
            )
        models = {"unet": components.unet, "text_encoder": components.text_encoder}
        if components.text_encoder_2 is not None:
            models["text_encoder_2"] = components.text_encoder_2
        layers = lora_layers(file, models)
    except ValueError as error:
        name = "init_embedding" if settings.init_embedding else "init_lora"
        raise ValueError(f"finetune.{name}: {error}") from error
    if layers.unused:
        logger.warning(
            "%d of the %d layers of %s have no place in this model and are not trained",
            len(layers.unused),
            layers.num_layers,
            file.name,
        )
    return InitialWeights(lora=layers, file_hash=file_hash)


def run_base_hash(base_hash: str, initial: InitialWeights) -> str:
    """Return the hash of all that a run's trained part is added to or starts from.

    base_hash: of the model. It alone where the run starts from nothing else, as in runs of earlier
    versions.
    """
    if not initial.file_hash:
        return base_hash
    return hashlib.sha256(f"{base_hash} {initial.file_hash}".encode()).hexdigest()
