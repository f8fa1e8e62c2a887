"""Exact nearest neighbours in a memory bank, by blocked matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 20  # elements of a product held at a time: it stays in the processor's cache until its maxima are taken


def half_squared_norms(bank: Tensor) -> Tensor:
    """bank (M, D) -> (M,), |b|^2 / 2 of each vector, as `nearest` takes it."""
    return bank.square().sum(1) / 2


def nearest(queries: Tensor, bank: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bank vector of each query.

    The index comes from max_b (q b - |b|^2 / 2), one product and one subtraction a pair; the distance is then taken
    from the difference itself, so it is exact near zero, where the expanded square is not.

    Args:
        queries: (N, D).
        bank: (M, D), M >= 1.
        half_norms: (M,), `half_squared_norms(bank)`.

    Returns:
        Euclidean distances (N,) and indices (N,) int64 into the bank.
    """
    if torch.onnx.is_in_onnx_export():  # an exported graph has no use for blocks whose number depends on the batch
        indices = (queries @ bank.T - half_norms).argmax(1)
    else:
        rows = max(1, min(len(queries), 1024))
        columns = max(1, _BLOCK // rows)
        indices = torch.cat([_nearest_indices(part, bank, half_norms, columns) for part in queries.split(rows)])
    return (queries - bank[indices]).square().sum(1).sqrt(), indices


def _nearest_indices(queries: Tensor, bank: Tensor, half_norms: Tensor, columns: int) -> Tensor:
    best, indices = None, None
    product = queries.new_empty(len(queries), min(columns, len(bank)))
    for start in range(0, len(bank), columns):
        part = bank[start : start + columns]
        scores = torch.addmm(half_norms[start : start + columns], queries, part.T, beta=-1, out=product[:, : len(part)])
        value, index = scores.max(1)
        if best is None or indices is None:
            best, indices = value, index
        else:
            indices = torch.where(value > best, index + start, indices)
            best = torch.maximum(best, value)
    assert indices is not None
    return indices


def k_nearest(queries: Tensor, bank: Tensor, half_norms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest bank vectors of each of a few queries: distances (N, k), ascending, and indices (N, k)."""
    indices = (queries @ bank.T - half_norms).topk(min(k, len(bank)), dim=1).indices
    distances = (queries[:, None] - bank[indices]).square().sum(2).sqrt()
    order = distances.argsort(1)
    return distances.gather(1, order), indices.gather(1, order)
