"""The fingerprint of a module, and weights that are not there."""

from pathlib import Path

import pytest
import torch
from fakes_models import make_vae

from latentdiff.models.components import load_vae
from latentdiff.models.weights import check_weights, weights_hash


def test_weights_hash_sees_every_bit_and_name_but_not_order_or_layout() -> None:
    class Pair(torch.nn.Module):
        def __init__(self, names: tuple[str, ...]) -> None:
            super().__init__()
            for name in names:
                torch.manual_seed(len(name))
                self.register_module(name, torch.nn.Conv2d(2, 2, 3))
            self.register_buffer("count", torch.tensor(1))

    known = weights_hash(Pair(("a", "bb")))
    assert weights_hash(Pair(("bb", "a"))) == known
    assert weights_hash(Pair(("a", "bb")).to(memory_format=torch.channels_last)) == known
    assert weights_hash(Pair(("a", "cc"))) != known
    assert weights_hash(Pair(("a", "bb")).double()) != known
    for name in ("bb.weight", "bb.bias", "count"):
        module = Pair(("a", "bb"))
        tensor = module.state_dict()[name].view(-1)
        tensor[-1:] = torch.nextafter(tensor[-1:], tensor[-1:] + 1) if name != "count" else 2
        assert weights_hash(module) != known
    reshaped = Pair(("a", "bb"))
    reshaped.a.weight = torch.nn.Parameter(reshaped.a.weight.detach().reshape(2, 18))
    assert weights_hash(reshaped) != known


def test_weights_hash_is_the_same_for_every_dtype_on_reload(tmp_path: Path) -> None:
    vae = make_vae().to(torch.bfloat16)
    vae.save_pretrained(tmp_path)
    assert weights_hash(load_vae(tmp_path, torch_dtype=torch.bfloat16)) == weights_hash(vae)


def test_weights_on_the_meta_device_are_named() -> None:
    vae = make_vae()
    check_weights(vae, "vae")
    vae.encoder.conv_in.to_empty(device="meta")
    with pytest.raises(ValueError, match=r"of vae .*missing: encoder\.conv_in\.bias"):
        check_weights(vae, "vae")
