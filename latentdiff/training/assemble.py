"""A plain module of a library, made of weights that another module holds under other names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def assemble(empty: Any, weights: Mapping[str, Tensor], *, like: nn.Module) -> Any:
    """Return `empty`, built on the meta device, with these weights, which it then shares.

    like: the module they are of; buffers that no state holds, such as tokens' places, are its.
    """
    empty.load_state_dict({name: w.detach() for name, w in weights.items()}, assign=True)
    for name, buffer in like.named_buffers():
        path, _, key = name.rpartition(".")
        empty.get_submodule(path).register_buffer(key, buffer, persistent=False)
    return empty.requires_grad_(False).eval()
