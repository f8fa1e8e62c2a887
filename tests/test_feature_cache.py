import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flawmap import FlawmapError
from flawmap.learning.feature_cache import FeatureCache

Usage = namedtuple("Usage", "total used free")


def maps(rows, seed=0, scale=1.0):
    """Two levels and a mask, as an engine with a region of interest gives them."""
    random = np.random.default_rng(seed)
    return [
        (scale * random.standard_normal((rows, 3, 4, 5))).astype(np.float32),
        (scale * random.standard_normal((rows, 2, 2, 3))).astype(np.float32),
        random.random((rows, 1, 8, 10)) < 0.5,
    ]


def fill(cache, images):
    """Writes images of {digest: rows} and returns their maps by digest; each image's come from its own seed."""
    written = {}
    for seed, (digest, rows) in enumerate(images.items()):
        written[digest] = maps(rows, seed)
        cache.write(written[digest], expected_rows=sum(images.values()))
        cache.commit(digest, rows, {"seed": seed})
    return written


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


IMAGES = {"a": 1, "b": 3, "c": 2, "d": 1}


def test_rows_come_back_as_written_in_any_order(tmp_path):
    cache = FeatureCache(tmp_path / "cache", "one")
    written = fill(cache, IMAGES)
    assert cache.images == {"a": range(1), "b": range(1, 4), "c": range(4, 6), "d": range(6, 7)}
    everything = [np.concatenate(levels) for levels in zip(*written.values(), strict=True)]
    for rows in (range(7), [6, 0, 3, 3], [2]):
        assert_equal(cache.read(rows), [level[list(rows)] for level in everything])
    assert cache.levels == 3
    assert cache.row_bytes == 4 * 60 + 4 * 12 + 80
    again = FeatureCache(tmp_path / "cache", "one")
    assert again.images == cache.images
    assert again.records == {digest: {"seed": seed} for seed, digest in enumerate(IMAGES)}
    assert_equal(again.read(range(7)), everything)


def test_half_keeps_float16s_digits_and_leaves_masks(tmp_path):
    cache = FeatureCache(tmp_path, "one", half=True)
    written = maps(5, scale=100)
    cache.write(written, expected_rows=5)
    cache.commit("a", 5, None)
    assert cache.row_bytes == 2 * 60 + 2 * 12 + 80
    found = cache.read(range(5))
    assert_equal(found, [level.astype(np.float16).astype(np.float32) for level in written[:2]] + written[2:])
    for one, other in zip(found[:2], written[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=2.0**-11, atol=2.0**-25)


def test_half_keeps_levels_of_large_values_in_float32(tmp_path):
    cache = FeatureCache(tmp_path, "one", half=True)
    small, large, mask = maps(2)
    large *= 5000 / abs(large).max()
    cache.write([small, large, mask], expected_rows=2)
    cache.commit("a", 2, None)
    found = cache.read([0, 1])
    assert_equal(found[1:], [large, mask])
    assert_equal(found[:1], [small.astype(np.float16).astype(np.float32)])


def test_a_value_beyond_float16_is_refused_and_never_kept(tmp_path):
    cache = FeatureCache(tmp_path, "one", half=True)
    written = fill(cache, {"a": 2})
    later = maps(1, 9)
    later[1][0, 0, 0, 0] = 70_000
    with pytest.raises(FlawmapError, match=r"a feature of 7e\+04 is far beyond") as caught:
        cache.write(later, expected_rows=3)
    assert "\n" not in str(caught.value)
    again = FeatureCache(tmp_path, "one", half=True)
    assert list(again.images) == ["a"]
    again.write(maps(1, 4), expected_rows=3)
    again.commit("b", 1, None)
    rounded = [level if level.dtype == bool else level.astype(np.float16).astype(np.float32) for level in written["a"]]
    assert_equal(again.read([0, 1]), rounded)


def damage(folder, name, cut):
    """Cuts a file to `cut` of its length, as a kill or a full disk leaves it."""
    path = folder / name
    with path.open("rb+") as file:
        file.truncate(int(cut * path.stat().st_size))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["index", "level0", "level1", "level2"]),
    cut=st.floats(0, 1),
    unfinished=st.integers(0, 2),
    order=st.permutations(list(IMAGES)),
)
def test_what_a_kill_cuts_off_drops_whole_images_only(tmp_path, name, cut, unfinished, order):
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    images = {digest: IMAGES[digest] for digest in order}
    cache = FeatureCache(folder, "one")
    written = fill(cache, images)
    if unfinished:  # written, and killed before the commit
        cache.write(maps(unfinished, 99), expected_rows=9)
    damage(folder, name, cut)
    again = FeatureCache(folder, "one")
    kept = list(again.images)
    assert kept == list(images)[: len(kept)]
    assert {digest: len(rows) for digest, rows in again.images.items()} == {digest: images[digest] for digest in kept}
    for digest in kept:
        assert_equal(again.read(again.images[digest]), written[digest])
    # What was lost is written anew, in another order, behind what was kept.
    for digest in sorted(set(images) - set(kept)):
        again.write(written[digest], expected_rows=7)
        again.commit(digest, images[digest], None)
    for cached in (again, FeatureCache(folder, "one")):
        assert set(cached.images) == set(images)
        for digest, rows in cached.images.items():
            assert_equal(cached.read(rows), written[digest])


def test_killed_before_the_first_row(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, "one")
    monkeypatch.setattr(FeatureCache, "_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.write(maps(1), expected_rows=1)
    monkeypatch.undo()
    again = FeatureCache(tmp_path, "one")
    assert again.images == {}
    written = fill(again, IMAGES)
    assert_equal(again.read(again.images["c"]), written["c"])


def test_another_identity_starts_empty(tmp_path):
    fill(FeatureCache(tmp_path, "one"), IMAGES)
    other = FeatureCache(tmp_path, "two")
    assert (other.images, other.records, other.levels, other.row_bytes) == ({}, {}, 0, 0)
    assert not list(tmp_path.glob("level*"))
    deeper = np.ones((1, 7, 3, 3), np.float32)
    other.write([deeper], expected_rows=1)
    other.commit("a", 1, None)
    assert_equal(FeatureCache(tmp_path, "two").read([0]), [deeper])
    assert FeatureCache(tmp_path, "one").images == {}


def test_what_does_not_fit_on_the_disk_is_told_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 3_400_000))
    cache = FeatureCache(tmp_path, "one")
    level = np.zeros((4, 250, 10, 10), np.float32)  # 0.1 MB a row
    with pytest.raises(FlawmapError, match=r"take 12 MB but .* has 3 MB left") as caught:
        cache.write([level], expected_rows=120)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob("level*"))
    roomy = FeatureCache(tmp_path, "one")
    roomy.write([level], expected_rows=30)
    roomy.commit("a", 4, None)
    assert_equal(roomy.read(range(4)), [level])


def test_records_are_kept_as_json(tmp_path):
    cache = FeatureCache(tmp_path, "one")
    cache.write(maps(1), expected_rows=1)
    record = {"size": [40, 30], "quality": None, "statistics": [0.1, 1e-9], "name": "Prüfung\n1"}
    cache.commit("a", 1, record)
    assert FeatureCache(tmp_path, "one").records == {"a": record}
    assert json.loads((tmp_path / "index").read_text())[:3] == ["a", 1, record]


def changed(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["level0", "level1", "level2", "index"])
@pytest.mark.parametrize("how", ["a bit", "zeroed"])
def test_what_was_changed_is_dropped_and_told(tmp_path, caplog, name, how):
    written = fill(FeatureCache(tmp_path, "one"), IMAGES)
    path = tmp_path / name
    size = path.stat().st_size
    if how == "a bit":
        changed(path, size // 2)
    else:
        path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))
    again = FeatureCache(tmp_path, "one")
    kept = list(again.images)
    assert kept == list(IMAGES)[: len(kept)]
    assert 0 < len(kept) < len(IMAGES)
    for digest in kept:
        assert_equal(again.read(again.images[digest]), written[digest])
    if name != "index" or how == "a bit":
        assert f"{tmp_path}: the features from image {len(kept) + 1} on are damaged" in caplog.text
    caplog.clear()
    assert FeatureCache(tmp_path, "one").images == again.images
    assert caplog.text == ""


@pytest.mark.parametrize(
    "layout",
    [
        b"",
        b"[]",
        b"{}",
        b'[[[3], "float32"]]',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"levels": [[[1e99], "float32"]], "sum": ""}',
    ],
)
def test_a_damaged_layout_starts_empty(tmp_path, layout, caplog):
    fill(FeatureCache(tmp_path, "one"), IMAGES)
    (tmp_path / "layout").write_bytes(layout)
    again = FeatureCache(tmp_path, "one")
    assert again.images == {}
    assert "the layout of the features is damaged" in caplog.text
    written = fill(again, {"c": 2})
    assert_equal(FeatureCache(tmp_path, "one").read([0, 1]), written["c"])


def test_a_missing_layout_starts_empty(tmp_path):
    fill(FeatureCache(tmp_path, "one"), IMAGES)
    (tmp_path / "layout").unlink()
    again = FeatureCache(tmp_path, "one")
    written = fill(again, {"c": 2})
    assert_equal(FeatureCache(tmp_path, "one").read([0, 1]), written["c"])


def test_of_images_committed_together_a_part_does_not_count(tmp_path):
    cache = FeatureCache(tmp_path, "one")
    fill(cache, {"a": 1})
    cache.write(maps(3), expected_rows=4)
    cache.commit_all([("b", 1, None), ("c", 2, None)])
    lines = (tmp_path / "index").read_bytes().splitlines(keepends=True)
    (tmp_path / "index").write_bytes(b"".join(lines[:2]))
    assert list(FeatureCache(tmp_path, "one").images) == ["a"]
