"""Training state on disk: one safetensors file, written beside its final name and renamed into place.

A checkpoint holds tensors (weights, optimizer moments, data-source state) and a JSON header (step, settings).
No pickles: loading one can't run code.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..engine.errors import InputError, one_line
from ..engine.files import give_modes

_FORMAT = "boostdiff-training-state-1"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What `load_training_state` returns: see `save_training_state` for the fields."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    data: dict[str, torch.Tensor]
    header: dict[str, Any]


def save_training_state(
    path: Path,
    *,
    step: int,
    weights: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    data: dict[str, torch.Tensor] | None = None,
    header: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically: a reader finds the old file or the new one, never half of either.

    Args:
        path: the checkpoint's final name.
        step: optimizer updates done so far.
        weights: the trained tensors (and an EMA of them, say) by name.
        optimizer: its `state_dict()` is stored; param groups must be plain JSON values.
        data: the data source's state.
        header: JSON values to find again on loading.
    """
    state = optimizer.state_dict()
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"data/{name}": tensor for name, tensor in (data or {}).items()}
    for index, moments in state["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    metadata = {
        "format": _FORMAT,
        "step": str(step),
        "param_groups": json.dumps(state["param_groups"]),
        "header": json.dumps(header or {}),
    }
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    give_modes(partial)
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(path)


def load_training_state(path: Path) -> TrainingState:
    """Read what `save_training_state` wrote.

    Raises:
        InputError: the file is missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is no checkpoint of BoostDiff's: delete it, and the run begins anew")
            # Cloned into torch's own aligned memory: on a CPU alignment changes the last bit of a matrix product,
            # and a resumed run must give the bytes of an uninterrupted one.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"can't read the checkpoint {path}: {error}; delete it, and the run begins anew") from None
    try:
        return _unpacked(metadata, tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"the checkpoint {path} is damaged: {one_line(error)}; delete it, and the run begins anew"
        ) from None


def _unpacked(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> TrainingState:
    groups: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "data": {}}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        group, name = key.split("/", 1)
        if group == "optimizer":
            index, name = name.split("/", 1)
            moments.setdefault(int(index), {})[name] = tensor
        else:
            groups[group][name] = tensor
    header = json.loads(metadata["header"])
    if not isinstance(header, dict):
        raise TypeError("its header is no object")
    return TrainingState(
        step=int(metadata["step"]),
        weights=groups["weights"],
        optimizer={"state": moments, "param_groups": json.loads(metadata["param_groups"])},
        data=groups["data"],
        header=header,
    )
