"""Checkpoint files of evaluators: safetensors, or torch files opened with weights_only=True. Never a free pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint file by name; a nesting under `state_dict` or `model` is opened.

    Raises:
        ValueError: the file is missing, damaged, or holds more than tensors and plain containers; one line with the file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as safetensors or as a torch file with weights_only=True: {reason}"
        ) from None
    for nest in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no dictionary of tensors (nor one under 'state_dict' or 'model')")
    return {str(name): tensor for name, tensor in content.items()}


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, ignore: Iterable[str] = ()
) -> None:
    """Copy `tensors` into `module`, all of them and nothing else; names that begin with one of `ignore` may stay over.

    Raises:
        ValueError: names missing, unexpected or of another shape, in one line with the file.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(name for name in tensors.keys() - own.keys() if not name.startswith(tuple(ignore)))
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {len(missing)} missing ({_first(missing)}), "
            f"{len(unexpected)} unexpected ({_first(unexpected)})"
        )
    wrong = [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        found, wanted = tuple(tensors[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {len(wrong)} tensors of another shape "
            f"({wrong[0]} is {found}, must be {wanted})"
        )
    module.load_state_dict({name: tensors[name] for name in own})


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") if names else "none"
