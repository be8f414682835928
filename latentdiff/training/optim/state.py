"""An optimiser's state by parameter name, as tensors and JSON, so that a checkpoint needs no pickle
and an entry never lands on another parameter.

For any torch optimiser whose state is tensors and plain numbers. Bit for bit both ways. Ours, as
torch.distributed.checkpoint.state_dict loads moments in another memory layout than a channels_last
weight's, which fused AdamW then misreads, counts a step before the first one, and takes the state
of another model without an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Names = Mapping[Tensor, str] | Sequence[str]
IMPLEMENTATION = ("params", "fused", "foreach", "capturable", "differentiable")  # not saved


def optimizer_tensors(
    optimizer: Optimizer, names: Names
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state: tensors under "<parameter>/<entry>", and the rest as JSON values.

    names: of every parameter, by parameter or in the order of the groups. The tensors are the
    optimiser's own, not copies.
    """
    named = _named(optimizer, names)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in named.items():
        entries = optimizer.state.get(parameter, {})
        own = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        parameters[name] = {
            "shape": list(parameter.shape),
            "tensors": {key: list(value.shape) for key, value in own.items()},
            "numbers": {key: value for key, value in entries.items() if key not in own},
        }
        tensors |= {f"{name}/{key}": value.detach() for key, value in own.items()}
    name_of = {parameter: name for name, parameter in named.items()}
    groups = [
        {
            "parameters": [name_of[parameter] for parameter in group["params"]],
            "options": {key: _to_json(group[key]) for key in group if key not in IMPLEMENTATION},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"parameters": parameters, "groups": groups}


def load_optimizer_tensors(
    optimizer: Optimizer,
    names: Names,
    tensors: Mapping[str, Tensor],
    json: Mapping[str, Any],
) -> None:
    """Take a state back, learning rates and other options of the groups included.

    ValueError names what is missing, extra or of another shape; nothing is changed then.
    """
    named = _named(optimizer, names)
    _check_shapes(named, tensors, json["parameters"])
    _refuse_other_groups(optimizer, named, json["groups"])
    for group, saved in zip(optimizer.param_groups, json["groups"], strict=True):
        for key, value in saved["options"].items():
            group[key] = tuple(value) if isinstance(value, list) else value
    for name, parameter in named.items():
        saved = json["parameters"][name]
        state = {
            key: _to_param_device(tensors[f"{name}/{key}"], key, parameter, optimizer)
            for key in saved["tensors"]
        }
        optimizer.state.pop(parameter, None)
        if state or saved["numbers"]:
            optimizer.state[parameter] = {**state, **saved["numbers"]}


@torch.no_grad()
def load_parameters(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved weights into parameters; ValueError names what does not fit."""
    if saved.keys() != parameters.keys():
        differing = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(f"the checkpoint's weights are not this model's: {differing[:8]}")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise ValueError(
                f"{name} is {tuple(saved[name].shape)} in the checkpoint, "
                f"expected {tuple(parameter.shape)}"
            )
        parameter.copy_(saved[name])


def _named(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """Return the optimiser's parameters by name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(names, Mapping):
        if nameless := sum(parameter not in names for parameter in parameters):
            raise ValueError(f"{nameless} of the optimiser's parameters have no name")
        listed = [names[parameter] for parameter in parameters]
    else:
        listed = list(names)
    if len(listed) != len(parameters) or len(set(listed)) != len(listed):
        raise ValueError(
            f"got {len(set(listed))} different names for the optimiser's {len(parameters)} "
            "parameters, expected one each"
        )
    return dict(zip(listed, parameters, strict=True))


def _check_shapes(
    named: Mapping[str, Tensor], tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    expected = {
        f"{name}/{key}": tuple(shape)
        for name, entry in saved.items()
        for key, shape in entry["tensors"].items()
    }
    problems = [
        *(f"{name} is missing" for name in named if name not in saved),
        *(f"{name} is not a parameter of this optimiser" for name in saved if name not in named),
        *(f"{key} is missing" for key in expected if key not in tensors),
        *(f"{key} is extra" for key in tensors if key not in expected),
        *(
            f"{name} has shape {tuple(parameter.shape)}, the state was saved for "
            f"{tuple(saved[name]['shape'])}"
            for name, parameter in named.items()
            if name in saved and list(parameter.shape) != saved[name]["shape"]
        ),
        *(
            f"{key} has shape {tuple(tensors[key].shape)}, expected {shape}"
            for key, shape in expected.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"the optimiser state does not fit the model: {'; '.join(problems[:8])}{more}"
        )


def _refuse_other_groups(
    optimizer: Optimizer, named: Mapping[str, Tensor], saved: Sequence[Mapping[str, Any]]
) -> None:
    name_of = {parameter: name for name, parameter in named.items()}
    own = [{name_of[p] for p in group["params"]} for group in optimizer.param_groups]
    if own != [set(group["parameters"]) for group in saved]:
        raise ValueError(
            f"the optimiser has {len(own)} parameter groups, the state was saved with "
            f"{len(saved)} or with other members: what is trained, or decays, has changed"
        )


def _to_param_device(tensor: Tensor, key: str, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    """Copy an entry to where the optimiser keeps it: a plain AdamW counts its steps on the CPU."""
    group = next(
        group for group in optimizer.param_groups if any(p is parameter for p in group["params"])
    )
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    if tensor.shape == parameter.shape:
        # in the parameter's memory layout: fused kernels rely on it
        return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor).detach()
    return tensor.detach().to(torch.device("cpu") if on_host else parameter.device, copy=True)


def _to_json(value: object) -> object:
    """Turn an option of a group into a JSON value."""
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
