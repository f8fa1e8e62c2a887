"""Images that are sent to be trained on: no name is a path, and an archive unpacks to no more than it may."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sqlalchemy")

from flawmap.errors import FlawmapError
from flawmap.service.training import Collections


def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def collections(tmp_path):
    return Collections(tmp_path / "kept", max_image=100_000)


def sent(collections, content: bytes, name: str):
    collection = collections.new()
    part = collections.part(collection)
    part.write_bytes(content)
    return collection, collections.add(collection, part, name)


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("name", ["../../../evil.png", "/etc/evil.png", "..\\evil.png", "a\0b.png", "x" * 5000])
def test_a_name_is_no_path(collections, name):
    collection, (added, refused) = sent(collections, png(), name)
    assert (added, refused) == (1, [])
    assert [path.name for path in collections.images(collection).iterdir()] == ["00001.png"]


def test_an_archive_keeps_its_images_whatever_they_are_called(collections, tmp_path):
    members = {
        "../../up.png": png(),
        "/root.jpg": png(9),
        "a/__MACOSX/._a.png": b"x",
        "readme.txt": b"x",
        "no.png": b"x",
    }
    collection, (added, refused) = sent(collections, archive(members), "good.zip")
    assert added == 2
    assert len(refused) == 1
    assert refused[0].startswith("no.png")
    assert sorted(path.name for path in collections.images(collection).iterdir()) == ["00001.png", "00002.jpg"]
    assert {path.name for path in tmp_path.rglob("*.*")} >= {"00001.png"}
    assert not list(tmp_path.rglob("up.png"))


def test_what_unpacks_to_too_much_is_left_out(collections):
    collection, (added, refused) = sent(
        collections, archive({"bomb.png": bytes(50_000_000), "one.png": png()}), "a.zip"
    )
    assert added == collections.count(collection) == 1
    assert refused == ["bomb.png: more than 0 MB"]


def test_a_damaged_archive_and_a_forged_collection_are_refused_in_words(collections):
    content = bytearray(archive({"one.png": png(40)}))
    content[60:90] = bytes(30)
    with pytest.raises(FlawmapError, match="archive is damaged"):
        sent(collections, bytes(content), "a.zip")
    for name in ("../kept", "", "0" * 16):
        with pytest.raises(FlawmapError, match="send them again"):
            collections.images(name)
