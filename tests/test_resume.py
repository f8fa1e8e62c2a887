import json
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flawmap import Detector, FlawmapError
from flawmap.backbones import create_backbone, create_engine
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.learning import loop
from flawmap.learning.data import TrainingData
from flawmap.learning.loop import train
from flawmap.learning.workspace import discard
from flawmap.methods import Collect, Method, Optimise

SIZE = (32, 32)
EPOCHS, BATCH, IMAGES = 5, 4, 10
STEPS = EPOCHS * 3


class Stop(KeyboardInterrupt):
    pass


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("resnet18", ("layer1", "layer2"), weights="random", size=SIZE)


@pytest.fixture(scope="module")
def data(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    prepare = Preparation(Preprocessing(SIZE, tuple(backbone.mean), tuple(backbone.std), 255), SIZE)
    with TrainingData(sorted(folder.iterdir()), prepare, create_engine(backbone, SIZE, "torch")) as data:
        yield data


class Noisy(Method):
    """A sample of unknown size, then Adam under a schedule with a noisy loss, then running moments, then Adam again."""

    optimises = True

    def __init__(self, backbone):
        super().__init__(None, backbone, SIZE)
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 64)
        self.register_buffer("sample", torch.empty(0, 64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("moments", torch.zeros(8))

    def stages(self, images):
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        kept = []

        def collect(features, inside):
            patches = features[0].flatten(2).transpose(1, 2).flatten(0, 1)
            kept.append(patches[torch.randperm(len(patches))[:7]])

        def close(progress):
            self.sample = torch.cat(kept)
            progress(1, 1)

        yield Collect("sample", collect, close, peak_bytes=0)

        def loss(features, inside):
            self.seen += len(features[0])
            x = features[0].mean((2, 3)) + 0.1 * torch.randn(len(features[0]), 64)
            near = self.sample[torch.randint(len(self.sample), (len(x),))]
            return (self.second(torch.dropout(self.first(x), 0.2, True)) - near).square().mean()

        def optimise(name, layers, epochs):
            return Optimise(
                name, loss, [p for layer in layers for p in layer.parameters()], epochs, BATCH,
                lambda p: torch.optim.Adam(p, 0.01, amsgrad=True), clip=1.0,
                schedule=lambda o, steps: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=steps),
            )  # fmt: skip

        yield optimise("both", (self.first, self.second), EPOCHS)

        def moments(features, inside):
            self.moments += self.first(features[0].mean((2, 3))).sum(0)

        yield Collect("moments", moments, lambda progress: progress(1, 1), peak_bytes=0)
        nn.init.normal_(self.second.weight)
        yield optimise("second", [self.second], 3)


def trained(backbone, data, seed=3, **options):
    method = Noisy(backbone)
    with patch.object(loop, "COLLECTED", 8):  # so that a stage that collects can be stopped midway
        train(method, data, range(IMAGES), seed=seed, **options)
    return {name: value for name, value in method.state_dict().items() if not name.startswith("backbone.")}


def stopping(at):
    """A progress that interrupts at (name, done)."""

    def progress(what, done, total):
        if (what, done) == at:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def whole(backbone, data):
    return trained(backbone, data)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "at",
    [
        ("sample", 8), ("sample", IMAGES), ("sample, closing", 1), ("both", 1), ("both", 3), ("both", 4), ("both", 8),
        ("both", 12), ("both", STEPS - 1), ("both", STEPS), ("moments", 8), ("moments, closing", 1),
        ("second", 1), ("second", 4), ("second", 5), ("second", 9),
    ],
)  # fmt: skip
def test_an_interrupted_training_goes_on_to_the_same_bytes(backbone, data, whole, tmp_path, at):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        trained(backbone, data, checkpoint=checkpoint, progress=stopping(at))
    torch.manual_seed(99)  # what the process drew before must not matter
    calls = []
    resumed = trained(backbone, data, checkpoint=checkpoint, progress=lambda *call: calls.append(call))
    assert_same(resumed, whole)
    if at == ("both", 8):  # two epochs are whole; the third is done anew
        assert calls[0] == ("both", 7, STEPS)
    if at[0] == "second":
        assert {what for what, _, _ in calls} == {"second"}


def test_interrupted_again_and_again(backbone, data, whole, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    for at in [("sample", 8), ("both", 2), ("both", 5), ("both", 8), ("both", 9), ("moments", 8), ("second", 6)]:
        with pytest.raises(Stop):
            trained(backbone, data, checkpoint=checkpoint, progress=stopping(at))
    assert_same(trained(backbone, data, checkpoint=checkpoint), whole)
    # What is finished is not done again.
    calls = []
    assert_same(trained(backbone, data, checkpoint=checkpoint, progress=lambda *call: calls.append(call)), whole)
    assert calls == []


def test_the_checkpoint_changes_nothing_and_leaves_the_frozen_backbone_out(backbone, data, whole, tmp_path):
    backbone.requires_grad_(False)
    assert_same(trained(backbone, data, checkpoint=tmp_path / "checkpoint"), whole)
    kept = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert kept["stages"] == 4
    assert set(kept["method"]) == set(whole)
    assert (tmp_path / "checkpoint").stat().st_size < 200_000


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 300, lambda b: b[:-9]])
def test_a_damaged_checkpoint_is_told_in_one_line(backbone, data, tmp_path, spoil):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        trained(backbone, data, checkpoint=checkpoint, progress=stopping(("both", 8)))
    checkpoint.write_bytes(spoil(checkpoint.read_bytes()))
    with pytest.raises(FlawmapError, match="is damaged") as caught:
        trained(backbone, data, checkpoint=checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_training_is_told(backbone, data, tmp_path):
    """One that would fit, and one of a network that would not."""
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        trained(backbone, data, checkpoint=checkpoint, progress=stopping(("both", 8)))
    for other in ({"seed": 4}, {"run": "another"}):
        with pytest.raises(FlawmapError, match="of another training; start anew with --discard"):
            trained(backbone, data, checkpoint=checkpoint, **other)
    with pytest.raises(FlawmapError, match="of another training"):
        train(Noisy(backbone), data, range(IMAGES - 1), seed=3, checkpoint=checkpoint)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_one_changed_bit_of_a_checkpoint_is_noticed(backbone, data, tmp_path, share):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        trained(backbone, data, checkpoint=checkpoint, progress=stopping(("both", 8)))
    content = bytearray(checkpoint.read_bytes())
    content[int(share * len(content))] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(FlawmapError, match="is damaged"):
        trained(backbone, data, checkpoint=checkpoint)


# The whole road


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """24 different images, large enough that reading them takes a while."""
    folder = tmp_path_factory.mktemp("parts") / "good"
    folder.mkdir()
    rng = np.random.default_rng(1)
    base = rng.integers(40, 200, (12, 12, 3))
    for number in range(24):
        pixels = np.kron(base + rng.integers(-30, 30, base.shape), np.ones((25, 25, 1)))
        pixels = np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png", compress_level=1)
    return folder


PADIM = {"method": "padim", "image_size": 64, "engine": "torch", "channels": 8}
CFA = {"method": "cfa", "image_size": 64, "engine": "torch", "epochs": 4, "levels": ("blocks.2",), "positions": 16}


def saved(detector, path):
    detector.save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(good, tmp_path_factory):
    """The bytes of the model file of each method."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        settings["method"]: saved(Detector(**settings).fit(good), folder / settings["method"])
        for settings in (PADIM, CFA)
    }


def options(settings):
    chosen = ["--method", settings["method"], "--image-size", settings["image_size"], "--engine", settings["engine"]]
    for key, value in settings.items():
        if key not in ("method", "image_size", "engine"):
            chosen += ["--set", f"{key}={value[0] if isinstance(value, tuple) else value}"]
    return [str(option) for option in chosen]


def kill_when(settings, good, output, reached):
    """Trains in a process of its own and kills it as soon as `reached(workspace)` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flawmap", "train", str(good), "-o", str(output), "--resume", *options(settings)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    workspace = output.with_name(output.name + ".training")
    end = time.monotonic() + 120
    while process.poll() is None and not reached(workspace) and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    _, err = process.communicate(timeout=60)
    return workspace, err


def committed(workspace):
    index = workspace / "index"
    return index.read_bytes().count(b"\n") if index.exists() else 0


def test_a_process_killed_among_its_features_goes_on_to_the_same_file(good, uninterrupted, flawmap, tmp_path):
    output = tmp_path / "m.safetensors"
    wanted = random.randrange(1, 17)  # any moment will do
    workspace, err = kill_when(PADIM, good, output, lambda folder: committed(folder) >= wanted)
    kept = committed(workspace)
    assert 0 < kept < 24, err
    assert not output.exists()
    digests = [json.loads(line)[0] for line in (workspace / "index").read_text().splitlines()]
    code, _, err = flawmap("train", good, "-o", output, *options(PADIM))
    assert code == 2
    assert err.splitlines()[-1].endswith("go on with --resume, or delete the folder")
    assert [json.loads(line)[0] for line in (workspace / "index").read_text().splitlines()] == digests
    code, _, err = flawmap("train", good, "-o", output, *options(PADIM), "--resume")
    assert code == 0, err
    assert f"features of {24 - kept} images" in err
    assert output.read_bytes() == uninterrupted["padim"]
    assert not workspace.exists()


def test_cfa_killed_between_epochs_goes_on_to_the_same_file(good, uninterrupted, flawmap, tmp_path):
    output = tmp_path / "m.safetensors"

    def epochs(folder):
        found = list(folder.glob("checkpoint-*")) if folder.exists() else []
        try:
            return torch.load(found[0], weights_only=True)["epochs"] if found else 0
        except FileNotFoundError:
            return 0

    workspace, err = kill_when(CFA, good, output, lambda folder: epochs(folder) >= 1)
    assert 1 <= epochs(workspace) <= CFA["epochs"], err
    code, _, err = flawmap("train", good, "-o", output, *options(CFA), "--resume")
    assert code == 0, err
    assert "features of" not in err
    assert output.read_bytes() == uninterrupted["cfa"]
    assert not workspace.exists()


def interrupted(settings, good, workspace, at):
    with pytest.raises(Stop):
        Detector(**settings).fit(good, workspace=workspace, progress=stopping(at))
    return workspace


@pytest.mark.parametrize(
    "at", [("features", 16), ("whitening", 19), ("memory bank", 19), ("patch descriptor", 7), ("patch descriptor", 20)]
)
def test_cfa_interrupted_anywhere(good, uninterrupted, tmp_path, at):
    workspace = interrupted(CFA, good, tmp_path / "work", at)
    detector = Detector(**CFA).fit(good, workspace=workspace, resume=True)
    assert saved(detector, tmp_path / "m") == uninterrupted["cfa"]
    assert not workspace.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"channels": 9}, "config"),
        ({"image_size": 96}, "preparation"),
        ({"roi": np.eye(300, dtype=bool)}, "preparation"),
        (
            {"method": "patchcore", "levels": ("blocks.1",), "channels": None},
            "backbone and config .* method",
        ),
    ],
)
def test_resuming_another_run_is_refused(good, tmp_path, change, named):
    workspace = interrupted(PADIM, good, tmp_path / "work", ("features", 8))
    kept = (workspace / "index").read_bytes()
    settings = {key: value for key, value in {**PADIM, **change}.items() if value is not None}
    with pytest.raises(FlawmapError, match=f"--resume: {named} changed since") as caught:
        Detector(**settings).fit(good, workspace=workspace, resume=True)
    assert "\n" not in str(caught.value)
    assert (workspace / "index").read_bytes() == kept


def test_resuming_with_other_images_is_refused(good, tmp_path):
    workspace = interrupted(PADIM, good, tmp_path / "work", ("features", 8))
    with pytest.raises(FlawmapError, match="--resume: images changed since"):
        Detector(**PADIM).fit(sorted(good.iterdir())[:12], workspace=workspace, resume=True)
    with pytest.raises(FlawmapError, match="go on with --resume"):
        Detector(**PADIM).fit(good, workspace=workspace)


def test_resume_without_anything_to_go_on_with_starts(good, uninterrupted, tmp_path):
    detector = Detector(**PADIM).fit(good, workspace=tmp_path / "work", resume=True)
    assert saved(detector, tmp_path / "m") == uninterrupted["padim"]


def test_an_image_changed_in_between_is_read_again(good, tmp_path):
    images = sorted(good.iterdir())[:10]
    folder = tmp_path / "good"
    folder.mkdir()
    for path in images:
        (folder / path.name).write_bytes(path.read_bytes())
    workspace = interrupted(PADIM, folder, tmp_path / "work", ("features", 8))
    (folder / images[0].name).write_bytes(sorted(good.iterdir())[20].read_bytes())
    resumed = Detector(**PADIM).fit(folder, workspace=workspace, resume=True)
    assert saved(resumed, tmp_path / "a") == saved(Detector(**PADIM).fit(folder), tmp_path / "b")


def test_a_training_that_fails_keeps_what_it_has_done(flawmap, good, uninterrupted, tmp_path):
    alike, output = tmp_path / "alike", tmp_path / "m.safetensors"
    workspace = tmp_path / "m.safetensors.training"
    alike.mkdir()
    for number in range(4):
        (alike / f"{number}.png").write_bytes((good / "00.png").read_bytes())
    code, _, err = flawmap("train", alike, "-o", output, *options(PADIM))
    assert code == 2
    assert "show the same" in err.splitlines()[-1]
    assert not workspace.exists()  # what was done took no time
    code, _, err = flawmap("train", good, "-o", output, *options(PADIM), "--drop-atypical", 23)
    assert code == 2
    assert "drop fewer" in err.splitlines()[-1]
    assert workspace.exists()
    code, _, err = flawmap("train", good, "-o", output, *options(PADIM), "--resume", "--discard")
    assert code == 2
    assert "not both" in err
    code, _, err = flawmap("train", good, "-o", output, *options(PADIM), "--discard")
    assert code == 0, err
    assert output.read_bytes() == uninterrupted["padim"]
    assert not workspace.exists()


def test_what_fails_before_anything_is_kept_leaves_nothing(good, tmp_path):
    def stop(line):
        raise Stop

    with pytest.raises(Stop):
        Detector(**PADIM).fit(good, workspace=tmp_path / "work", announce=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FlawmapError("no"), BrokenPipeError("no"), Stop()])
def test_nothing_that_happens_loses_what_was_done(good, uninterrupted, tmp_path, error):
    def fail(what, done, total):
        if (what, done) == ("features", 24):
            raise error

    with pytest.raises(type(error)) as caught:
        Detector(**PADIM).fit(good, workspace=tmp_path / "work", progress=fail)
    assert caught.value is error
    calls = []
    detector = Detector(**PADIM).fit(
        good, workspace=tmp_path / "work", resume=True, progress=lambda *c: calls.append(c)
    )
    assert "features" not in {what for what, _, _ in calls}
    assert saved(detector, tmp_path / "m") == uninterrupted["padim"]


def test_the_workspace_stays_until_the_model_is_safe(good, uninterrupted, tmp_path):
    work = tmp_path / "work"
    detector = Detector(**PADIM).fit(good, workspace=work)
    with pytest.raises(FlawmapError, match="does not exist"):
        detector.save(tmp_path / "missing" / "m")
    assert saved(Detector(**PADIM).fit(good, workspace=work, resume=True), tmp_path / "m") == uninterrupted["padim"]
    assert not work.exists()
    detector.save(tmp_path / "again")  # whose workspace is gone


def test_a_workspace_that_has_become_another_runs_stays(good, tmp_path):
    work = tmp_path / "work"
    detector = Detector(**PADIM).fit(good, workspace=work)
    discard(work)
    interrupted({**PADIM, "seed": 1}, good, work, ("features", 8))
    detector.save(tmp_path / "m")
    assert committed(work) == 8


# Resumed under other circumstances, or from what was changed


def test_another_number_of_threads_is_refused(good, tmp_path, monkeypatch):
    workspace = interrupted(PADIM, good, tmp_path / "work", ("features", 8))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(FlawmapError, match="--resume: threads changed since"):
            Detector(**PADIM).fit(good, workspace=workspace, resume=True)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    with pytest.raises(FlawmapError, match="--resume: threads changed since"):
        Detector(**PADIM).fit(good, workspace=workspace, resume=True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    with pytest.raises(FlawmapError, match="--resume: processor and threads changed since"):
        Detector(**PADIM).fit(good, workspace=workspace, resume=True)


@pytest.mark.parametrize(
    ("name", "change"), [("level0", "zeroed"), ("level0", "gone"), ("index", "a bit"), ("layout", "cut")]
)
def test_from_features_that_were_changed_the_same_model_comes(good, uninterrupted, tmp_path, name, change):
    workspace = interrupted(PADIM, good, tmp_path / "work", ("features", 24))
    path = workspace / name
    content = bytearray(path.read_bytes())
    if change == "zeroed":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    elif change == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.unlink() if change == "gone" else path.write_bytes(content)
    detector = Detector(**PADIM).fit(good, workspace=workspace, resume=True)
    assert saved(detector, tmp_path / "m") == uninterrupted["padim"]


# Two at once


def test_one_process_at_a_time_works_in_a_workspace(good, tmp_path):
    work, refusals = tmp_path / "work", []

    def try_too(what, done, total):
        if (what, done) == ("features", 8):
            for resume in (True, False):
                with pytest.raises(FlawmapError, match=f"process {os.getpid()} on .* is training in it") as caught:
                    Detector(**PADIM).fit(good, workspace=work, resume=resume)
                refusals.append(str(caught.value))
            with pytest.raises(FlawmapError, match="is training in it"):
                discard(work)

    Detector(**PADIM).fit(good, workspace=work, progress=try_too)
    assert len(refusals) == 2
    assert "\n" not in refusals[0]


def test_the_lock_ends_with_its_process(good, flawmap, tmp_path, uninterrupted):
    output = tmp_path / "m.safetensors"
    workspace, err = kill_when(PADIM, good, output, lambda folder: committed(folder) >= 1)
    assert (workspace / "lock").exists(), err
    code, _, err = flawmap("train", good, "-o", output, *options(PADIM), "--resume")
    assert code == 0, err
    assert output.read_bytes() == uninterrupted["padim"]


def test_another_folder_is_left_alone(good, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes").write_text("mine")
    for call in (lambda: Detector(**PADIM).fit(good, workspace=tmp_path / "work"), lambda: discard(tmp_path / "work")):
        with pytest.raises(FlawmapError, match="was not made by a training"):
            call()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FlawmapError, match="is a file"):
        Detector(**PADIM).fit(good, workspace=tmp_path / "file")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes"]


# Killed at each change of a file


class Killed(BaseException):
    pass


MUTATING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
KILL = {"armed": False, "left": 0, "below": ""}


def _count(event, arguments):
    """An audit hook: after so many changes of files there are no more, as if the process had been killed."""
    if not KILL["armed"]:
        return
    named = [str(one) for one in arguments if isinstance(one, (str, bytes, Path))]
    if not any(KILL["below"] in name for name in named):
        return
    if event in MUTATING or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        KILL["left"] -= 1
        if KILL["left"] < 0:
            raise Killed


@contextmanager
def killed_after(changes, below):
    if "hooked" not in KILL:
        KILL["hooked"] = True
        sys.addaudithook(_count)
    KILL.update(armed=True, left=changes, below=str(below))
    try:
        yield
    except Killed:
        pass
    finally:
        KILL["armed"] = False


def test_killed_at_any_change_of_a_file_nothing_is_lost(good, tmp_path):
    few = sorted(good.iterdir())[:9]

    def training(output, resume=False):
        work = output.with_name(output.name + ".training")
        saved(Detector(**PADIM).fit(few, workspace=work, resume=resume), output)

    with killed_after(10**9, tmp_path / "whole"):
        training(tmp_path / "whole")
    changes = 10**9 - KILL["left"]
    whole = (tmp_path / "whole").read_bytes()
    points = [0, 1, 2, random.randrange(3, changes - 7), *range(changes - 7, changes - 1)]
    for point in points:  # at its begin, among its features, from the model file to the end of the workspace
        output = tmp_path / f"{point}"
        with killed_after(point, output):
            training(output)
        assert not output.exists() or output.read_bytes() == whole, point
        training(output, resume=True)
        assert output.read_bytes() == whole, point
        assert not output.with_name(f"{point}.training").exists(), point
