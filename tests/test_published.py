"""The layouts of published data sets, each drawn small, and the names that people give their folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawmap.datasets import Dataset, find_dataset
from flawmap.errors import FlawmapError
from flawmap.imaging.masks import read_mask

RNG = np.random.default_rng(2)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(60, 200, (16, 24, 3), np.uint8)).save(path)


def mask(path: Path, *values: int) -> None:
    """Marks one pixel with each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((16, 24), np.uint8)
    pixels[3, : len(values)] = values
    Image.fromarray(pixels).save(path)


def pictures(root: Path, *names: str) -> None:
    for name in names:
        picture(root / name)


def masks(root: Path, *names: str, value: int = 255) -> None:
    for name in names:
        mask(root / name, value)


def numbered(folder: str, count: int, ending: str = ".png", start: int = 0) -> list[str]:
    return [f"{folder}/{start + number:03}{ending}" for number in range(count)]


def names(dataset: Dataset, root: Path) -> tuple[set[str], set[str], dict[str, tuple[str, str | None]]]:
    """Training images, good test images, and of each defective one its kind and mask."""
    train = {sample.path.relative_to(root).as_posix() for sample in dataset.train}
    good = {sample.path.relative_to(root).as_posix() for sample in dataset.good_test}
    defects = {
        sample.path.relative_to(root).as_posix(): (
            sample.kind,
            sample.mask.relative_to(root).as_posix() if sample.mask else None,
        )
        for sample in dataset.defect_test
    }
    assert all(sample.label == 0 for sample in dataset.train)
    return train, good, defects


def check_masks(dataset: Dataset) -> None:
    for sample in dataset.defect_test:
        assert sample.mask is not None
        assert read_mask(sample.mask, (16, 24)).any()


def test_kolektor_sdd(tmp_path: Path) -> None:
    root = tmp_path / "KolektorSDD"
    for folder in ("kos01", "kos02", "kos10"):
        for part in range(4):
            picture(root / folder / f"Part{part}.jpg")
            mask(root / folder / f"Part{part}_label.bmp", 255 if part == 2 else 0)
    dataset = find_dataset(root)
    train, good, defects = names(dataset, root)
    assert len(train | good) == 9
    assert len(good) == 1
    assert not any("label" in name for name in train | good)
    assert defects == {f"{kos}/Part2.jpg": ("defect", f"{kos}/Part2_label.bmp") for kos in ("kos01", "kos02", "kos10")}
    check_masks(dataset)


def test_kolektor_sdd_2(tmp_path: Path) -> None:
    for split, start in (("train", 10_000), ("test", 20_000)):
        for number in range(start, start + 4):
            picture(tmp_path / split / f"{number}.png")
            mask(tmp_path / split / f"{number}_GT.png", 255 * (number % 4 == 3))
    dataset = find_dataset(tmp_path)
    train, good, defects = names(dataset, tmp_path)
    assert train == {f"train/{number}.png" for number in (10_000, 10_001, 10_002)}
    assert good == {f"test/{number}.png" for number in (20_000, 20_001, 20_002)}
    assert defects == {"test/20003.png": ("defect", "test/20003_GT.png")}
    assert any(f"train split are left out: {tmp_path / 'train' / '10003.png'}" in note for note in dataset.notes)


def test_dagm_2007(tmp_path: Path) -> None:
    for name in ("Class1", "Class2"):
        root = tmp_path / name
        pictures(root, *numbered("Train", 4, ".PNG"), *numbered("Test", 3, ".PNG", 8))
        masks(root, "Train/Label/001_label.PNG", "Test/Label/009_label.PNG")
        (root / "Train" / "Label" / "Labels.txt").write_text("1\n0 000.PNG 0 0 0\n")
    with pytest.raises(FlawmapError, match="choose one category of: Class1, Class2"):
        find_dataset(tmp_path)
    dataset = find_dataset(tmp_path, "Class2")
    train, good, defects = names(dataset, tmp_path / "Class2")
    assert train == {"Train/000.PNG", "Train/002.PNG", "Train/003.PNG"}
    assert good == {"Test/008.PNG", "Test/010.PNG"}
    assert defects == {"Test/009.PNG": ("defect", "Test/Label/009_label.PNG")}
    assert find_dataset(tmp_path / "Class2").samples == dataset.samples
    assert "1 file is passed over, being no image by name: .txt 1" in dataset.notes


def test_btad(tmp_path: Path) -> None:
    root = tmp_path / "01"
    pictures(root, *numbered("train/ok", 3, ".bmp"), *numbered("test/ok", 2, ".bmp"), *numbered("test/ko", 2, ".bmp"))
    masks(root, *numbered("ground_truth/ko", 2))
    dataset = find_dataset(tmp_path, "01")
    train, good, defects = names(dataset, root)
    assert (len(train), len(good)) == (3, 2)
    assert defects == {f"test/ko/00{i}.bmp": ("ko", f"ground_truth/ko/00{i}.png") for i in range(2)}
    assert not dataset.notes


def test_mpdd(tmp_path: Path) -> None:
    root = tmp_path / "bracket_black"
    pictures(root, *numbered("train/good", 3), *numbered("test/good", 2), *numbered("test/hole", 2))
    masks(root, *numbered("ground_truth/hole", 2, "_mask.png"))
    _, _, defects = names(find_dataset(root), root)
    assert defects == {f"test/hole/00{i}.png": ("hole", f"ground_truth/hole/00{i}_mask.png") for i in range(2)}


def visa(root: Path) -> Path:
    candle = root / "candle"
    pictures(candle, *numbered("Data/Images/Normal", 10, ".JPG"), *numbered("Data/Images/Anomaly", 2, ".JPG"))
    masks(candle, *numbered("Data/Masks/Anomaly", 2), value=3)
    lines = [f"candle/Data/Images/Normal/{i:03}.JPG,normal," for i in range(10)]
    lines += [
        f'candle/Data/Images/Anomaly/{i:03}.JPG,"chunk of wax missing,melded",candle/Data/Masks/Anomaly/{i:03}.png'
        for i in range(2)
    ]
    (candle / "image_anno.csv").write_text("\n".join(["image,label,mask", *lines]))
    return candle


def test_visa_as_published(tmp_path: Path) -> None:
    candle = visa(tmp_path)
    dataset = find_dataset(candle)
    train, good, defects = names(dataset, candle)
    assert (len(train), len(good)) == (8, 2)
    assert defects == {
        f"Data/Images/Anomaly/{i:03}.JPG": ("anomaly", f"Data/Masks/Anomaly/{i:03}.png") for i in range(2)
    }
    check_masks(dataset)
    assert find_dataset(tmp_path, "candle").samples == dataset.samples
    listed = find_dataset(candle / "image_anno.csv")
    assert (len(listed.train), len(listed.good_test), len(listed.defect_test)) == (8, 2, 2)
    assert {sample.kind for sample in listed.defect_test} == {"chunk of wax missing,melded"}
    check_masks(listed)


def test_visa_by_its_tables_of_splits(tmp_path: Path) -> None:
    visa(tmp_path)
    folder = "candle/Data/Images"
    rows = [f"candle,{'test' if i > 7 else 'train'},normal,{folder}/Normal/{i:03}.JPG," for i in range(10)]
    rows += [f"candle,test,anomaly,{folder}/Anomaly/{i:03}.JPG,candle/Data/Masks/Anomaly/{i:03}.png" for i in range(2)]
    picture(tmp_path / "pcb1/Data/Images/Normal/000.JPG")
    rows.append("pcb1,train,normal,pcb1/Data/Images/Normal/000.JPG,")
    (tmp_path / "split_csv").mkdir()
    table = tmp_path / "split_csv" / "1cls.csv"
    table.write_text("\n".join(["object,split,label,image,mask", *rows]))
    for dataset in (find_dataset(table, "candle"), find_dataset(tmp_path, "candle")):
        assert {sample.path.stem for sample in dataset.good_test} == {"008", "009"}
        assert (len(dataset.train), len(dataset.defect_test)) == (8, 2)
        check_masks(dataset)
    with pytest.raises(FlawmapError, match="choose one category of: candle, pcb1"):
        find_dataset(table)
    few = tmp_path / "split_csv" / "2cls_fewshot.csv"
    few.write_text(
        "\n".join(["object,split,label,image,mask", *rows]).replace("candle,test,anomaly", "candle,train,anomaly", 1)
    )
    dataset = find_dataset(few, "candle")
    assert (len(dataset.train), len(dataset.defect_test)) == (8, 1)
    assert any("defective images of the train split are left out" in note for note in dataset.notes)


def test_mvtec_ad_2(tmp_path: Path) -> None:
    root = tmp_path / "can"
    pictures(root, *numbered("train/good", 3, "_regular.png"), *numbered("validation/good", 2, "_regular.png"))
    pictures(
        root, *numbered("test_public/good", 2, "_regular.png"), *numbered("test_public/bad", 2, "_overexposed.png")
    )
    masks(root, *numbered("test_public/ground_truth/bad", 2, "_overexposed_mask.png"))
    pictures(root, *numbered("test_private", 2, "_regular.png"), *numbered("test_private_mixed", 2, "_mixed.png"))
    dataset = find_dataset(root)
    train, good, defects = names(dataset, root)
    assert train == set(numbered("train/good", 3, "_regular.png"))
    assert good == set(numbered("test_public/good", 2, "_regular.png"))
    assert defects == {
        f"test_public/bad/00{i}_overexposed.png": (
            "bad",
            f"test_public/ground_truth/bad/00{i}_overexposed_mask.png",
        )
        for i in range(2)
    }
    assert [note.partition(" is left out")[0] for note in dataset.notes] == [
        str(root / name) for name in ("test_private", "test_private_mixed", "validation")
    ]


def test_mvtec_loco_has_several_masks_of_one_image(tmp_path: Path) -> None:
    pictures(tmp_path, *numbered("train/good", 3), *numbered("validation/good", 2), *numbered("test/good", 2))
    kinds = ("logical_anomalies", "structural_anomalies")
    for kind in kinds:
        pictures(tmp_path, *numbered(f"test/{kind}", 2))
        mask(tmp_path / "ground_truth" / kind / "000" / "000.png", 255)
        mask(tmp_path / "ground_truth" / kind / "001" / "000.png", 0, 254)
        mask(tmp_path / "ground_truth" / kind / "001" / "001.png", 255)
    dataset = find_dataset(tmp_path)
    train, good, defects = names(dataset, tmp_path)
    assert (len(train), len(good)) == (3, 2)
    assert defects == {
        f"test/{kind}/{stem}.png": (kind, f"ground_truth/{kind}/{stem}") for kind in kinds for stem in ("000", "001")
    }
    for sample in dataset.defect_test:
        assert sample.mask is not None
        assert read_mask(sample.mask, (16, 24)).sum() == (1 if sample.path.stem == "000" else 2)


def test_magnetic_tiles(tmp_path: Path) -> None:
    for kind in ("MT_Blowhole", "MT_Crack", "MT_Free"):
        for number in range(3):
            picture(tmp_path / kind / "Imgs" / f"exp1_num_{number}.jpg")
            mask(tmp_path / kind / "Imgs" / f"exp1_num_{number}.png", 0 if kind == "MT_Free" else 255)
    dataset = find_dataset(tmp_path)
    train, good, defects = names(dataset, tmp_path)
    assert train | good == {f"MT_Free/Imgs/exp1_num_{number}.jpg" for number in range(3)}
    assert len(good) == 1
    assert defects == {
        f"MT_{kind.title()}/Imgs/exp1_num_{n}.jpg": (kind, f"MT_{kind.title()}/Imgs/exp1_num_{n}.png")
        for kind in ("blowhole", "crack")
        for n in range(3)
    }
    check_masks(dataset)


# --- the names that people give


@pytest.mark.parametrize("folder", ["mask", "Masks", "Label", "labels", "gt", "GT", "ground_truth", "GroundTruth"])
@pytest.mark.parametrize(("good", "bad"), [("good", "NG"), ("OK", "ko"), ("Normal", "Abnormal")])
def test_good_bad_and_mask_folders_of_many_names(tmp_path: Path, folder: str, good: str, bad: str) -> None:
    pictures(tmp_path, *numbered(good, 6), *numbered(f"{bad}/crack", 2))
    masks(tmp_path, *numbered(f"{folder}/crack", 2))
    dataset = find_dataset(tmp_path)
    train, held, defects = names(dataset, tmp_path)
    assert (len(train), len(held)) == (5, 1)
    assert defects == {f"{bad}/crack/00{i}.png": ("crack", f"{folder}/crack/00{i}.png") for i in range(2)}
    assert len(dataset.notes) == 1  # on what is held out


@pytest.mark.parametrize("folder", ["Label", "labels", "mask", "gt"])
@pytest.mark.parametrize("within", ["", "images/"])
def test_a_folder_of_masks_beside_images_is_not_learnt(tmp_path: Path, folder: str, within: str) -> None:
    pictures(tmp_path, *(f"{within}{number:03}.png" for number in range(6)))
    masks(tmp_path, f"{folder}/004.png")
    mask(tmp_path / folder / "005.png", 0)
    dataset = find_dataset(tmp_path)
    train, held, defects = names(dataset, tmp_path)
    assert train | held == {f"{within}00{number}.png" for number in (0, 1, 2, 3, 5)}
    assert defects == {f"{within}004.png": ("defect", f"{folder}/004.png")}


@pytest.mark.parametrize("ending", ["_label", "_mask", "_GT", "_gt", "_Mask", "-mask"])
def test_a_mask_beside_its_image_is_not_learnt(tmp_path: Path, ending: str) -> None:
    for root in (tmp_path / "plain", tmp_path / "split" / "train" / "good"):
        pictures(root, "0.png", "1.png", "2.jpg", "3.png")
        mask(root / f"1{ending}.png", 0)
        mask(root / f"2{ending}.png", 255)
    dataset = find_dataset(tmp_path / "plain")
    train, held, defects = names(dataset, tmp_path / "plain")
    assert train | held == {"0.png", "1.png", "3.png"}
    assert defects == {"2.jpg": ("defect", f"2{ending}.png")}
    dataset = find_dataset(tmp_path / "split")
    assert {sample.path.name for sample in dataset.train} == {"0.png", "1.png", "3.png"}
    assert any("whose masks mark defects are left out" in note for note in dataset.notes)


def test_an_image_named_as_a_mask_of_no_other_is_an_image(tmp_path: Path) -> None:
    pictures(tmp_path, "0.png", "shipping_label.png")
    assert len(find_dataset(tmp_path).train) == 2


def test_masks_in_the_folders_of_defects(tmp_path: Path) -> None:
    pictures(tmp_path, *numbered("good", 3), "bad/dent/0.png", "bad/hole/1.png")
    masks(tmp_path, "bad/dent/0_mask.png", "bad/hole/label/1.png")
    _, _, defects = names(find_dataset(tmp_path), tmp_path)
    assert defects == {
        "bad/dent/0.png": ("dent", "bad/dent/0_mask.png"),
        "bad/hole/1.png": ("hole", "bad/hole/label/1.png"),
    }


def test_split_folders_in_any_case(tmp_path: Path) -> None:
    pictures(tmp_path, *numbered("Train/Good", 3), *numbered("TEST/OK", 2), *numbered("TEST/NG", 2))
    masks(tmp_path, *numbered("Masks/ng", 2))
    train, good, defects = names(find_dataset(tmp_path), tmp_path)
    assert (len(train), len(good), len(defects)) == (3, 2, 2)
    assert {found for _, found in defects.values()} == set(numbered("Masks/ng", 2))


@pytest.mark.parametrize(
    "arrangement",
    [
        {"pictures": ["000.png", "001.png"], "masks": ["mask/part.png"]},
        {"pictures": ["a/000.png", "abnormal/001.png"], "masks": []},
        {"pictures": ["train/000.png", "test/001.png"], "masks": []},
        {"pictures": ["000.png", "NG/001.png"], "masks": ["mask/001.png"]},
        {"pictures": ["000.png", "001.png"], "masks": ["mask/000.png", "mask/001.png"]},
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, arrangement: Mapping[str, list[str]]) -> None:
    pictures(tmp_path, *arrangement["pictures"])
    masks(tmp_path, *arrangement["masks"])
    with pytest.raises(FlawmapError, match=r"; (give|name|put) ") as error:
        find_dataset(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


# --- what is odd about masks


def test_notes_on_masks(tmp_path: Path) -> None:
    pictures(tmp_path, *numbered("train/good", 2), *numbered("test/dent", 4))
    mask(tmp_path / "ground_truth/dent/000.png", 255, 255)
    mask(tmp_path / "ground_truth/dent/001.png", 85, 170, 255)
    mask(tmp_path / "ground_truth/dent/002.png", *range(1, 9))
    mask(tmp_path / "ground_truth/dent/003.png", 0)
    truth = tmp_path / "ground_truth" / "dent"
    assert find_dataset(tmp_path).notes == (
        f"the mask is all black, no pixel marked, for the defective {tmp_path / 'test' / 'dent' / '003.png'}",
        f"2 masks hold several values besides 0, all of which mark defects: 85, 170, 255 in {truth / '001.png'}",
    )
    (truth / "001.png").write_bytes(b"")  # whoever reads it for its pixels refuses it
    assert (
        "1 mask holds several values besides 0, all of which mark defects: 1, 2, 3, 4, 5 and 3 more in"
        in (find_dataset(tmp_path).notes[1])
    )


def test_a_mask_that_tells_good_from_bad_and_cannot_be_read_leaves_its_image_out(tmp_path: Path) -> None:
    pictures(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "1_label.png").write_bytes(b"")
    mask(tmp_path / "2_label.png", 0)
    dataset = find_dataset(tmp_path)
    assert {sample.path.name for sample in dataset.train} == {"0.png", "2.png"}
    assert any(f"{tmp_path / '1.png'} is left out" in note and "is empty" in note for note in dataset.notes)


def test_folders_of_file_servers_are_hidden(tmp_path: Path) -> None:
    pictures(tmp_path, *numbered("train/good", 2), "train/good/@eaDir/000.png/SYNO.jpg", "train/good/.thumbnails/0.png")
    pictures(tmp_path, "@eaDir/0.png", "__MACOSX/train/good/000.png", "#recycle/0.png")
    (tmp_path / "train" / "good" / "Thumbs.db").write_bytes(b"x")
    dataset = find_dataset(tmp_path)
    assert len(dataset.train) == 2
    assert not dataset.notes


@pytest.mark.parametrize("given", [None, 3, ["a"], np.zeros((4, 4))])
def test_data_that_is_no_path(given: object) -> None:
    with pytest.raises(FlawmapError, match=r"got a \w+ as data; give the path"):
        find_dataset(given)  # type: ignore[arg-type]
