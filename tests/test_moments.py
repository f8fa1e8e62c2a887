"""Running mean and covariance, beside numpy's over all vectors at once."""

from __future__ import annotations

import numpy as np
import torch

from flawmap.methods.blocks.moments import Moments


def test_batches_give_numpys_mean_and_covariance_far_from_zero() -> None:
    vectors = torch.randn(1003, 7, generator=torch.Generator().manual_seed(3)) @ torch.diag(torch.arange(1.0, 8)) + 1e3
    moments = Moments(7)
    for batch in (vectors[:0], *vectors.split(100)):
        moments.update(batch)
    assert moments.count == 1003
    np.testing.assert_allclose(moments.mean(), vectors.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        moments.covariance(), np.cov(vectors.double().T.numpy(), bias=True), rtol=1e-4, atol=1e-3
    )
