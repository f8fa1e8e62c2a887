"""Running moments at each position, beside numpy's over all vectors at once."""

import numpy as np
import pytest
import torch

from flawmap.methods.blocks.position_moments import PositionMoments

P, N, C = 601, 19, 5  # more positions than one allocation, and not a multiple of those worked on at once; an odd width


@pytest.fixture(scope="module")
def vectors():
    """(P, N, C), of another mean and covariance at each position, far from zero."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(P, C, C, generator=random)
    return 100 * torch.randn(P, 1, C, generator=random) + torch.randn(P, N, C, generator=random) @ mixing


@pytest.fixture(scope="module")
def scored():
    """(P, N): nothing at the first position, one vector at the second, and not the first batch's at the third."""
    drawn = torch.rand(P, N, generator=torch.Generator().manual_seed(1)).round()
    drawn[0], drawn[1], drawn[2] = 0, torch.eye(N)[4], torch.arange(N) >= 9
    return drawn


def collected(vectors, batches, *, scored=None, diagonal=False, moments=None):
    moments = moments or PositionMoments(P, C, diagonal=diagonal)
    assert sum(batches) == vectors.shape[1]
    parts = [None] * len(batches) if scored is None else scored.split(batches, 1)
    for x, inside in zip(vectors.split(batches, 1), parts, strict=True):
        moments.update(x.clone(), inside)
    return moments


def covariances(moments):
    """Of all positions, each of which is yielded once, in order."""
    found, stop = [], 0
    for at, covariance in moments.covariances():
        assert at.start == stop
        stop = at.stop
        assert len(covariance) == at.stop - at.start
        found.append(covariance)
    assert stop == P
    return torch.cat(found)


def expected(vectors, scored, diagonal):
    means, spreads = np.zeros((P, C)), np.zeros((P, C, C))
    for p in range(P):
        x = vectors[p].double().numpy()
        x = x if scored is None else x[scored[p].numpy() > 0]
        if len(x) > 0:
            means[p] = x.mean(0)
        if len(x) > 1:
            spreads[p] = np.cov(x, rowvar=False)
    return means, np.diagonal(spreads, axis1=1, axis2=2) if diagonal else spreads


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batches", [[N], [8, 1, 10], [1] * N])
def test_any_batches_give_numpys_moments_of_each_position(vectors, scored, batches, masked, diagonal):
    inside = scored if masked else None
    moments = collected(vectors, batches, scored=inside, diagonal=diagonal)
    means, spreads = expected(vectors, inside, diagonal)
    np.testing.assert_array_equal(moments.count, scored.sum(1) if masked else np.full(P, N))
    np.testing.assert_allclose(moments.mean(), means, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(covariances(moments), spreads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("diagonal", [False, True])
def test_known_moments_are_gone_on_from(vectors, scored, diagonal):
    first = collected(vectors[:, :11], [11], scored=scored[:, :11], diagonal=diagonal)
    mean, known = first.mean().float(), covariances(first)
    resumed = PositionMoments(P, C, diagonal=diagonal)
    assert not resumed.begun
    resumed.resume(first.count, mean, lambda at: known[at])
    assert resumed.begun
    collected(vectors[:, 11:], [3, 5], scored=scored[:, 11:], moments=resumed)
    means, spreads = expected(vectors, scored, diagonal)
    np.testing.assert_array_equal(resumed.count, scored.sum(1))
    np.testing.assert_allclose(resumed.mean(), means, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(covariances(resumed), spreads, rtol=1e-3, atol=2e-3)


def test_digits_are_kept_far_from_zero():
    x = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(2)) + 1e4
    moments = PositionMoments(3, 4)
    for batch in x.split(7, 1):
        moments.update(batch.clone())
    (at, found), = moments.covariances()  # fmt: skip
    assert at == slice(0, 3)
    np.testing.assert_allclose(found, [np.cov(one.double(), rowvar=False) for one in x], atol=1e-5)


def test_a_quarter_of_a_symmetric_matrix_is_not_kept():
    assert PositionMoments(1000, 100).peak_bytes == 8 * 1000 * 100 * 100 * 3 // 4
    assert PositionMoments(1000, 100, diagonal=True).peak_bytes == 8 * 1000 * 100
