"""Gaussians at each position whose covariances are shrunk towards the one pooled over all positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flawmap.backbones import Backbone
from flawmap.methods.blocks.patches import fused
from flawmap.methods.blocks.position_gaussians import PositionGaussians, triangular_inverse, whitening_of
from flawmap.methods.blocks.position_moments import PositionMoments
from flawmap.methods.blocks.smoothing import scored_positions
from flawmap.methods.contract import Collect

_FOLDS = 5
_LEAST_SHRINKAGE = 0.02
_AT_ONCE = 64  # positions factorised together


class PooledGaussians(PositionGaussians):
    """`PositionGaussians` of some levels, in a space in which the pooled covariance within positions is the identity.

    There the covariance of a position is A = (1 - l) S + l I, with the shrinkage l of Ledoit & Wolf (2004): the share
    of S - I that is to be expected of sampling alone, at least 2 / n, since few images do not tell that share. Two
    passes over the images, `pooled_covariance` and `covariances`. After them, and while it is not saved, `left_out`
    also leaves a fifth of the images out of I: with few images each one has a large part in it.

    Args:
        read: which of the features are read.
        ridge: added to the pooled covariance, as a share of each channel's variance.
    """

    def __init__(
        self, read: Sequence[int], backbone: Backbone, grid: tuple[int, int], width: int, ridge: float
    ) -> None:
        super().__init__([backbone.channels[i] for i in read], grid, width)
        self._read, self._ridge = tuple(read), ridge
        self._pooled: list[Tensor] = []  # (C, C) of each fold: the target without it
        self._last: Tensor | None = None  # the last group of each fold but the last
        self._shrunk: Tensor | None = None  # A, (P, C, C)
        self._varied: tuple[int, Tensor] | None = None  # its whitening with one fold's target, (P, C, C)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        return super().embed([features[i] for i in self._read])

    def pooled_covariance(self) -> Collect:
        """The first pass: means, and the covariance within positions, whose whitening `reduce` becomes."""
        available = self.reduce.shape[1]
        squares = torch.zeros(available, available, dtype=torch.float64, device=self.mean.device)
        shift = torch.empty(0)
        first = torch.zeros(len(self.mean), available, dtype=torch.float64, device=self.mean.device)
        count = torch.zeros(len(self.mean), 1, dtype=torch.float64, device=self.mean.device)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            nonlocal shift
            x = fused([features[i] for i in self._read], self.grid)  # (B, P, D)
            scored = scored_positions(inside, self.grid)
            held = torch.ones_like(x[..., :1]) if scored is None else scored[..., None]  # (B, P, 1)
            if not shift.numel():
                shift = (x * held).sum(0) / held.sum(0).clamp_min(1)  # (P, D)
            x = (x - shift) * held
            first.add_(x.sum(0))
            count.add_(held.sum(0))
            flat = x.flatten(0, 1)
            squares.add_(flat.T @ flat)

        def close(progress: Callable[[int, int], None]) -> None:
            known = count[:, 0] > 0
            mean = first[known] / count[known]
            degrees = float((count[known] - 1).sum())
            pooled = (squares - (mean * count[known]).T @ mean) / max(degrees, 1)
            variances = pooled.diagonal()
            ridge = self._ridge * variances.clamp_min(1e-6 * float(variances.mean()) + 1e-12)
            factor = torch.linalg.cholesky(pooled + ridge.diag())
            whitening = triangular_inverse(factor[None])[0]
            if self.width < available:
                generator = torch.Generator().manual_seed(torch.initial_seed())
                drawn = torch.linalg.qr(torch.randn(available, self.width, generator=generator, dtype=torch.float64))[0]
                whitening = drawn.T.to(whitening) @ whitening  # (C, D)
            self.reduce.copy_(whitening)
            self.images.copy_(count[:, 0])
            centre = shift + torch.where(known[:, None], first / count.clamp_min(1), 0)
            self.mean.copy_(centre @ whitening.T)
            progress(1, 1)

        return Collect("pooled covariance", update, close, peak_bytes=8 * first.numel() + 16 * squares.numel())

    def covariances(self, groups: Tensor) -> Collect:
        """The second pass: each position's covariance, shrunk. `groups` (N,) as `Method.groups`."""
        moments = PositionMoments(*self.mean.shape)
        positions = len(self.mean)
        fourth = torch.zeros(positions, dtype=torch.float64, device=self.mean.device)
        own = torch.zeros(_FOLDS, self.width, self.width, dtype=torch.float64, device=self.mean.device)
        counts = torch.zeros(_FOLDS, dtype=torch.float64)
        fold_of = self._folds(groups)
        begun = 0

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            nonlocal begun
            z = self.embed(features) - self.mean[:, None]  # (P, B, C)
            scored = scored_positions(inside, self.grid)
            if scored is not None:
                z = z * scored.T[..., None]
            fourth.add_(z.square().sum(2).square().sum(1))
            of = fold_of[begun : begun + z.shape[1]]
            for fold in of.unique().tolist():
                some = z[:, of == fold].flatten(0, 1)
                own[fold] += some.T @ some
                counts[fold] += len(some) if scored is None else float(scored[of == fold].sum())
            begun += z.shape[1]
            moments.update(z, None if scored is None else scored.T)

        def close(progress: Callable[[int, int], None]) -> None:
            self.reserve()
            identity = torch.eye(self.width, dtype=torch.float64, device=self.mean.device)
            kept = self.mean.new_empty(positions, self.width, self.width)
            for at, covariance in moments.covariances():  # (p, C, C)
                n = moments.count[at].double().clamp_min(2)
                shrinkage = _shrinkage(covariance, n, fourth[at])[:, None, None]
                self.share[at] = 1 - shrinkage[:, 0, 0].float()
                shrunk = (1 - shrinkage) * covariance + shrinkage * identity
                self.keep(at, whitening_of(shrunk))
                kept[at] = shrunk.float()
                progress(at.stop, positions)
            # Their deviations are from the mean of all images, which takes a degree of freedom from each position.
            degrees = (counts.sum() - counts) * (1 - positions / counts.sum()).clamp_min(1e-3)
            ridge = identity - own.sum(0) / (counts.sum() - positions).clamp_min(1)
            self._pooled = [(own.sum(0) - own[i]) / degrees[i].clamp_min(1) + ridge for i in range(_FOLDS)]
            self._shrunk, self._varied = kept, None

        return Collect("Gaussians", update, close, peak_bytes=moments.peak_bytes)

    def _folds(self, groups: Tensor) -> Tensor:
        """The fold (N,) of each input: groups in the order of their numbers, a fifth of them each."""
        numbers = groups.unique()
        at = torch.arange(1, _FOLDS) * len(numbers) // _FOLDS
        self._last = numbers[(at - 1).clamp_min(0)]
        return torch.bucketize(groups, self._last)

    def left_out(self, features: Sequence[Tensor], groups: Tensor, scored: Tensor | None = None) -> Tensor | None:
        if self._last is None or not self._pooled or bool((self.images[self.images > 0] < 3).any()):
            return None
        found = torch.zeros(len(self.mean), len(groups), device=self.mean.device)
        folds = torch.bucketize(groups.cpu(), self._last)
        for fold in folds.unique().tolist():
            some = (folds == fold).nonzero()[:, 0]
            squares = self._left_out(
                [level[some] for level in features],
                groups[some],
                None if scored is None else scored[:, some],
                self._without(fold),
            )
            if squares is None:
                return None
            found[:, some] = squares
        return found

    def forget(self) -> None:
        """Drops what `left_out` needs: as much as the Gaussians themselves, several times."""
        self._pooled, self._last, self._shrunk, self._varied = [], None, None, None

    def _without(self, fold: int) -> Callable[[Tensor], Tensor]:
        """`whitened` with the target from which the images of a fold are left out."""
        assert self._shrunk is not None
        if self._varied is None or self._varied[0] != fold:
            moved = (self._pooled[fold] - torch.eye(self.width).to(self._pooled[fold])).float()
            whitening = torch.empty_like(self._shrunk)
            for start in range(0, len(whitening), _AT_ONCE):
                at = slice(start, start + _AT_ONCE)
                whitening[at] = whitening_of(self._shrunk[at] + (1 - self.share[at])[:, None, None] * moved)
            self._varied = fold, whitening
        whitening = self._varied[1]
        return lambda deviations: deviations @ whitening.transpose(1, 2)


def _shrinkage(covariance: Tensor, n: Tensor, fourth: Tensor) -> Tensor:
    """How far (p,) to go from S (p, C, C), unbiased, towards the identity: Ledoit & Wolf 2004, Lemma 3.1 and 3.3.

    Args:
        n: (p,) vectors z that S is of, at least 2.
        fourth: (p,) the sum of |z|^4.
    """
    of_all = covariance.square().sum((1, 2)) * ((n - 1) / n).square()  # |S|^2 of the biased S
    noise = (fourth / n - of_all) / n
    identity = torch.eye(covariance.shape[1]).to(covariance)
    away = (covariance - identity).square().sum((1, 2)).clamp_min(1e-12)
    least = (2 / n).clamp(_LEAST_SHRINKAGE, 1)
    shrinkage: Tensor = (noise / away).clamp(max=1).maximum(least)
    return shrinkage
