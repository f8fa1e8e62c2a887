"""flawmap.datasets: every layout, made in a temporary folder, and the two real sets beside the checkout."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawmap.datasets import Dataset, Sample, find_dataset
from flawmap.errors import FlawmapError

DATA = Path(__file__).parents[2] / "shared" / "data"


def make(root: Path, *names: str, size: tuple[int, int] = (4, 6)) -> Path:
    """Small pictures at these names below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros(size, np.uint8)
        pixels[1, 2] = 255  # as a mask, it marks one pixel
        Image.fromarray(pixels).save(path)
    return root


def table(dataset: Dataset) -> list[tuple[str, str, int | None, str, str | None]]:
    """The samples as plain rows, paths relative to the root."""
    root = dataset.root if dataset.root.is_dir() else dataset.root.parent

    def relative(path: Path | None) -> str | None:
        return None if path is None else path.relative_to(root).as_posix()

    return [
        (str(relative(sample.path)), sample.split, sample.label, sample.kind, relative(sample.mask))
        for sample in dataset.samples
    ]


def refused(path: Path | str, pattern: str, category: str | None = None) -> None:
    with pytest.raises(FlawmapError, match=pattern) as error:
        find_dataset(path, category)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    assert ";" in str(error.value)  # the remedy


MVTEC = (
    "train/good/000.png",
    "train/good/001.png",
    "test/good/000.png",
    "test/crack/000.png",
    "test/crack/001.png",
    "test/dirt stain/größe.png",
    "ground_truth/crack/000_mask.png",
    "ground_truth/dirt stain/größe.png",
)


# --- MVTec AD


def test_mvtec_layout(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path / "bottle", *MVTEC))
    assert table(dataset) == [
        ("train/good/000.png", "train", 0, "good", None),
        ("train/good/001.png", "train", 0, "good", None),
        ("test/good/000.png", "test", 0, "good", None),
        ("test/crack/000.png", "test", 1, "crack", "ground_truth/crack/000_mask.png"),
        ("test/crack/001.png", "test", 1, "crack", None),
        ("test/dirt stain/größe.png", "test", 1, "dirt stain", "ground_truth/dirt stain/größe.png"),
    ]
    assert dataset.name == "bottle"
    assert [len(part) for part in (dataset.train, dataset.test, dataset.good_test, dataset.defect_test)] == [2, 4, 1, 3]
    missing = tmp_path / "bottle" / "test" / "crack" / "001.png"
    assert dataset.describe().splitlines() == [
        f"bottle: MVTec AD layout in {tmp_path / 'bottle'}",
        "train: 2 good",
        "test: 1 good, 3 defective (crack 2, dirt stain 1)",
        f"masks: 2 of 3 defective images; none for {missing}",
        "image size: height 4, width 6 pixels in 6 of 6 images looked at",
    ]


def test_mvtec_notes_what_is_left_out(tmp_path: Path) -> None:
    root = make(tmp_path, *MVTEC, "train/broken/0.png", "validation/good/0.png", "test/stray.png")
    make(root, "ground_truth/crack/007_mask.png", "ground_truth/good/000_mask.png")
    dataset = find_dataset(root)
    assert len(dataset.samples) == 6
    assert sorted(dataset.notes) == sorted(
        [
            f"{root / 'train' / 'broken'} is left out",
            f"{root / 'validation'} is left out; --calibration {root / 'validation'} calibrates on its good images",
            f"images directly in {root / 'test'} are left out: {root / 'test' / 'stray.png'}",
            f"masks of no defective image are left out: {root / 'ground_truth' / 'crack' / '007_mask.png'}",
        ]
    )
    assert [line[6:] for line in dataset.describe().splitlines() if line.startswith("note: ")] == list(dataset.notes)


def test_mvtec_masks_of_the_same_name_stay_with_their_kind(tmp_path: Path) -> None:
    root = make(tmp_path, "train/good/0.png", "test/a/1.png", "test/b/1.png", "test/b/2.jpg")
    make(root, "ground_truth/b/1_mask.png", "ground_truth/b/2_mask.png", "ground_truth/b/2.png")
    masks = [row[4] for row in table(find_dataset(root)) if row[2] == 1]
    assert masks == [None, "ground_truth/b/1_mask.png", "ground_truth/b/2_mask.png"]


def test_mvtec_with_training_images_only(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path, "train/good/0.png"))
    assert len(dataset.train) == 1
    assert not dataset.test
    assert "test: none" in dataset.describe()
    assert "masks: none" in dataset.describe()


def test_categories(tmp_path: Path) -> None:
    for category in ("screw", "cable 2"):
        make(tmp_path / category, *MVTEC)
    make(tmp_path / "papers", "1.png")
    dataset = find_dataset(str(tmp_path), category="cable 2")
    assert dataset.name == "cable 2"
    assert dataset.samples == find_dataset(tmp_path / "cable 2").samples
    refused(tmp_path, r"holds several data sets; choose one category of: cable 2, screw$")
    refused(tmp_path, r"no category 'nut'; it has: cable 2, screw", "nut")
    refused(tmp_path, r"no category ''; it has: cable 2, screw", "")
    refused(tmp_path / "screw", r"one category itself; leave out", "screw")
    refused(tmp_path / "papers", r"no categories .*; leave out", "screw")


@pytest.mark.parametrize(("name", "counts"), [("mtd", (761, 191, 388)), ("cookie", (31, 14, 32))])
def test_real_sets(name: str, counts: tuple[int, int, int]) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"the real images of {name} are not beside this checkout")
    dataset = find_dataset(DATA, category=name)
    assert (len(dataset.train), len(dataset.good_test), len(dataset.defect_test)) == counts
    assert all(sample.mask and sample.mask.is_file() for sample in dataset.defect_test)
    assert all(sample.mask.stem == f"{sample.path.stem}_mask" for sample in dataset.defect_test if sample.mask)
    assert f"masks: {counts[2]} of {counts[2]} defective images" in dataset.describe()
    assert not dataset.notes


# --- good and bad folders


def test_good_and_bad_folders(tmp_path: Path) -> None:
    root = make(tmp_path, *(f"good/{index:02}.png" for index in range(12)))
    make(root, "bad/loose.png", "bad/crack/1.png", "bad/crack/2.png", "bad/hole/2.png", "bad/hole/deep/3.png")
    make(root, "masks/loose.png", "masks/1_mask.png", "masks/crack/2_mask.png", "masks/2.png", "masks/hole/deep/3.png")
    dataset = find_dataset(root)
    assert sorted(row for row in table(dataset) if row[2] == 1) == [
        ("bad/crack/1.png", "test", 1, "crack", "masks/1_mask.png"),
        ("bad/crack/2.png", "test", 1, "crack", "masks/crack/2_mask.png"),
        ("bad/hole/2.png", "test", 1, "hole", None),  # masks/2.png could be of either
        ("bad/hole/deep/3.png", "test", 1, "hole", "masks/hole/deep/3.png"),
        ("bad/loose.png", "test", 1, "bad", "masks/loose.png"),
    ]
    assert f"masks of no defective image are left out: {root / 'masks' / '2.png'}" in dataset.notes
    # A fifth of 12, the two smallest hashes.
    by_hash = sorted(
        (f"{index:02}.png" for index in range(12)), key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    assert {sample.path.name for sample in dataset.good_test} == set(by_hash[:2])
    assert {sample.path.name for sample in dataset.train} == set(by_hash[2:])
    assert "held out for testing: 2 of 12 good images, chosen by a hash of their names" in dataset.notes


def test_the_held_out_images_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    names = [f"good/größe {index}.png" for index in range(40)]
    first = find_dataset(make(tmp_path / "a", *names, "bad/1.png"))
    second = find_dataset(make(tmp_path / "somewhere" / "else", *reversed(names), "bad/9.png", "bad/10.png"))
    assert len(first.good_test) == 8
    assert [sample.path.name for sample in first.good_test] == [sample.path.name for sample in second.good_test]


@pytest.mark.parametrize(("good", "bad"), [("good", "bad"), ("OK", "NG"), ("normal", "Anomaly"), ("Good", "defect")])
def test_names_for_good_and_bad(tmp_path: Path, good: str, bad: str) -> None:
    root = make(tmp_path, *(f"{good}/{index}.jpg" for index in range(3)), f"{bad}/1.jpg")
    dataset = find_dataset(root)
    assert (len(dataset.train), len(dataset.good_test)) == (2, 1)
    assert [(sample.kind, sample.mask) for sample in dataset.defect_test] == [(bad.lower(), None)]


def test_good_folder_alone(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path, "good/1.png", "good/sub/2.png", "other/3.png", "4.png"))
    assert (len(dataset.train), len(dataset.test)) == (2, 0)
    assert dataset.notes == (
        f"{tmp_path / 'other'} is left out",
        f"images directly in {tmp_path} are left out: {tmp_path / '4.png'}",
    )


def test_one_good_image_is_kept_for_training(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path, "good/1.png", "bad/1.png"))
    assert (len(dataset.train), len(dataset.good_test), len(dataset.defect_test)) == (1, 0, 1)
    assert dataset.notes == ("held out for testing: none, as there is only one good image",)


def test_two_names_for_the_same_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "good/1.png", "ok/1.png")
    refused(tmp_path, "good and ok.*; keep one")


# --- CSV


def write_csv(root: Path, text: str, encoding: str = "utf-8") -> Path:
    path = root / "parts.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_csv(tmp_path: Path) -> None:
    make(tmp_path, "img/a 1.png", "img/b,2.png", "img/c.png", "img/größe.png", "m/c.png", "img/d.png", "img/e.png")
    path = write_csv(
        tmp_path,
        "Path,label,mask,split,operator\r\n"
        "img/a 1.png,good,,train,Ann\r\n"
        '"img/b,2.png",0,,test,Ann\r\n'
        "\r\n"
        "img\\c.png,crack,m/c.png,test,Ben\r\n"
        "img/größe.png,OK,,,\r\n"
        "img/d.png,1,,,\r\n"
        f"{tmp_path / 'img' / 'e.png'},dent,,train,\r\n",
        "utf-8-sig",
    )
    dataset = find_dataset(path)
    assert dataset.name == "parts"
    assert table(dataset) == [
        ("img/a 1.png", "train", 0, "good", None),
        ("img/b,2.png", "test", 0, "good", None),
        ("img/größe.png", "train", 0, "good", None),
        ("img/c.png", "test", 1, "crack", "m/c.png"),
        ("img/d.png", "test", 1, "1", None),
    ]
    assert dataset.notes == (f"defective images of the train split are left out: {tmp_path / 'img' / 'e.png'}",)


def test_csv_without_splits_holds_out_as_the_folders_do(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(10)]
    make(tmp_path, *names, "x.png")
    only_good = "path,label\n" + "".join(f"{name},good\n" for name in names)
    assert len(find_dataset(write_csv(tmp_path, only_good)).train) == 10
    dataset = find_dataset(write_csv(tmp_path, only_good + "x.png,scratch\n"))
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert {sample.path.name for sample in dataset.good_test} == set(by_hash[:2])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", r"parts\.csv, line 1: .*path,label"),
        ("path|label\na.png|good\n", r"parts\.csv, line 1: .*path\|label"),
        ("path;label\na.png;good;x\n", r"parts\.csv, line 2: more values than columns; .* semicolon in quotes"),
        ("file,label\na.png,good\n", r"parts\.csv, line 1: .*'file'"),
        ("path,label\n", r"lists no good images"),
        ("path,label\na.png,crack\n", r"lists no good images"),
        ("path,label\na.png,good\nno.png,good\n", r"parts\.csv, line 3: .*no\.png does not exist"),
        ("path,label\na.png,good\n,good\n", r"parts\.csv, line 3: the path is empty"),
        ("path,label\na.png,\n", r"parts\.csv, line 2: the label is empty"),
        ("path,label\na.png\n", r"parts\.csv, line 2: the label is empty"),
        ("path,label\na.png,good\n\na.png,bad\n", r"parts\.csv, line 4: a\.png is in line 2 already"),
        ("path,label\na.png,good,x\n", r"parts\.csv, line 2: more values than columns"),
        ("path,label,split\na.png,good,val\n", r"parts\.csv, line 2: the split is 'val'"),
        ("path,label,mask\na.png,bad,m.png\n", r"parts\.csv, line 2: .*m\.png does not exist"),
        ('path,label\n"a.png,good\n', r"parts\.csv, after line 1: is not CSV"),
        ("path,label\n" + "a" * 5000 + ",good\n", r"parts\.csv, line 2: .* does not exist"),
        ("path,label\n" + "a" * 200_000 + ",good\n", r"parts\.csv, after line 1: is not CSV"),
    ],
)
def test_faulty_csv(tmp_path: Path, text: str, pattern: str) -> None:
    make(tmp_path, "a.png")
    refused(write_csv(tmp_path, text), pattern)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["", "sep={}\r\n"])
def test_csv_as_spreadsheet_programs_write_it(tmp_path: Path, delimiter: str, encoding: str, first: str) -> None:
    make(tmp_path, "größe, a.png", "b;2.png", "c.png", "m.png")
    rows = [
        ("path", "label", "mask"),
        ('"größe, a.png"', "good", ""),
        ('"b;2.png"', "ok", ""),
        ("c.png", "dent", "m.png"),
    ]
    text = first.format(delimiter) + "".join(delimiter.join(row) + "\r\n" for row in rows)
    dataset = find_dataset(write_csv(tmp_path, text, encoding))
    assert sorted(sample.path.name for sample in dataset.samples) == ["b;2.png", "c.png", "größe, a.png"]
    assert [sample.mask for sample in dataset.defect_test] == [tmp_path / "m.png"]


def test_csv_of_several_objects(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.png")
    path = write_csv(tmp_path, "object,path,label\nnut,a.png,good\nbolt,b.png,good\n")
    assert [sample.path.name for sample in find_dataset(path, "bolt").samples] == ["b.png"]
    refused(path, "lists several data sets; choose one category of: bolt, nut")
    refused(path, "has no category 'screw'; it has: bolt, nut", "screw")
    refused(write_csv(tmp_path, "path,label\na.png,good\n"), "has no column object; leave out the category", "nut")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_table_that_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "parts.csv")
    refused(tmp_path / "parts.csv", "is a pipe, not a file; ")


def test_csv_that_is_not_utf_8(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    refused(write_csv(tmp_path, "path,label\na.png,größe\n", "latin-1"), "is not UTF-8; save the table as CSV UTF-8")


# --- plain folders, and what is no data set


def test_plain_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "Gute Teile", "1.png", "Montag/2.jpg", "Montag/früh/3.tif", ".hidden/4.png")
    (root / "Thumbs.db").write_bytes(b"x")
    dataset = find_dataset(root)
    assert table(dataset) == [
        ("1.png", "train", 0, "good", None),
        ("Montag/2.jpg", "train", 0, "good", None),
        ("Montag/früh/3.tif", "train", 0, "good", None),
    ]
    monkeypatch.chdir(root)
    here = find_dataset(".")
    assert here.name == "Gute Teile"
    assert here.samples[0] == Sample(Path("1.png"), "train", 0, "good")  # as given, not resolved


def test_sizes_are_those_after_orientation_and_unreadable_images_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "1.png", size=(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 50), np.uint8)).save(tmp_path / "2.jpg", exif=exif)
    (tmp_path / "3.png").write_bytes(b"")
    text = find_dataset(tmp_path).describe()
    assert "image size: height 30-50, width 20-40 pixels in 3 of 3 images looked at, 1 of them unreadable" in text


def test_what_is_no_data_set(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file or folder; check the path")
    refused(tmp_path / ("x" * 300), "no such file or folder; check the path")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no good images")
    make(tmp_path, "one.png")
    refused(tmp_path / "one.png", "is a single file; give the folder")
    (tmp_path / "mvtec" / "train" / "good").mkdir(parents=True)
    refused(tmp_path / "mvtec", "holds no good images")
    (tmp_path / "pair" / "good").mkdir(parents=True)
    make(tmp_path / "pair", "bad/1.png")
    refused(tmp_path / "pair", "holds no good images")


@pytest.mark.parametrize("name", ["bad/1.png", "test/crack/1.png", "a/NG/1.png", "train/1.png", "abnormal/1.png"])
def test_defects_are_not_taken_for_good(tmp_path: Path, name: str) -> None:
    make(tmp_path, "1.png", name)
    refused(tmp_path, "neither 'good' nor 'train/good'; name the folder of good images")


def test_a_kind_cannot_forge_a_line_of_the_description(tmp_path):
    kind = "scratch\nmasks: all of them"
    make(tmp_path / "d", "train/good/a.png", "train/good/b.png", f"test/{kind}/c.png")
    lines = find_dataset(tmp_path / "d").describe().splitlines()
    assert lines[2] == r"test: 0 good, 1 defective (scratch\nmasks: all of them 1)"
    assert sum(line.startswith("masks: ") for line in lines) == 1


def test_a_root_of_one_category_needs_no_choice(tmp_path):
    make(tmp_path / "root", "screw/train/good/a.png", "screw/train/good/b.png", "screw/test/good/c.png")
    assert find_dataset(tmp_path / "root").name == find_dataset(tmp_path / "root", "screw").name == "screw"
