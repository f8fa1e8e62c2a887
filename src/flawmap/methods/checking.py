"""Whether tensors from a model file are a method's: before they are put into it, and by a first run after."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flawmap.methods.contract import Method


def check_tensors(method: Method, tensors: Mapping[str, Tensor]) -> None:
    """Holds names, types, shapes and values against the method as its settings make it.

    What only training knows the number of, such as the vectors of a bank, may be of any length.

    Raises:
        ValueError: something is missing, unknown, of another type or shape, or not finite.
    """
    own = method.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"{missing[0]} is missing")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise ValueError(f"{unknown[0]} is not known")
    for name, tensor in tensors.items():
        expected = own[name]
        if tensor.dtype != expected.dtype:
            raise ValueError(f"{name} holds values of type {tensor.dtype}, expected {expected.dtype}")
        grown = expected.numel() == 0 and tensor.shape[1:] == expected.shape[1:] and tensor.dim() == expected.dim()
        if tensor.shape != expected.shape and not grown:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite")


@torch.inference_mode()
def try_out(method: Method, masked: bool) -> None:
    """Scores one empty picture: lengths that have to agree with one another are found out here.

    Raises:
        RuntimeError, ValueError, IndexError: they do not.
    """
    height, width = method.size
    device = next(method.parameters()).device
    inside = torch.ones(1, 1, height, width, device=device) if masked else None
    anomaly_map, scores = method(torch.zeros(1, 3, height, width, device=device), inside)
    if scores.shape != (1,) or (method.localises and anomaly_map.shape != (1, 1, height, width)):
        raise ValueError("its scores have another shape than they should")
