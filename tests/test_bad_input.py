"""What a user can do wrong, or be given: the exit code, and one line that names the thing and the remedy."""

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from flawmap import Detector
from flawmap.datasets.drawn import draw_dataset
from flawmap.imaging.image_files import find_images
from flawmap.text import printable

SMALL = ("--image-size", 64, "--method", "padim", "--set", "channels=8", "--engine", "torch")


@pytest.fixture
def flawmap(flawmap):
    """Inspects in torch where no engine is named: the others take seconds to make, and read the same files."""

    def run(verb, *arguments):
        named = verb not in ("inspect", "evaluate") or "--engine" in arguments
        return flawmap(verb, *arguments, *(() if named else ("--engine", "torch")))

    return run


@pytest.fixture
def folder(tmp_path):
    """Six small good images."""
    good = tmp_path / "parts"
    good.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(90, 110, (64, 64, 3), dtype=np.uint8)).save(good / f"{number}.png")
    return good


def check_refused(result, *named):
    code, _, err = result
    progress = re.compile(r".* \.\.\.$|features of .* while training$|.*of memory at its highest$")
    lines = [line for line in err.splitlines() if not progress.match(line)]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for name in named:
        assert str(name) in lines[0]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A small data set in the MVTec layout: 8 good training images, 3 good and 4 defective test images."""
    root = tmp_path_factory.mktemp("small") / "parts"
    draw_dataset(root, "screws", 0, train=8, good=3, per_defect=1, size=64)
    return root


@pytest.fixture(scope="module")
def small_model(parts):
    path = parts.parent / "parts.safetensors"
    Detector("padim", image_size=64, channels=8, engine="torch", max_false_reject=0.2).fit(parts).save(path)
    return path


@pytest.fixture
def data(parts, tmp_path):
    """A copy of `parts` to do damage to."""
    return Path(shutil.copytree(parts, tmp_path / "data"))


def test_a_missing_folder(flawmap, tmp_path):
    check_refused(flawmap("train", tmp_path / "nowhere", "-o", tmp_path / "m.safetensors"), tmp_path / "nowhere")


def test_an_empty_folder(flawmap, tmp_path):
    (tmp_path / "empty").mkdir()
    check_refused(flawmap("train", tmp_path / "empty", "-o", tmp_path / "m.safetensors"), tmp_path / "empty")


def test_no_good_images(flawmap, tmp_path, folder):
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "bad")
    (tmp_path / "set" / "good").mkdir()
    check_refused(flawmap("train", tmp_path / "set", "-o", tmp_path / "m.safetensors"), tmp_path / "set", "good")


def test_one_good_image(flawmap, tmp_path, folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    check_refused(flawmap("train", folder, "-o", tmp_path / "m.safetensors"), folder, "at least 2")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("calibration", ["crossfit", "holdout"])
@pytest.mark.parametrize("method", ["patchcore", "padim"])
def test_all_images_the_same(flawmap, tmp_path, folder, method, calibration):
    for path in sorted(folder.iterdir())[1:]:
        shutil.copy(folder / "0.png", path)
    result = flawmap(
        "train", folder, "-o", tmp_path / "m.safetensors", "--image-size", 64, "--method", method,
        "--calibration", calibration, "--engine", "torch",
    )  # fmt: skip
    check_refused(result, "show the same", "--calibration FOLDER")


def test_a_text_file_among_the_good_is_named_and_left_out(flawmap, tmp_path, folder):
    (folder / "3.png").write_text("not an image")
    arguments = ["train", folder, "-o", tmp_path / "m.safetensors", "--image-size", 64, "--engine", "torch"]
    code, out, err = flawmap(*arguments)
    assert code == 0
    warnings = [line for line in err.splitlines() if "3.png" in line]
    assert len(warnings) == 1
    assert "left out of training" in warnings[0]
    assert "wrote" in out
    (tmp_path / "m.safetensors").unlink()
    check_refused(flawmap(*arguments, "--strict"), folder / "3.png")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "nothing"], "nothing"),
        (["--backbone", "no_such_net"], "no_such_net"),
        (["--set", "colour=red"], "colour"),
        (["--set", "coreset=much"], "coreset=much"),
        (["--set", "coreset=2"], "coreset=2"),
        (["--set", "levels=blocks.77"], "blocks.77"),
        (["--set", "coreset"], "coreset"),
        (["--preset", "best"], "best"),
        (["--engine", "steam"], "steam"),
        (["--device", "abacus"], "abacus"),
        (["--image-size", "16"], "16"),
        (["--image-size", "big"], "big"),
        (["--max-false-reject", "0"], "0"),
        (["--max-false-reject", "1.5"], "1.5"),
        (["--max-false-reject", "nan"], "nan"),
        (["--max-false-reject", "few"], "few"),
        (["--guarantee", "eternal"], "eternal"),
        (["--calibration", "nowhere"], "nowhere"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--category", "bolts"], "leave out the category"),
        (["--colour", "red"], "--colour"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_taken(flawmap, tmp_path, folder, options, named):
    result = flawmap("train", folder, "-o", tmp_path / "m.safetensors", "--image-size", 64, *options)
    check_refused(result, named)
    assert not (tmp_path / "m.safetensors").exists()


def test_weights_that_cannot_be_had(flawmap, tmp_path, folder, monkeypatch):
    import socket

    def no_network(*arguments, **options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    result = flawmap("train", folder, "-o", tmp_path / "m.safetensors", "--backbone", "resnet18.a1_in1k")
    check_refused(result, "resnet18.a1_in1k", "--weights FILE")


def test_places_that_cannot_be_written(flawmap, tmp_path, folder):
    check_refused(flawmap("train", folder, "-o", tmp_path / "missing" / "m.safetensors"), tmp_path / "missing")
    check_refused(flawmap("train", folder, "-o", tmp_path), tmp_path)


def test_inspecting_without_a_model_or_an_image(flawmap, tmp_path, model_file, drawn):
    check_refused(flawmap("inspect", tmp_path / "no.safetensors", drawn / "test"), tmp_path / "no.safetensors")
    check_refused(flawmap("inspect", model_file, tmp_path / "no.png"), tmp_path / "no.png")
    (tmp_path / "empty").mkdir()
    check_refused(flawmap("inspect", model_file, tmp_path / "empty"), tmp_path / "empty")
    good = drawn / "test" / "good"
    check_refused(flawmap("inspect", model_file, good, "--max-false-reject", "2"), "2")
    check_refused(flawmap("inspect", model_file, good, "--max-false-reject", "0.1", "--threshold", "3"), "--threshold")
    check_refused(flawmap("inspect", model_file, good, "--coco", tmp_path / "missing" / "c.json"), "missing")
    (tmp_path / "file").write_text("")
    check_refused(flawmap("inspect", model_file, good, "-o", tmp_path / "file"), tmp_path / "file")
    check_refused(flawmap("inspect", model_file, good, "--engine", "steam"), "steam")


def test_a_truncated_model(flawmap, tmp_path, model_file, drawn):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model_file.read_bytes()[:-1000])
    check_refused(flawmap("inspect", cut, drawn / "test"), cut)
    check_refused(flawmap("evaluate", cut, drawn), cut)


def test_evaluating_without_labels(flawmap, model_file, folder):
    code, _, err = flawmap("evaluate", model_file, folder)
    assert code == 2
    assert err.count("\n") == 1
    assert str(folder) in err


def test_no_arguments_at_all_show_what_there_is():
    done = subprocess.run([sys.executable, "-m", "flawmap"], capture_output=True, text=True, check=False)
    assert "train" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# Files in a folder of images


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def heic(part):
    buffer = io.BytesIO()
    pillow_heif.from_pillow(part).save(buffer, quality=95)
    return buffer.getvalue()


def claiming(width, height, extra=b""):
    """A PNG of a few bytes that claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(extra)) if extra else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + text + pixels + chunk(b"IEND", b"")


PART = "train/good/000.png"
# Each makes the content of a file from a good part, and has what must be said of it and what to do.
UNREADABLE = {
    "empty.png": (lambda part: b"", "is empty (0 bytes)", "copy it again"),
    "text.jpg": (lambda part: b"not an image", "is not a JPEG, PNG", "convert it"),
    "photoshop.png": (lambda part: b"8BPS\0\1" + bytes(100), "is not a JPEG, PNG", "convert it"),
    "truncated.png": (lambda part: saved(part, "PNG")[:-200], "cannot be decoded", "copy it again"),
    "truncated.jpg": (lambda part: saved(part, "JPEG")[:-200], "cannot be decoded", "copy it again"),
    "corrupt.tif": (lambda part: saved(part, "TIFF")[:8] + bytes(500), "cannot be decoded", "copy it again"),
    "corrupt.bmp": (lambda part: saved(part, "BMP")[:20] + b"\xff" * 500, "", ""),
    "animated.png": (
        lambda part: saved(part, "PNG", save_all=True, append_images=[part.rotate(90)]),
        "holds several pictures",
        "save each to its own file",
    ),
    "animated.webp": (
        lambda part: saved(part, "WEBP", save_all=True, append_images=[part.rotate(90)]),
        "holds several pictures",
        "save each to its own file",
    ),
    "pages.tif": (
        lambda part: saved(part, "TIFF", save_all=True, append_images=[part]),
        "holds several pictures",
        "save each to its own file",
    ),
    "float.tif": (lambda part: saved(part.convert("F"), "TIFF"), "floating-point", "save it as 8- or 16-bit"),
    "bomb.png": (lambda part: claiming(30_000, 30_000), "900000000 pixels, over the limit", "shrink it"),
    "widest.png": (lambda part: claiming(2**31 - 1, 2**31 - 1), "over the limit", "shrink it"),
    "text bomb.png": (lambda part: claiming(8, 8, bytes(30_000_000)), "cannot be decoded", "copy it again"),
}
READABLE = {
    "deep.png": lambda part: saved(Image.fromarray(np.asarray(part.convert("L")).astype(np.uint16) * 257), "PNG"),
    "cmyk.jpg": lambda part: saved(part.convert("CMYK"), "JPEG", quality=95),
    "palette.png": lambda part: saved(part.quantize(128), "PNG"),
    "really a png.jpg": lambda part: saved(part, "PNG"),
    "gif.png": lambda part: saved(part, "GIF"),
    "phone.heic": lambda part: heic(part),
    "without a suffix": lambda part: saved(part, "JPEG", quality=95),
    "größe 図 e\u0301.png": lambda part: saved(part, "PNG"),
}
UNFIT = {  # can be read, but show no part
    "pixel.png": lambda part: saved(part.resize((1, 1)), "PNG"),
    "huge.tif": lambda part: saved(Image.new("1", (9_500, 9_500)), "TIFF", compression="group4"),
}


def put(kinds, folder, part):
    for name, kind in kinds.items():
        (folder / name).write_bytes((kind[0] if isinstance(kind, tuple) else kind)(Image.open(part).convert("RGB")))


def check_told(lines, path, says, remedy):
    """One of the lines, and no other, names the file, says what is wrong and what to do."""
    told = [line for line in lines if str(path) in line]
    assert len(told) == 1, (path, told)
    assert says in told[0]
    assert remedy in told[0]


def test_inspecting_a_folder_of_everything(flawmap, small_model, parts, tmp_path):
    folder, output = tmp_path / "all", tmp_path / "heat"
    folder.mkdir()
    put({**UNREADABLE, **READABLE, **UNFIT}, folder, parts / PART)
    code, out, err = flawmap("inspect", small_model, folder, "-o", output, "--format", "csv")
    assert code == 3
    assert "Traceback" not in err
    verdicts = {line.split(",")[0]: line.split(",")[1] for line in out.splitlines()[1:]}
    assert len(verdicts) == len(UNREADABLE) + len(READABLE) + len(UNFIT)
    for name in READABLE:
        assert verdicts[str(folder / name)] in ("good", "defect"), name
    for name, (_, says, remedy) in UNREADABLE.items():
        assert verdicts[str(folder / name)] == "error", name
        check_told(err.splitlines(), folder / name, says, remedy)
    for name in UNFIT:
        assert verdicts[str(folder / name)] == "error", name
        check_told(err.splitlines(), folder / name, "good images", "check")
    assert err.splitlines()[1] == "{} good, {} defect, {} not judged".format(
        *(list(verdicts.values()).count(verdict) for verdict in ("good", "defect", "error"))
    )
    assert len(err.splitlines()) == 2 + len(UNREADABLE) + len(UNFIT)
    assert len(list(output.rglob("*_overlay.png"))) == len(READABLE)


@pytest.mark.parametrize("name", UNREADABLE)
def test_inspecting_nothing_but_one_bad_file(flawmap, small_model, parts, tmp_path, name):
    put({name: UNREADABLE[name]}, tmp_path, parts / PART)
    for options in ((), ("--strict",), ("--fail-on-defect",)):
        code, _, err = flawmap("inspect", small_model, tmp_path / name, "--engine", "torch", *options)
        assert code == 2
        check_told(err.splitlines(), tmp_path / name, *UNREADABLE[name][1:])


def test_training_on_a_folder_of_everything(flawmap, data, tmp_path):
    folder = data / "train" / "good"
    put({**UNREADABLE, **READABLE, **UNFIT}, folder, data / PART)
    output = tmp_path / "m.safetensors"
    code, _, err = flawmap("train", data, "-o", output, *SMALL)
    assert code == 0, err
    warned = [line for line in err.splitlines() if "left out of training" in line]
    assert len(warned) == len(UNREADABLE)
    for name, (_, says, remedy) in UNREADABLE.items():
        check_told(warned, folder / name, says, remedy)
    # The right name and the wrong suffix hold the same bytes, which are learnt once.
    assert Detector.load(output).training_["images"] == 8 + len(READABLE) + len(UNFIT)
    assert not (tmp_path / "m.safetensors.training").exists()


def test_evaluating_on_a_folder_of_everything(flawmap, small_model, data, tmp_path):
    folder = data / "test" / "good"
    put({**UNREADABLE, **READABLE, **UNFIT}, folder, data / PART)
    figures, page = tmp_path / "figures.json", tmp_path / "report.html"
    code, out, err = flawmap("evaluate", small_model, data, "--json", figures, "--html", page)
    assert code == 3, err
    for name, (_, says, remedy) in UNREADABLE.items():
        check_told(err.splitlines(), folder / name, says, remedy)
    heads = re.split(r"\s{2,}", next(line for line in out.splitlines() if line.startswith("kind ")))
    counts = next(line.split() for line in out.splitlines() if line.startswith("good "))
    found = dict(zip(heads, counts, strict=True))
    assert int(found["images"]) == 3 + len(READABLE) + len(UNFIT)
    assert (int(found["refused"]), int(found["not scored"])) == (len(UNFIT), len(UNREADABLE))
    assert figures.exists()
    assert page.exists()


def test_evaluating_where_nothing_can_be_judged(flawmap, small_model, data):
    for path in (data / "test").rglob("*.png"):
        path.write_bytes(b"")
    code, _, err = flawmap("evaluate", small_model, data, "--html", data / "report.html")
    assert code == 2
    assert "Traceback" not in err
    check_told(err.splitlines(), data / "test" / "good" / "000.png", "is empty", "copy it again")


def test_good_images_none_or_one_of_which_can_be_read(flawmap, tmp_path, folder):
    for left in (1, 0):
        for path in sorted(folder.iterdir())[left:]:
            path.write_bytes(b"")
        code, _, err = flawmap("train", folder, "-o", tmp_path / "m.safetensors", *SMALL)
        assert code == 2
        last = err.splitlines()[-1]
        assert f"only {left} of 6 good training images" in last
        assert str(folder) in last
        assert "at least 2" in last
        assert sorted(tmp_path.iterdir()) == [folder]


def test_files_that_may_not_be_read(flawmap, small_model, data, tmp_path, monkeypatch):
    forbidden = {data / "train" / "good" / "003.png", data / "test" / "good" / "001.png"}
    opened = os.open

    def guarded(path, *arguments, **options):
        if path in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", guarded)
    code, _, err = flawmap("train", data, "-o", tmp_path / "m.safetensors", *SMALL)
    assert code == 0
    check_told(err.splitlines(), data / "train" / "good" / "003.png", "ermission denied", "permissions")
    for verb, source in (("inspect", data / "test"), ("evaluate", data)):
        code, _, err = flawmap(verb, small_model, source)
        assert code == 3
        check_told(err.splitlines(), data / "test" / "good" / "001.png", "ermission denied", "permissions")


def test_duplicates_are_counted_once_and_told(flawmap, data, tmp_path):
    for number in range(3):
        shutil.copy(data / PART, data / "train" / "good" / f"copy {number}.png")
    output = tmp_path / "m.safetensors"
    code, out, _ = flawmap("train", data, "-o", output, *SMALL)
    assert code == 0
    assert "3 images show what another one shows" in out
    assert len(Detector.load(output).calibration_.scores) == 8
    code, out, _ = flawmap("inspect", output, data / PART, data / PART, "--format", "csv")
    assert code == 0
    assert out.count(str(data / PART)) == 2


def link(path, target, **options):
    try:
        path.symlink_to(target, **options)
    except OSError:
        pytest.skip("this user may not make links")


def test_links_in_a_circle(flawmap, small_model, data, tmp_path):
    good = data / "test" / "good"
    for folder in (good, data / "train" / "good"):
        link(folder / "up", data, target_is_directory=True)
        link(folder / "self", folder, target_is_directory=True)
        link(folder / "a.png", "b.png")
        link(folder / "b.png", "a.png")
        link(folder / "gone.png", "nowhere.png")
    code, out, err = flawmap("inspect", small_model, good, "--format", "csv")
    assert code == 3
    assert len(out.splitlines()) == 1 + 3 + 8 + 4 + 4 + 6  # header, good, training and defective ones, masks, links
    check_told(err.splitlines(), good / "a.png", "", "check the path")
    check_told(err.splitlines(), good / "gone.png", "does not exist", "check the path")
    code, _, err = flawmap("train", data, "-o", tmp_path / "m.safetensors", *SMALL)
    assert code == 0
    check_told(err.splitlines(), data / "train" / "good" / "a.png", "left out of training", "check the path")
    check_refused(flawmap("inspect", small_model, good / "a.png", "--engine", "steam"), good / "a.png")
    check_refused(flawmap("inspect", good / "a.png", good), good / "a.png")
    check_refused(flawmap("train", good / "a.png", "-o", tmp_path / "m.safetensors"), good / "a.png")


# Names


def test_names_of_any_script(flawmap, data, tmp_path):
    named = data.rename(tmp_path / "Teile größer als 図")
    model = tmp_path / "модель é.safetensors"
    code, out, err = flawmap("train", named, "-o", model, *SMALL)
    assert code == 0, err
    assert str(model) in out
    image = named / "test" / "good" / "\N{SNOWMAN} \u202e e\u0301.png"
    image.write_bytes((named / "test" / "good" / "000.png").read_bytes())
    code, out, err = flawmap("inspect", model, image, "-o", tmp_path / "видно")
    assert code == 0, err
    assert printable(image) in out  # what turns the direction of writing round is no letter
    assert len(list((tmp_path / "видно").glob("*.png"))) == 2
    assert flawmap("evaluate", model, named, "--html", tmp_path / "報告.html")[0] == 0
    image.write_bytes(b"")
    code, _, err = flawmap("inspect", model, image)
    assert code == 2
    check_told(err.splitlines(), printable(image), "is empty", "copy it again")


def test_names_that_the_terminal_cannot_show(small_model, parts, tmp_path):
    """A Windows console that writes into a file or a pipe has the 256 characters of its code page."""
    (tmp_path / "図.png").write_bytes((parts / PART).read_bytes())
    (tmp_path / "空.png").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "flawmap", "inspect", str(small_model), str(tmp_path), "--engine", "torch"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert done.returncode == 3
    assert b"1 not judged" in done.stderr


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
@pytest.mark.parametrize("name", [b"\xff\xfe.png", b"a\nb.png"])
def test_names_that_are_not_text(flawmap, small_model, parts, tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes((parts / PART).read_bytes())
    for form in ("table", "jsonl", "csv"):
        code, _, err = flawmap("inspect", small_model, path, "--format", form, "-o", tmp_path / "heat")
        assert code == 0, err
    path.write_bytes(b"")
    code, _, err = flawmap("inspect", small_model, path)
    assert code == 2
    assert "is empty" in err
    assert len(err.splitlines()) == 3


def test_names_that_are_too_long(flawmap, small_model, parts, tmp_path):
    long = tmp_path / ("x" * 300)
    check_refused(flawmap("train", long, "-o", tmp_path / "m.safetensors"), long)
    check_refused(flawmap("train", parts, "-o", long, *SMALL), long)
    check_refused(flawmap("inspect", small_model, long), long)
    check_refused(flawmap("inspect", long, parts), long)
    check_refused(flawmap("evaluate", small_model, long), long)
    check_refused(flawmap("evaluate", long, parts), long)


# Masks


@pytest.mark.parametrize(
    ("content", "says", "remedy"),
    [
        (saved(Image.new("L", (30, 20), 255), "PNG"), "the mask is 20 x 30", "redraw it"),
        (saved(Image.new("L", (64, 64), 100), "JPEG"), "no mask value is over 127", "save defects as white"),
        (b"", "is empty", "copy it again"),
        (b"not a mask", "is not a JPEG, PNG", "convert it"),
        (claiming(30_000, 30_000), "over the limit", "shrink it"),
    ],
    ids=["another size", "grey", "empty", "text", "bomb"],
)
@pytest.mark.parametrize("options", [(), ("--full-resolution",)], ids=["", "full"])
def test_masks_that_cannot_be_used(flawmap, small_model, data, tmp_path, content, says, remedy, options):
    mask = data / "ground_truth" / "bent" / "000_mask.png"
    assert mask.exists()
    mask.write_bytes(content)
    outputs = ("--json", tmp_path / "figures.json", "--html", tmp_path / "report.html")
    check_refused(flawmap("evaluate", small_model, data, *outputs, *options), mask, says, remedy)
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("option", "content", "says"),
    [
        ("--roi", saved(Image.new("L", (64, 64)), "PNG"), "paint what is to be inspected white"),
        ("--roi", saved(Image.new("L", (64, 64), 100), "JPEG"), "save defects as white"),
        ("--roi", b"", "copy it again"),
        ("--roi", None, "check the path"),
        ("--register", b"not a picture", "convert it"),
        ("--register", saved(Image.new("L", (64, 64), 100), "PNG"), "give a picture of a part"),
        ("--register", None, "check the path"),
    ],
    ids=["black", "grey", "empty", "missing", "template text", "template flat", "template missing"],
)
def test_regions_and_templates_that_cannot_be_used(flawmap, parts, tmp_path, option, content, says):
    mask = tmp_path / "given.png"
    if content is not None:
        mask.write_bytes(content)
    check_refused(flawmap("train", parts, "-o", tmp_path / "m.safetensors", *SMALL, option, mask), mask, says)
    assert list(tmp_path.iterdir()) == ([] if content is None else [mask])


def test_a_region_of_another_shape(flawmap, parts, tmp_path):
    mask = tmp_path / "roi.png"
    Image.new("L", (10, 20), 255).save(mask)
    code, _, err = flawmap("train", parts, "-o", tmp_path / "m.safetensors", *SMALL, "--roi", mask)
    assert code == 2
    check_told(err.splitlines(), parts / PART, "the region of interest is 20 x 10", "redraw the region")
    assert list(tmp_path.iterdir()) == [mask]


# Models


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(100), saved(Image.new("L", (9, 9)), "PNG")])
def test_files_that_are_no_models(flawmap, parts, tmp_path, content):
    model = tmp_path / "other.safetensors"
    model.write_bytes(content)
    check_refused(flawmap("inspect", model, parts / "test"), model, "train")
    check_refused(flawmap("evaluate", model, parts), model, "train")
    check_refused(flawmap("train", parts, "-o", tmp_path / "m.safetensors", "--update", model), model, "train")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    "setting", ["sigma=1e308", "sigma=inf", "sigma=nan", "sigma=-1", "channels=0", "epsilon=nan", "epsilon=inf"]
)
def test_settings_beyond_all_measure(flawmap, parts, tmp_path, setting):
    result = flawmap("train", parts, "-o", tmp_path / "m.safetensors", *SMALL, "--set", setting)
    check_refused(result, setting.partition("=")[0])
    assert list(tmp_path.iterdir()) == []


# A full disk


@contextmanager
def largest_file(size):
    """Writing past `size` bytes of any file fails, as it does on a full disk."""
    resource = pytest.importorskip("resource", reason="limits on files are POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1_000, 20_000, 300_000])
def test_training_where_the_disk_is_full(flawmap, parts, tmp_path, size):
    """The limits let through, in turn: nothing, the workspace's name, some features, all but the model."""
    output = tmp_path / "m.safetensors"
    with largest_file(size):
        result = flawmap("train", parts, "-o", output, *SMALL)
    check_refused(result, tmp_path)
    assert re.search("free some space|choose another place", result[2])
    assert not output.exists()
    assert bool(list(tmp_path.iterdir())) == (size == 300_000)  # whose features are whole
    code, _, err = flawmap("train", parts, "-o", output, "--resume", *SMALL)
    assert code == 0, err
    assert ("features ..." in err) == (size < 300_000)


def test_writing_results_where_the_disk_is_full(flawmap, small_model, parts, tmp_path):
    test, output = parts / "test", tmp_path / "out"
    output.mkdir()
    with largest_file(100):
        results = [
            (flawmap("inspect", small_model, test, "--coco", output / "regions.json"), output / "regions.json"),
            (flawmap("evaluate", small_model, parts, "--json", output / "figures.json"), output / "figures.json"),
            (flawmap("evaluate", small_model, parts, "--html", output / "page.html"), output / "page.html"),
            (flawmap("sample", output / "drawn"), output / "drawn"),
        ]
        code, out, err = flawmap("inspect", small_model, test, "-o", output / "heat")
    assert code == 3  # every verdict is there
    assert len(out.splitlines()) == 1 + len(find_images(test))
    told = [line for line in err.splitlines() if re.search("choose another place|make room", line)]
    assert sum("_overlay.png" in line for line in told) == len(find_images(test))
    assert "index.html" in told[-1]
    for (code, _, err), named in results:
        assert code == 2
        assert "Traceback" not in err
        assert str(named) in err.splitlines()[-1]
        assert re.search("choose another place|make room", err.splitlines()[-1])
    assert [path for path in output.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_into_a_full_disk():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "flawmap", "methods"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "free some space" in done.stderr
