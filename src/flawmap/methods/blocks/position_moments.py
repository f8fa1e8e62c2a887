"""Mean and covariance of the vectors at each position of a grid, of more images than fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_AT_ONCE = 64  # positions whose products stay in the cache
_ALLOCATED = 8 * _AT_ONCE  # positions whose sums are one allocation, large enough that freeing it gives memory back


class PositionMoments:
    """Running sums of x - a and (x - a)(x - a)^T over vectors x (C,), at each of P positions, in float64.

    The shift a is the mean of the first batch: it keeps the sums small, so that their difference keeps its digits.

    Attributes:
        begun: whether there is anything to go on from.
        count: (P,) float32, vectors so far.
        peak_bytes: what the sums of squares take.

    Args:
        positions: P.
        channels: C.
        diagonal: variances only.
    """

    def __init__(self, positions: int, channels: int, *, diagonal: bool = False) -> None:
        self.begun = False
        self.count: Tensor
        self._shape = (positions, channels)
        self._diagonal = diagonal
        self._half = channels // 2
        self._shift: Tensor  # (P, C), a
        self._first: Tensor  # (P, C)
        self._second: list[tuple[Tensor, ...]] = []  # of `_AT_ONCE` positions each, as `_packed` has them

    @property
    def peak_bytes(self) -> int:
        positions, channels = self._shape
        lower = channels - self._half
        return 8 * positions * (channels if self._diagonal else self._half * channels + lower * lower)

    def _begin(self, shift: Tensor) -> None:
        (positions, channels), half, device = self._shape, self._half, shift.device
        self.begun = True
        self.count = torch.zeros(positions, device=device)
        self._shift = shift
        self._first = torch.zeros(positions, channels, dtype=torch.float64, device=device)
        lower = channels - half
        shapes = ((channels,),) if self._diagonal else ((half, channels), (lower, lower))
        for start in range(0, positions, _ALLOCATED):
            some = min(_ALLOCATED, positions - start)
            sums = [torch.zeros(some, *shape, dtype=torch.float64, device=device) for shape in shapes]
            self._second += zip(*(total.split(_AT_ONCE) for total in sums), strict=True)

    def resume(self, count: Tensor, mean: Tensor, covariance: Callable[[slice], Tensor]) -> None:
        """Goes on from known moments, before any update.

        Args:
            count: (P,) float32, vectors that they are of.
            mean: (P, C) float32.
            covariance: some positions -> their unbiased covariances, as `covariances` gives them.
        """
        self._begin(mean.clone())
        self.count += count
        degrees = (count.double() - 1).clamp_min(0)
        for at, totals in zip(self._slices(), self._second, strict=True):
            degree = degrees[at].view(-1, 1) if self._diagonal else degrees[at].view(-1, 1, 1)
            for total, squares in zip(totals, self._packed(covariance(at) * degree), strict=True):
                total += squares

    def update(self, x: Tensor, scored: Tensor | None = None) -> None:
        """Counts further vectors, and overwrites them.

        Args:
            x: (P, B, C) float32.
            scored: (P, B) of 0 and 1; vectors at 0 do not count.
        """
        if scored is not None:
            scored = scored[..., None]  # (P, B, 1)
            x *= scored
        if not self.begun:
            self._begin(x.sum(1) / (x.shape[1] if scored is None else scored.sum(1).clamp_min(1)))
        x -= self._shift[:, None]
        if scored is None:
            self.count += x.shape[1]
        else:
            x *= scored
            self.count += scored.sum((1, 2))
        self._first += x.sum(1)
        for few, totals in zip(x.split(_AT_ONCE), self._second, strict=True):
            for total, squares in zip(totals, self._squares(few), strict=True):
                total += squares

    def mean(self) -> Tensor:
        """(P, C) float64; the shift where there are no vectors."""
        return self._shift + self._mean_shifted()

    def covariances(self) -> Iterator[tuple[slice, Tensor]]:
        """Some positions after the other, and their unbiased covariances (p, C, C) float64, or variances (p, C).

        Sums are dropped on the way, so that what is made of them takes their place: to be called once, at the end.
        """
        d = self._mean_shifted()
        for at in self._slices():
            total = self._unpacked(self._second.pop(0))
            n = self.count[at].double().clamp_min(1)[:, None]  # (p, 1)
            if self._diagonal:
                yield at, (total - n * d[at].square()) / (n - 1).clamp_min(1)
            else:
                n = n[..., None]  # (p, 1, 1)
                yield at, (total - n * d[at][:, :, None] * d[at][:, None]) / (n - 1).clamp_min(1)

    def _mean_shifted(self) -> Tensor:
        """(P, C): mean of x - a."""
        return self._first / self.count.double().clamp_min(1)[:, None]

    def _slices(self) -> Iterator[slice]:
        positions = self._shape[0]
        return (slice(start, min(start + _AT_ONCE, positions)) for start in range(0, positions, _AT_ONCE))

    def _squares(self, x: Tensor) -> Iterator[Tensor]:
        """(p, B, C) -> the sum of x x^T over B, packed; what is not kept is not computed."""
        if self._diagonal:
            yield x.square().sum(1)
        else:
            left, right = x[:, :, : self._half], x[:, :, self._half :]
            yield left.transpose(1, 2) @ x
            yield right.transpose(1, 2) @ right

    def _packed(self, squares: Tensor) -> tuple[Tensor, ...]:
        """(p, C, C) -> upper rows (p, C/2, C) and lower right quarter, which are all of a symmetric matrix."""
        if self._diagonal:
            return (squares,)
        return squares[:, : self._half], squares[:, self._half :, self._half :]

    def _unpacked(self, packed: tuple[Tensor, ...]) -> Tensor:
        if self._diagonal:
            return packed[0]
        upper, quarter = packed
        lower = torch.cat([upper[:, :, self._half :].transpose(1, 2), quarter], 2)
        return torch.cat([upper, lower], 1)  # (p, C, C)
