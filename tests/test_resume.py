import json
import random
import subprocess
import sys
import time
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


def test_a_training_that_fails_leaves_no_workspace(flawmap, good, tmp_path):
    alike = tmp_path / "alike"
    alike.mkdir()
    for number in range(4):
        (alike / f"{number}.png").write_bytes((good / "00.png").read_bytes())
    code, _, err = flawmap("train", alike, "-o", tmp_path / "m.safetensors", *options(PADIM))
    assert code == 2
    assert "show the same" in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["alike"]
