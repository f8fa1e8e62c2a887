"""Losses of images that were repaired and of pixels that were marked, as DRAEM has them (Zavrtanik et al., 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, in pixels
_C1, _C2 = 0.01**2, 0.03**2  # of SSIM, for values in 0..1
_LEAST = 1e-5  # a pixel told right for certain still has a slope


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in 0..1 at each pixel, of the same shape.

    Wang et al., IEEE TIP 2004: 11 x 11 windows, Gaussian of 1.5 pixels. Beyond the border lie zeros, as in DRAEM.
    """
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    channels = x.shape[1]
    kernel = (line / line.sum()).to(x.device, torch.float32).expand(5 * channels, 1, 1, _WINDOW)
    x, y = x.float(), y.float()  # variances are small differences
    moments = torch.cat([x, y, x * x, y * y, x * y], 1)  # (B, 5 C, H, W)
    moments = F.conv2d(moments, kernel, padding=(0, _WINDOW // 2), groups=5 * channels)
    moments = F.conv2d(moments, kernel.mT, padding=(_WINDOW // 2, 0), groups=5 * channels)
    mean_x, mean_y, xx, yy, xy = moments.split(channels, 1)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance, variances = xy - product, xx + yy - squares
    found: Tensor = (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))
    return found


def focal(logits: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """-(1 - p)^gamma log p of each pixel's true class (Lin et al., ICCV 2017), (B, 1, H, W).

    Of logits, so that a pixel that is missed for certain still learns.

    Args:
        logits: (B, 2, H, W), of no defect and of one.
        mask: (B, 1, H, W), 1 where there is one, 0 elsewhere.
        gamma: how much less pixels count that are told right.
    """
    classes = F.log_softmax(logits.float(), 1)
    true = torch.where(mask > 0, classes[:, 1:], classes[:, :1])
    return -((-torch.expm1(true)).clamp_min(_LEAST).pow(gamma)) * true


def mean_inside(values: Tensor, inside: Tensor | None) -> Tensor:
    """The mean of (B, C, H, W) where `inside` (B, 1, H, W) is 1; None is everywhere."""
    if inside is None:
        return values.mean()
    return (values * inside).sum() / (inside.sum() * values.shape[1]).clamp_min(1)
