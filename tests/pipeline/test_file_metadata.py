"""Files carry the metadata that other programs show."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latentdiff.pipeline.files.file_metadata import (
    kohya_metadata,
    model_spec,
    tag_counts,
    tensors_hash,
)
from latentdiff.pipeline.files.model_info import ModelInfo


def test_hash_is_that_of_the_tensors_in_the_file(tmp_path):
    weights = {"b": torch.randn(3, 2), "a": torch.ones(5).half(), "c": torch.tensor(2.0)}
    path = tmp_path / "file.safetensors"
    save_file(weights | {"mark": torch.tensor([])}, path, metadata={"format": "pt"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert tensors_hash(weights) == hashlib.sha256(content[start:]).hexdigest()


def test_entries_name_family_and_leave_out_what_is_unknown(tmp_path):
    weights = {"a": torch.ones(2)}
    info = ModelInfo(prediction_type="v_prediction", resolution=768)
    spec = model_spec(weights, info=info, title="ink", width=1024, adapter="lora")
    assert spec["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert spec["modelspec.prediction_type"] == "v"
    assert spec["modelspec.resolution"] == "768x768"
    assert "modelspec.license" not in spec
    spec = model_spec(weights, info=ModelInfo(), title="ink", width=64)
    assert spec["modelspec.architecture"] == "latent-diffusion"
    options = {"name": "ink", "rank": 4, "training": {"seed": 3}, "tags": {"cat": 2}}
    known = kohya_metadata(
        weights, info=ModelInfo(base_model="/home/me/sd15"), width=768, **options
    )
    assert known["ss_base_model_version"] == "sd_v1"
    assert known["ss_sd_model_name"] == "sd15"
    assert json.loads(known["ss_tag_frequency"]) == {"data": {"cat": 2}}
    assert "ss_base_model_version" not in kohya_metadata(
        weights, info=ModelInfo(), width=64, **options
    )
    save_file(weights, tmp_path / "x.safetensors", metadata=spec | known)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == spec | known


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_entries_of_an_sdxl_lora_are_those_that_other_programs_read(prediction_type):
    weights = {"a": torch.ones(2)}
    info = ModelInfo(prediction_type=prediction_type, resolution=1024, steps=7)
    spec = model_spec(
        weights, info=info, title="ink", width=2048, adapter="lora", trigger_word="sks cat"
    )
    del spec["modelspec.implementation"]
    assert spec == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "ink",
        "modelspec.hash_sha256": f"0x{tensors_hash(weights)}",
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.trigger_phrase": "sks cat",
    }
    for rank, dim, alpha in ((4, "4", "4.0"), (None, "Dynamic", "Dynamic")):
        known = kohya_metadata(
            weights, info=info, name="ink", width=2048, rank=rank, training={}, tags={}
        )
        assert known["ss_base_model_version"] == "sdxl_base_v1-0"
        assert (known["ss_network_dim"], known["ss_network_alpha"]) == (dim, alpha)
        assert known["ss_v_parameterization"] == str(prediction_type == "v_prediction")
        assert known["ss_v2"] == "False"


def test_tags_that_occur_once_are_not_published():
    assert tag_counts(["cat, red", "cat, my secret", "red,cat ,"]) == {"cat": 3, "red": 2}
