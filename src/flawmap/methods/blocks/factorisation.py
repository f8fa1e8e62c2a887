"""What trains F2R's flow: its likelihood, and the terms that part z into what is there and where it is.

Zhu et al., IEEE Access 2023, Eqs. 2, 5 and 6.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.methods.contract import Config


class FactorisationConfig(Config):
    """Settings of the loss."""

    gamma: float = Field(0.01, ge=0, le=1e6, description="weight of the likelihood (Eq. 6)")
    nll_half: bool = Field(True, description="half the squared norm in Eq. 2")
    covariance: bool = Field(True, description="term 1 of Eq. 5: z_l and z_g uncorrelated")
    centred: bool = Field(True, description="the covariance of term 1 about the batch's mean")
    covariance_as: Literal["mean", "sum", "norm"] = Field(
        "mean", description="term 1's size: mean or sum of its entries' sizes, or the root of the sum of their squares"
    )
    semantics: Literal["cls", "reg", "none"] = Field("cls", description="term 2: z_l tells f, by cosine or square")
    square_as: Literal["mean", "sum"] = Field("mean", description="term 2's square over the channels, with reg")
    position: bool = Field(True, description="term 3: z_g tells the position")


class Factorisation(nn.ModuleDict):
    """The loss, and the networks that it needs: MLP_l, from z_l to f, and MLP_g, from z_g to the position.

    Args:
        config: which terms there are.
        parts: channels of z_l and z_g.
        positions: how many there are.
    """

    def __init__(self, config: FactorisationConfig, parts: tuple[int, int], positions: int) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        if config.semantics != "none":
            self["semantics"] = _mlp(parts[0], sum(parts), sum(parts))
        if config.position:
            self["position"] = _mlp(parts[1], sum(parts), positions)

    def forward(self, f: Tensor, z: Tensor, log_det: Tensor, places: Tensor) -> Tensor:
        """L_total (Eq. 6).

        Args:
            f: patches (N, c).
            z, log_det: what their flow makes of them (N, c), and its log-determinant (N,).
            places: their positions (N,).
        """
        config = self.config
        total: Tensor = config.gamma * self.likelihood(z, log_det)  # Eq. 2
        z_l, z_g = z.split(self.parts, 1)
        if config.covariance:
            found = covariance(z_l, z_g, centred=config.centred, size=config.covariance_as)
            total = total + found  # term 1 of Eq. 5
        if config.semantics != "none":
            total = total + self.unlikeness(f, self["semantics"](z_l))  # term 2
        if config.position:
            total = total + F.cross_entropy(self["position"](z_g), places)  # term 3
        return total

    def likelihood(self, z: Tensor, log_det: Tensor) -> Tensor:
        """Eq. 2: the mean negative log-likelihood under a standard Gaussian, without its constant."""
        return (z.square().sum(1) / (2 if self.config.nll_half else 1) - log_det).mean()

    def unlikeness(self, f: Tensor, told: Tensor) -> Tensor:
        """Of patches (N, c) and what MLP_l tells of them: "cls" by angle, "reg" by distance."""
        if self.config.semantics == "cls":
            return 1 - F.cosine_similarity(f, told).mean()
        squares = (told - f).square()
        return squares.mean() if self.config.square_as == "mean" else squares.sum(1).mean()


def covariance(
    first: Tensor, second: Tensor, *, centred: bool = True, size: Literal["mean", "sum", "norm"] = "mean"
) -> Tensor:
    """Term 1 of Eq. 5: the size of the covariance matrix of z_l (N, a) and z_g (N, b) over a batch."""
    if centred:
        first, second = first - first.mean(0), second - second.mean(0)
    found = first.T @ second / len(first)
    if size == "norm":
        return found.square().sum().clamp_min(1e-24).sqrt()  # the root has no slope at zero
    return found.abs().mean() if size == "mean" else found.abs().sum()


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Four linear layers, with batch normalisation and leaky ReLU between them."""
    parts: list[nn.Module] = []
    for before in (inputs, width, width):
        parts += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.LeakyReLU()]
    return nn.Sequential(*parts, nn.Linear(width, outputs))
