"""Weight decay on some of a network's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def decaying_linear(module: nn.Module, parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """An optimiser's groups of `parameters`: weights of the module's linear layers decay, all else does not."""
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    decayed, free = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in parameters:
        (decayed if id(parameter) in linear else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
