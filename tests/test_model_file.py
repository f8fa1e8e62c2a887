import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flawmap import Detector, FlawmapError
from flawmap.model_file import read_model, write_model

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7), "empty": torch.zeros(0, 4)}
METADATA = {"method": "toy", "list": [1, 2.5, None], "text": "µ"}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.safetensors"
    write_model(path, TENSORS, METADATA)
    return path


def refused(path, match):
    with pytest.raises(FlawmapError, match=match) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_was_written_is_read(small):
    tensors, metadata, digest = read_model(small)
    assert metadata == {**METADATA, "format": 3}
    assert digest == write_model(small, TENSORS, METADATA) != write_model(small, TENSORS, {})
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_equal_contents_give_equal_bytes(small, tmp_path):
    write_model(tmp_path / "again", dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "again").read_bytes() == small.read_bytes()


def test_it_is_a_plain_safetensors_file(small):
    with safe_open(small, "np") as file:
        assert list(file.metadata()) == ["flawmap"]
        np.testing.assert_array_equal(file.get_tensor("b"), TENSORS["b"])


def test_a_file_cut_off_anywhere_is_refused(small, tmp_path):
    whole = small.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        refused(cut, "train")
    cut.write_bytes(whole + b"\0")
    refused(cut, "train")


def test_any_changed_byte_is_noticed(small, tmp_path):
    whole = small.read_bytes()
    kept = read_model(small)[2]
    changed = tmp_path / "changed.safetensors"
    random = np.random.default_rng(0)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(random.integers(8))
        changed.write_bytes(flipped)
        try:
            tensors, metadata, digest = read_model(changed)
        except FlawmapError as error:
            line = str(error)
            assert "\n" not in line, position
            assert "train" in line, position
        else:  # a flip in the header's padding or spelling changes nothing that is read
            assert metadata == {**METADATA, "format": 3}, position
            assert digest == kept, position
            assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items()), position


def test_a_changed_or_cut_real_model_is_refused(model_file, tmp_path):
    whole = model_file.read_bytes()
    random = np.random.default_rng(1)
    bad = tmp_path / "bad.safetensors"
    for position in random.integers(0, len(whole), 12):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(random.integers(8))
        bad.write_bytes(flipped)
        with pytest.raises(FlawmapError, match=r"bad\.safetensors"):
            Detector.load(bad)
        bad.write_bytes(whole[:position])
        with pytest.raises(FlawmapError, match=r"bad\.safetensors"):
            Detector.load(bad)


def test_edited_metadata_is_noticed(model_file, tmp_path):
    with safe_open(model_file, "pt") as file:
        content = json.loads(file.metadata()["flawmap"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edited = tmp_path / "edited.safetensors"
    content["max_false_reject"] = 0.5
    save_file(tensors, edited, {"flawmap": json.dumps(content)})
    refused(edited, "changed after training")


def test_metadata_holds_no_time_and_no_path(model_file, drawn):
    with safe_open(model_file, "pt") as file:
        text = file.metadata()["flawmap"]
    assert str(drawn) not in text
    assert drawn.name not in text
    assert not {"time", "date", "path", "duration", "milliseconds"} & set(json.loads(text))


@pytest.mark.parametrize("version", [2, 4])
def test_another_format_is_named(tmp_path, version):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other, {"flawmap": json.dumps({"format": version, "digest": ""})})
    refused(other, f"format {version}.*reads 3: upgrade flawmap, or train again")


@pytest.mark.parametrize("metadata", [None, {}, {"other": "1"}, {"flawmap": "{"}, {"flawmap": "[]"}, {"flawmap": "3"}])
def test_other_safetensors_files_are_no_models(tmp_path, metadata):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other, metadata)
    refused(other, "is not a flawmap model")


def test_empty_missing_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty", "train")
    refused(tmp_path / "missing", "does not exist")
    refused(tmp_path, "does not exist|is a folder")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickled.pth")
    refused(tmp_path / "pickled.pth", "train")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(small, monkeypatch):
    before = small.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlawmapError, match="the disk is full") as caught:
        write_model(small, {"a": torch.zeros(9)}, METADATA)
    assert "\n" not in str(caught.value)
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(small, monkeypatch):
    before = small.read_bytes()

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(small, {"a": torch.zeros(9)}, METADATA)
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FlawmapError, match="does not exist; create it first"):
        write_model(tmp_path / "missing" / "m.safetensors", TENSORS, METADATA)


def test_metadata_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_model(tmp_path / "m.safetensors", TENSORS, {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_an_unknown_method_is_named(model_file, tmp_path):
    tensors, metadata, _ = read_model(model_file)
    write_model(tmp_path / "m.safetensors", tensors, {**metadata, "method": "tomorrow"})
    with pytest.raises(FlawmapError, match="method tomorrow, which is not known"):
        Detector.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", ["missing tensor", "further tensor", "shape", "missing key", "wrong type"])
def test_a_well_signed_model_that_does_not_fit_is_refused(model_file, tmp_path, change):
    tensors, metadata, _ = read_model(model_file)
    if change == "missing tensor":
        del tensors["bank.index"]
    elif change == "further tensor":
        tensors["bank.more"] = torch.zeros(1)
    elif change == "shape":
        tensors["bank.index"] = tensors["bank.index"][:, :-1]
    elif change == "missing key":
        del metadata["calibration"]
    else:
        metadata["calibration"] = 5
    write_model(tmp_path / "m.safetensors", tensors, metadata)
    with pytest.raises(FlawmapError, match=r"m\.safetensors does not fit") as caught:
        Detector.load(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)
