import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from debian_packages import brought_by, find_postgresql
from flawmap import Detector
from flawmap.cli import main
from flawmap.datasets.drawn import draw_dataset
from flawmap.export import export
from watching_processes import free_port

SIZE = 128


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """A small MVTec-like data set: 12 good training images, 4 good and 2 of each of 4 defects to test on."""
    root = tmp_path_factory.mktemp("drawn") / "screws"
    draw_dataset(root, "screws", 0, train=12, good=4, per_defect=2, size=SIZE)
    return root


@pytest.fixture(scope="session")
def detector(drawn) -> Detector:
    """PatchCore fitted on `drawn`, with whatever engine `auto` takes."""
    return Detector("patchcore", image_size=SIZE, max_false_reject=0.1).fit(drawn)


@pytest.fixture(scope="session")
def padim(drawn) -> Detector:
    return Detector("padim", image_size=SIZE, engine="torch", channels="24").fit(drawn)


@pytest.fixture(scope="session")
def model_file(detector, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "screws.safetensors"
    detector.save(path)
    return path


@pytest.fixture(scope="session")
def live(drawn) -> Detector:
    """F2R, whose alpha and beta can be moved; three of the twelve images calibrate it."""
    small = {"epochs": 2, "views": 2, "components": 16, "steps": 2, "max_vectors": 60}
    return Detector("f2r", image_size=SIZE, max_false_reject=0.3, **small).fit(drawn)


@pytest.fixture(scope="session")
def live_file(live, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "live.safetensors"
    live.save(path)
    return path


@pytest.fixture(scope="session")
def exported(detector, model_file, drawn) -> Path:
    """`detector` as an ONNX file, beside its model file."""
    path = model_file.with_suffix(".onnx")
    export(detector, path, check=drawn / "test" / "good")
    return path


@pytest.fixture(scope="session")
def exported_live(live, live_file, drawn) -> Path:
    path = live_file.with_suffix(".onnx")
    export(live, path, check=drawn / "test" / "good")
    return path


@pytest.fixture(scope="session")
def line_model(padim, tmp_path_factory) -> Path:
    """An exported file that judges quickly."""
    path = tmp_path_factory.mktemp("line") / "screws.onnx"
    export(padim, path)
    return path


@pytest.fixture(scope="session")
def postgresql_url():
    """A database of a PostgreSQL server that is started for the tests and deleted after them."""
    programs = brought_by("postgresql", find_postgresql)
    folder, port = Path(tempfile.mkdtemp(prefix="flawmap-postgresql-")), free_port()
    # It refuses to run as root.
    as_user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if as_user:
        shutil.chown(folder, "postgres", "postgres")
    server = None
    try:
        make = [programs / "initdb", "-D", folder / "data", "-U", "flawmap", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, timeout=120, **as_user)
        options = ("listen_addresses=127.0.0.1", f"port={port}", "fsync=off", "unix_socket_directories=")
        settings = [part for option in options for part in ("-c", option)]
        with (folder / "log").open("wb") as log:
            command = [programs / "postgres", "-D", folder / "data", *settings]
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_user)
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode != 0:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL does not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"postgresql://flawmap@127.0.0.1:{port}/postgres"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def good_image(drawn) -> np.ndarray:
    return np.asarray(Image.open(drawn / "test" / "good" / "000.png").convert("RGB"))


@pytest.fixture(scope="session")
def broken_image(good_image) -> np.ndarray:
    """A good part with a glaring square in rows 40..70 and columns 60..95."""
    pixels = good_image.copy()
    pixels[40:70, 60:95] = (255, 0, 255)
    return pixels


@pytest.fixture
def seeded():
    """The same draws of torch, and one thread: for layers too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def flawmap(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flawmap", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser that the page is tested in."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False, "timeout": 900}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(
                ["apt-get", "-qq", *command], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, **quiet
            )
        found = shutil.which("chromium")
    if found is None:
        told = "Chromium is not here, and only root can install Debian's package"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    return found
