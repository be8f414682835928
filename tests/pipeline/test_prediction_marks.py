"""The prediction type that files and folders state is found; contradictions are refused."""

import pytest

from latentdiff.pipeline.files.model_card import model_card
from latentdiff.pipeline.files.model_info import ModelInfo, info_from_json, info_to_json
from latentdiff.pipeline.files.prediction_marks import (
    check_folder,
    comfyui_node,
    flow_shift_of,
    marks_of,
    stated_in_file,
)

SPEC = "modelspec.prediction_type"


@pytest.mark.parametrize(
    ("keys", "told", "otherwise", "found"),
    [
        ((), None, "epsilon", "epsilon"),
        ((), None, "v_prediction", "v_prediction"),  # of Stable Diffusion 2
        (("v_pred",), None, "epsilon", "v_prediction"),
        (("v_pred", "ztsnr"), "v", "epsilon", "v_prediction"),
        ((), "v", "epsilon", "v_prediction"),
        ((), "epsilon", "v_prediction", "epsilon"),
        ((), "flow_prediction", "epsilon", "flow_prediction"),
        (("ztsnr",), "v_prediction", "epsilon", "v_prediction"),
    ],
)
def test_entries_and_metadata_of_a_file_state_its_prediction_type(keys, told, otherwise, found):
    metadata = {SPEC: told} if told else {}
    assert stated_in_file("m", keys, metadata, otherwise=otherwise) == found


@pytest.mark.parametrize(
    ("keys", "told", "findings"),
    [
        (("v_pred",), "epsilon", (f"{SPEC}=epsilon", "the entry v_pred")),
        (("v_pred",), "flow", (f"{SPEC}=flow", "the entry v_pred")),
        (("ztsnr",), None, ("the entry ztsnr", "no entry v_pred")),
        (("ztsnr",), "epsilon", ("the entry ztsnr", f"{SPEC}=epsilon")),
        ((), "edm", (f"{SPEC}='edm'", "none of epsilon")),
        (("edm_mean",), None, ("edm_mean", "EDM")),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_with_both_findings(keys, told, findings):
    with pytest.raises(ValueError, match="m ") as failure:
        stated_in_file("m", keys, {SPEC: told} if told else {}, otherwise="epsilon")
    assert all(finding in str(failure.value) for finding in findings)


V, FLOW = {"prediction_type": "v_prediction"}, {"prediction_type": "flow_prediction"}
EPSILON, ZERO = {"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        (EPSILON, None),
        (V | ZERO, "v_prediction"),
        (FLOW | {"use_flow_sigmas": True}, "flow_prediction"),
        (EPSILON | {"use_flow_sigmas": False}, "epsilon"),
        ({}, "v_prediction"),  # a scheduler was given in place of the folder's
    ],
)
def test_a_folder_whose_findings_agree_passes(config, recorded):
    check_folder("m", config, recorded)


@pytest.mark.parametrize(
    ("config", "recorded", "findings"),
    [
        (EPSILON, "v_prediction", ("prediction_type=epsilon", "latentdiff.json says")),
        (V, "epsilon", ("prediction_type=v_prediction", "prediction_type=epsilon")),
        (EPSILON | ZERO, None, ("prediction_type=epsilon", "rescale_betas_zero_snr=true")),
        (FLOW | {"use_flow_sigmas": False}, None, ("flow_prediction", "use_flow_sigmas=false")),
        (V | {"use_flow_sigmas": True}, None, ("v_prediction", "use_flow_sigmas=true")),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_with_both_findings(config, recorded, findings):
    with pytest.raises(ValueError, match="m contradicts itself") as failure:
        check_folder("m", config, recorded)
    assert all(finding in str(failure.value) for finding in findings)


def test_marks_and_nodes_let_comfyui_sample_what_was_trained():
    assert marks_of(EPSILON) == []
    assert marks_of(V | ZERO) == ["v_pred", "ztsnr"]
    assert comfyui_node(EPSILON, is_sdxl=True) == comfyui_node(V | ZERO, is_sdxl=True) == ""
    assert "v_prediction, zsnr true" in comfyui_node(V | ZERO, is_sdxl=False)
    assert "ModelSamplingSD3 (shift 1)" in comfyui_node(FLOW, is_sdxl=True)
    assert "shift 3" in comfyui_node(FLOW | {"flow_shift": 3.0}, is_sdxl=False)


def test_card_names_the_node_of_the_shift_that_the_model_has():
    for shift, recorded in ((1.0, None), (3.0, 3.0)):
        config = FLOW | {"flow_shift": shift}
        assert flow_shift_of(config) == recorded
        info = ModelInfo(prediction_type="flow_prediction", flow_shift=flow_shift_of(config))
        card = model_card(info_from_json(info_to_json(info)), name="m")
        assert comfyui_node(config, is_sdxl=True) in card.replace("\\", "")  # Markdown escapes
    assert flow_shift_of(V | {"flow_shift": 3.0}) is None
