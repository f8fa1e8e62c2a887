"""A Gaussian of its own at each position of a feature grid: its embedding, its whitening, and the distance to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1e-6  # of 1 - the share that the images left out have of a direction: rounding may take it below nought


class PositionGaussians(nn.Module):
    """Features -> squared Mahalanobis distances (P, B) at P = h*w positions.

    Embeddings are `reduce` x, each level reduced on its own grid and then enlarged to (h, w). Of each position the mean
    and a whitening W are kept, W^T W being the inverse of a covariance A = a S + R: S is that of the images learnt, R
    does not depend on any single image.

    Attributes:
        reduce: (C, D), of the D channels of all levels.
        mean: (P, C).
        images: (P,), how many were scored there.
        share: (P,), a.

    Args:
        channels: of each level that is read.
        grid: (h, w).
        width: C, or D if that is fewer.
        diagonal: variances only.
        enlarge: how coarser levels reach the grid.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grid: tuple[int, int],
        width: int,
        *,
        diagonal: bool = False,
        enlarge: Literal["bilinear", "nearest"] = "bilinear",
    ) -> None:
        super().__init__()
        self.grid = grid
        self.enlarge = enlarge
        positions, available = grid[0] * grid[1], sum(channels)
        self.width = min(width, available)
        self.diagonal = diagonal
        half = self.width // 2
        self.register_buffer("reduce", torch.zeros(self.width, available))
        self.register_buffer("mean", torch.zeros(positions, self.width))
        if diagonal:
            self.register_buffer("whiten", torch.zeros(0, self.width))
        else:
            # The inverse Cholesky factor is lower triangular: its upper right quarter is not kept.
            self.register_buffer("whiten_upper", torch.zeros(0, half, half))
            self.register_buffer("whiten_lower", torch.zeros(0, self.width - half, self.width))
        self.register_buffer("images", torch.zeros(positions))
        self.register_buffer("share", torch.ones(positions), persistent=False)
        self.reduce: Tensor
        self.mean: Tensor
        self.whiten: Tensor
        self.whiten_upper: Tensor
        self.whiten_lower: Tensor
        self.images: Tensor
        self.share: Tensor

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B, D_i, h_i, w_i) -> (P, B, C): reduced embeddings, positions first."""
        embedded = torch.zeros((), device=self.reduce.device)
        start = 0
        for maps in features:  # reducing before enlarging: both are linear, and there is less to enlarge
            part = self.reduce[:, start : start + maps.shape[1]]
            start += maps.shape[1]
            reduced = (part @ maps.flatten(2)).unflatten(2, maps.shape[-2:])
            if maps.shape[-2:] != self.grid:
                corners = None if self.enlarge == "nearest" else False
                reduced = F.interpolate(reduced, size=self.grid, mode=self.enlarge, align_corners=corners)
            embedded = embedded + reduced
        return embedded.flatten(2).permute(2, 0, 1).contiguous()  # products of many small matrices want it

    def reserve(self) -> None:
        """Makes room for W of all positions, in new buffers."""
        for name in ("whiten",) if self.diagonal else ("whiten_upper", "whiten_lower"):
            kept = self.get_buffer(name)
            setattr(self, name, kept.new_empty(len(self.mean), *kept.shape[1:]))

    def keep(self, at: slice, whitening: Tensor) -> None:
        """W (p, C, C), lower triangular, or (p, C), of some positions."""
        if self.diagonal:
            self.whiten[at] = whitening
        else:
            half = self.width // 2
            self.whiten_upper[at], self.whiten_lower[at] = whitening[:, :half, :half], whitening[:, half:]

    def kept(self, at: slice) -> Tensor:
        """W of some positions, in float64."""
        if self.diagonal:
            return self.whiten[at].double()
        lower = self.whiten_lower[at].double()
        return torch.cat([F.pad(self.whiten_upper[at].double(), (0, lower.shape[1])), lower], 1)

    def whitened(self, deviations: Tensor) -> Tensor:
        """x - mean (P, B, C) -> W (x - mean), (P, B, C)."""
        if self.diagonal:
            return deviations * self.whiten[:, None]
        upper = deviations[:, :, : self.width // 2] @ self.whiten_upper.transpose(1, 2)
        lower = deviations @ self.whiten_lower.transpose(1, 2)
        return torch.cat([upper, lower], 2)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Squared distances (P, B): Defard et al. 2021, Eq. 2, squared."""
        return self.whitened(self.embed(features) - self.mean[:, None]).square().sum(2)

    def left_out(self, features: Sequence[Tensor], groups: Tensor, scored: Tensor | None = None) -> Tensor | None:
        """`forward` of images that were learnt, each as if its group (B,) had not been; all of a group are given.

        Exact but for R, which goes with the covariance of all, times (n - 1) / (n - k - 1). None where fewer than two
        others are left at a position that is scored.

        Args:
            features, groups: B images.
            scored: (P, B) of 0 and 1, where they were learnt from; None is everywhere.
        """
        return self._left_out(features, groups, scored, self.whitened)

    def _left_out(
        self,
        features: Sequence[Tensor],
        groups: Tensor,
        scored: Tensor | None,
        whitened: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        deviations = self.embed(features) - self.mean[:, None]
        if scored is not None:
            deviations = deviations * scored[..., None]
        white = whitened(deviations)
        learnt = self.images > 0
        squares = torch.zeros(white.shape[:2], device=white.device)
        for group in groups.unique():
            members = (groups == group).nonzero()[:, 0]
            y = white[:, members]  # (P, k, C)
            held = torch.ones_like(y[..., 0]) if scored is None else scored[:, members]  # (P, k)
            others = self.images - held.sum(1)
            if bool((others[learnt] < 2).any()):
                return None
            found = self._downdated(y, held)
            squares[:, members] = torch.where(learnt[:, None], found, squares[:, members])
        return squares

    def _downdated(self, y: Tensor, held: Tensor) -> Tensor:
        n, share = self.images.clamp_min(3), self.share  # where nothing was scored there is nothing to know
        if not self.diagonal:
            return downdated(y, held, n, share)
        of_channels = y.transpose(1, 2).flatten(0, 1)[..., None]  # (P*C, k, 1): each channel has a Gaussian of its own
        held, n, share = (part.repeat_interleave(self.width, 0) for part in (held, n, share))
        squares: Tensor = downdated(of_channels, held, n, share).unflatten(0, (-1, self.width)).sum(1)
        return squares


def whitening_of(covariance: Tensor) -> Tensor:
    """A (p, C, C) -> W, lower triangular, with W^T W = A^-1."""
    return triangular_inverse(torch.linalg.cholesky(covariance))


def triangular_inverse(factors: Tensor) -> Tensor:
    """The inverses of lower triangular (p, C, C)."""
    if factors.device.type != "cpu":
        identity = torch.eye(factors.shape[-1]).to(factors)
        solved: Tensor = torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)
        return solved
    # LAPACK's own routine is several times as fast as solving for the columns of the identity.
    from scipy.linalg import lapack

    invert = lapack.dtrtri if factors.dtype == torch.float64 else lapack.strtri
    return torch.from_numpy(np.stack([invert(factor, lower=1)[0] for factor in factors.numpy()]))


def downdated(y: Tensor, held: Tensor, n: Tensor, share: Tensor) -> Tensor:
    """Squared distances of k vectors to the Gaussian of the others, from their distances to that of all.

    With d_j the vectors' deviations from the mean of all n, leaving k of them out takes sum d_j d_j^T + (sum d_j)
    (sum d_j)^T / (n - k) from the sum of squares, and moves their deviations to d_i + sum d_j / (n - k). So all that is
    needed are the products K of the whitened d_j (Sherman & Morrison 1950; Woodbury 1950). Of a single one of squared
    length q that is (n / (n - 1))^2 (n - 2) / (n - 1) q / (1 - a n / (n - 1)^2 q).

    Args:
        y: (P, k, C), W d_j, zero where a vector does not count.
        held: (P, k) of 0 and 1, which count.
        n: (P,) vectors in all.
        share: (P,) a, the share of the covariance of all that their squares are in.

    Returns:
        (P, k).
    """
    if y.is_cuda or y.shape[1] > 1:
        y, held, n, share = y.double(), held.double(), n.double(), share.double()
    count = held.sum(1)
    left = (n - count).clamp_min(1)
    scale = ((n - count - 1).clamp_min(1) / (n - 1))[:, None]  # of S: its divisor becomes n - k - 1
    products = y @ y.transpose(1, 2)  # (P, k, k)
    if y.shape[1] == 1:
        q, ratio = products[:, 0], (n / left)[:, None]  # (P, 1); K, and 1 + 1 / (n - k)
        rest = (1 - share[:, None] * ratio / (n - 1)[:, None] * q).clamp_min(_LEAST)
        return (scale * ratio.square() * q / rest).float()
    identity = torch.eye(y.shape[1]).to(y)
    outer = held[:, :, None] * held[:, None] / left[:, None, None]
    moved = identity + outer  # (P, k, k): deviations from the others' mean
    taken = torch.linalg.cholesky(moved / (n - 1)[:, None, None])  # F, F F^T are the squares that go
    values, vectors = torch.linalg.eigh(taken.transpose(1, 2) @ products @ taken)
    gone = (moved @ products @ taken @ vectors).square()  # (P, k, k)
    gain = share[:, None] / (1 - share[:, None] * values).clamp_min(_LEAST)
    squares = (moved @ products @ moved).diagonal(dim1=1, dim2=2) + (gone @ gain[..., None])[..., 0]
    downdate: Tensor = (scale * squares).float()
    return downdate
