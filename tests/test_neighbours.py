import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from flawmap.neighbours import k_center_greedy, k_nearest, nearest, search_index


def plain_greedy(points, k, first):
    """Direct differences, the lowest index among equals."""
    picks, distances = [first], ((points - points[first]) ** 2).sum(1)
    while len(picks) < k and distances.max() > 0:
        picks.append(int(distances.argmax()))
        distances = np.minimum(distances, ((points - points[picks[-1]]) ** 2).sum(1))
    return picks


def check_against_plain(points, k, block=None):
    before = points.copy()
    picks = k_center_greedy(points, k, block=block)
    np.testing.assert_array_equal(points, before)
    assert picks.dtype == np.int64
    from_mean = np.linalg.norm(points - points.mean(0), axis=1)
    assert from_mean[picks[0]] == pytest.approx(from_mean.max(), rel=1e-12, abs=1e-12)
    assert picks.tolist() == plain_greedy(points, k, int(picks[0]))


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 120),
    st.integers(1, 8),
    st.integers(1, 130),
    st.sampled_from([None, 1, 7, 64]),
)
@settings(max_examples=60, deadline=None)
def test_random_points_in_float64_give_the_picks_of_plain_greedy(seed, count, width, k, block):
    check_against_plain(np.random.default_rng(seed).standard_normal((count, width)), k, block)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 150),
    st.integers(1, 4),
    st.integers(1, 160),
    st.sampled_from([None, 1, 5, 50]),
)
@settings(max_examples=80, deadline=None)
def test_integer_points_full_of_ties_and_duplicates_give_the_picks_of_plain_greedy(seed, count, width, k, block):
    points = np.random.default_rng(seed).integers(-3, 4, (count, width)).astype(np.float64)
    check_against_plain(points, k, block)
    assert len(k_center_greedy(points, k, block=block)) == min(k, len(np.unique(points, axis=0)))


@pytest.mark.parametrize("block", [None, 1, 3, 100])
def test_a_full_grid_gives_the_picks_of_plain_greedy(block):
    axes = np.meshgrid(*[np.arange(6.0)] * 3, indexing="ij")
    check_against_plain(np.stack([axis.ravel() for axis in axes], 1), 216, block)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_duplicated_random_points_are_picked_once(dtype):
    points = np.random.default_rng(1).standard_normal((40, 12)).astype(dtype).repeat(5, axis=0)
    picks = k_center_greedy(points, 200)
    assert sorted(picks // 5) == list(range(40))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_points_give_one_pick(dtype):
    assert len(k_center_greedy(np.full((50, 3), 0.1, dtype), 10)) == 1


# Clusters 80 times as far apart as they are wide leave too few digits of their inner distances for the last 0.1 %.
@pytest.mark.parametrize(
    ("kind", "slack"), [("random", 1.001), ("clustered", 1.001), ("tightly clustered", 1.01), ("offset", 1.001)]
)
@pytest.mark.parametrize("block", [None, 16])
def test_in_float32_the_cover_radius_is_that_of_plain_greedy_at_every_size(kind, slack, block):
    random = np.random.default_rng(3)
    points = random.standard_normal((1500, 24)).astype(np.float32)
    if "clustered" in kind:
        width = 0.05 if "tightly" in kind else 0.2
        points = (points * width + 4 * random.standard_normal((12, 24))[random.integers(0, 12, 1500)]).astype(
            np.float32
        )
    if kind == "offset":
        points += np.float32(30)
    picks = k_center_greedy(points, 300, block=block)
    exact = points.astype(np.float64)
    theirs = plain_greedy(exact, 300, int(picks[0]))

    def radii(order):
        return np.minimum.accumulate(cdist(exact[order], exact), axis=0).max(1)

    assert len(set(picks.tolist())) == 300
    assert (radii(picks) <= slack * radii(theirs)).all()


def test_progress_rises_to_the_number_of_picks():
    calls = []
    points = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32)
    picks = k_center_greedy(points, 200, block=64, progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == (200, 200) == (len(picks), 200)


@pytest.mark.parametrize(
    ("points", "k"),
    [
        (np.empty((0, 3)), 1),
        (np.zeros(3), 1),
        (np.zeros((3, 2), dtype=np.int64), 1),
        (np.zeros((3, 2)), 0),
        (np.array([[0.0, np.nan]]), 1),
        (np.array([[0.0, np.inf], [1.0, 2.0]]), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_cannot_be_covered_is_refused(points, k):
    with pytest.raises(ValueError, match=r"point|k must"):
        k_center_greedy(points, k)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_nearest_is_what_a_k_d_tree_finds(seed, queries, vectors, width):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((queries, width)), random.standard_normal((vectors, width))
    distances, indices = nearest(torch.from_numpy(a), search_index(torch.from_numpy(b)))
    theirs, their_indices = cKDTree(b).query(a)
    np.testing.assert_allclose(distances, theirs, rtol=1e-12)
    np.testing.assert_array_equal(indices, their_indices)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_with_more_queries_and_vectors_than_a_block(dtype):
    random = np.random.default_rng(5)
    a, b = random.standard_normal((2300, 20)).astype(dtype), random.standard_normal((1337, 20)).astype(dtype)
    distances, indices = nearest(torch.from_numpy(a), search_index(torch.from_numpy(b)))
    reference = cdist(a.astype(np.float64), b.astype(np.float64))
    rtol = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(distances, reference.min(1), rtol=rtol)
    # among vectors as near as float32 can tell, either may be named
    np.testing.assert_allclose(reference[np.arange(len(a)), indices], reference.min(1), rtol=rtol)


def test_members_of_the_bank_are_at_distance_zero_whichever_of_equals_is_named():
    bank = torch.from_numpy(np.random.default_rng(6).standard_normal((700, 30)).astype(np.float32)).repeat(2, 1)
    distances, indices = nearest(bank[:700], search_index(bank))
    assert (distances == 0).all()
    assert torch.equal(bank[indices], bank[:700])


def test_a_large_offset_costs_no_more_than_the_rounding_of_the_norms():
    random = np.random.default_rng(7)
    for dtype, offset in ((np.float64, 1e5), (np.float32, 100.0)):
        a = (random.standard_normal((200, 8)) + offset).astype(dtype)
        b = (random.standard_normal((600, 8)) + offset).astype(dtype)
        distances, indices = nearest(torch.from_numpy(a), search_index(torch.from_numpy(b)))
        reference = cdist(a.astype(np.float64), b.astype(np.float64))
        # the distance is that of the vector named ...
        np.testing.assert_allclose(distances, reference[np.arange(200), indices], rtol=1e-5)
        # ... which is nearest but for what the norms have lost
        lost = 16 * np.finfo(dtype).eps * (b.astype(np.float64) ** 2).sum(1).max()
        assert (distances.numpy() ** 2 <= reference.min(1) ** 2 + lost).all()


def test_k_nearest_is_what_a_k_d_tree_finds():
    random = np.random.default_rng(8)
    a, b = random.standard_normal((30, 6)), random.standard_normal((90, 6))
    distances, indices = k_nearest(torch.from_numpy(a), search_index(torch.from_numpy(b)), 7)
    theirs, their_indices = cKDTree(b).query(a, 7)
    np.testing.assert_allclose(distances, theirs, rtol=1e-10)
    np.testing.assert_array_equal(indices, their_indices)


def test_k_nearest_of_a_bank_smaller_than_k_gives_all_of_it():
    distances, indices = k_nearest(torch.zeros(2, 1), search_index(torch.tensor([[3.0], [-1.0]])), 9)
    assert distances.tolist() == [[1.0, 3.0]] * 2
    assert indices.tolist() == [[1, 0]] * 2
