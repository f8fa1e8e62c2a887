import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flawmap.datasets import find_dataset
from flawmap.datasets.drawn import draw_dataset
from flawmap.datasets.duplicates import duplicate_groups, duplicate_pairs
from flawmap.imaging.decoding import read_image
from flawmap.imaging.fingerprints import SIDE, fingerprint

SHARED = Path(__file__).parents[2] / "shared" / "data"
KINDS = ("screws", "fabric", "boards")


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=70)
    return np.asarray(Image.open(file))


def resized(pixels):
    height, width = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels).resize((round(width * 0.9), round(height * 0.9))))


def brightened(pixels):
    return np.clip(np.rint(pixels * 1.05), 0, 255).astype(np.uint8)


def cropped(pixels):
    return pixels[round(pixels.shape[0] * 0.02) :, round(pixels.shape[1] * 0.02) :]


def everything(pixels):
    return encoded(brightened(resized(cropped(pixels))))


SAVED_AGAIN = (encoded, resized, brightened, cropped, everything)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """{kind: images}, good and defective, each another part."""
    root = tmp_path_factory.mktemp("duplicates")
    images = {}
    for kind in KINDS:
        draw_dataset(root / kind, kind, 0, train=14, good=0, per_defect=1, size=192)
        images[kind] = [read_image(sample.path) for sample in find_dataset(root / kind).samples]
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_different_parts_are_no_duplicates(drawn, kind):
    assert duplicate_pairs([fingerprint(pixels) for pixels in drawn[kind]]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", SAVED_AGAIN)
def test_one_photograph_saved_again_is_found_and_nothing_else(drawn, kind, save):
    images = drawn[kind]
    copies = [save(pixels) for pixels in images[::3]]
    pairs = duplicate_pairs([fingerprint(pixels) for pixels in [*images, *copies]])
    assert pairs == [(3 * i, len(images) + i) for i in range(len(copies))]


def test_every_image_saved_many_times(drawn):
    images = drawn["boards"]
    copies = [save(pixels) for save in SAVED_AGAIN for pixels in images]
    pairs = duplicate_pairs([fingerprint(pixels) for pixels in [*images, *copies]])
    n = len(images)
    assert duplicate_groups(pairs, n + len(copies)) == [list(range(i, n + len(copies), n)) for i in range(n)]


def test_identical_images_are_duplicates(drawn):
    one, other = (fingerprint(pixels) for pixels in drawn["boards"][:2])
    assert duplicate_pairs([other, one, one, one]) == [(1, 2), (1, 3)]
    black = np.zeros(SIDE * SIDE)
    assert duplicate_groups(duplicate_pairs([black, one, black]), 3) == [[0, 2]]
    assert len(duplicate_groups(duplicate_pairs(np.tile(one, (500, 1))), 500)[0]) == 500


def test_the_negative_of_a_picture_is_another(drawn):
    picture = fingerprint(drawn["boards"][0])
    assert duplicate_pairs([picture, 1 - picture]) == []


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_be_duplicates(count):
    assert duplicate_pairs(np.zeros((count, SIDE * SIDE))) == []


def test_fingerprints_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 1024\)"):
        duplicate_pairs(np.zeros((3, 7)))


def test_fingerprint_of_every_type(drawn):
    pixels = drawn["boards"][0]
    grey = pixels[:, :, 0]
    expected = fingerprint(grey)
    assert expected.dtype == np.float32
    assert expected.shape == (SIDE * SIDE,)
    assert expected.mean() == pytest.approx(grey.mean() / 255, abs=0.01)
    for same in (grey / 255, grey.astype(np.uint16) * 257, np.stack([grey] * 3, 2)):
        np.testing.assert_allclose(fingerprint(same), expected, atol=0.003)
    np.testing.assert_allclose(fingerprint(grey.astype(np.uint16) * 16, white=4080), expected, atol=0.003)
    assert fingerprint(np.full((1, 1), 51, np.uint8)) == pytest.approx(0.2)


@settings(deadline=None)
@given(st.integers(0, 30).flatmap(lambda n: st.tuples(st.just(n), _pairs(n))))
def test_groups_are_connected_components(case):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n, pairs = case
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    expected = []
    if n:
        _, labels = connected_components(coo_matrix((np.ones(len(pairs)), (rows, columns)), (n, n)), directed=False)
        expected = [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]
    assert duplicate_groups(pairs, n) == [group for group in expected if len(group) > 1]


def _pairs(n):
    indices = st.integers(0, max(n - 1, 0))
    return st.lists(st.tuples(indices, indices), max_size=20 if n else 0)


def test_the_cookie_photographed_twice():
    if not (SHARED / "cookie").is_dir():
        pytest.skip("the cookie images are not here")
    paths = [sample.path for sample in find_dataset(SHARED / "cookie").samples]
    pairs = duplicate_pairs([fingerprint(read_image(path)) for path in paths])
    assert [(paths[i].name, paths[j].name) for i, j in pairs] == [("normal-1.jpg", "normal-2.jpg")]


def test_magnetic_tiles_taken_at_several_exposures():
    """File names tell the exposure and a running number, close together for one tile."""
    if not (SHARED / "mtd").is_dir():
        pytest.skip("the mtd images are not here")
    paths = [sample.path for sample in find_dataset(SHARED / "mtd").train][:300]
    groups = duplicate_groups(duplicate_pairs([fingerprint(read_image(path)) for path in paths]), len(paths))
    assert sum(map(len, groups)) > 250
    for group in groups:
        numbers = sorted(int(paths[i].stem.rpartition("_")[2]) for i in group)
        assert len(group) <= 6 or numbers[-1] - numbers[0] < 20000
