"""Reading and writing of files: what is no file, links, permissions, threads, and the disk."""

import os
import socket
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawmap import FlawmapError, files
from flawmap.files import UNFINISHED, claim_folder, filling, open_regular, replacing, write_png

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


def write(path, text):
    with replacing(path) as file:
        file.write(text)


def refused(match, call, *arguments):
    with pytest.raises(FlawmapError, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def opened(path):
    with open_regular(path) as file:
        return file.read()


# Reading


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"whole")
    (tmp_path / "link").symlink_to("a")
    assert opened(tmp_path / "a") == opened(tmp_path / "link") == b"whole"


@posix
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind, linked):
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    refused(f"{path}: is a {kind}, not a file", opened, path)


def test_what_is_missing_is_told(tmp_path):
    refused("does not exist", opened, tmp_path / "missing")
    (tmp_path / "link").symlink_to("link")
    refused("cannot be read", opened, tmp_path / "link")


# Writing


def test_threads_and_processes_of_one_number_do_not_share_a_temporary_file(tmp_path):
    path, ready, whole = tmp_path / "a", threading.Barrier(8), []

    def work(number):
        content = bytes([number]) * 100_000
        whole.append(content)
        for _ in range(5):
            ready.wait()
            with replacing(path) as file:
                for start in range(0, len(content), 1000):
                    file.write(content[start : start + 1000])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_pictures_of_one_name_do_not_share_a_temporary_file(tmp_path):
    images = [Image.fromarray(np.full((300, 300), value, np.uint8)) for value in range(8)]
    failed = []

    def work(image):
        try:
            for _ in range(10):
                write_png(tmp_path / "below" / "a.png", image)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(image,)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(np.unique(np.asarray(Image.open(tmp_path / "below" / "a.png")))) == 1
    assert [entry.name for entry in (tmp_path / "below").iterdir()] == ["a.png"]


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_plain_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "new", b"1")
        write_png(tmp_path / "new.png", Image.new("L", (4, 4)))
        (tmp_path / "plain").write_bytes(b"1")
        (tmp_path / "kept").write_bytes(b"1")
        (tmp_path / "kept").chmod(0o640)
        write(tmp_path / "kept", b"2")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["new"] == modes["new.png"] == modes["plain"]
    assert modes["kept"] == 0o640


@posix
def test_the_file_and_its_name_are_on_the_disk_before_it_is_said(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode)))
    write(tmp_path / "a", b"1")
    assert synced == [stat.S_IFREG, stat.S_IFDIR]


@posix
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    for name, target in (("link", "there/a"), ("dangling", "there/new")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "there" / "a").write_bytes(b"old")
    write(tmp_path / "link", b"new")
    write(tmp_path / "dangling", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "there" / "a").read_bytes() == (tmp_path / "there" / "new").read_bytes() == b"new"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a", "new"]


@posix
def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused("nobody reads this pipe", write, tmp_path / "pipe", b"1")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", b"all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@posix
def test_a_device_is_written_to_and_stays(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    number = Path("/dev/null").stat().st_rdev
    for path in (tmp_path / "link", Path("/dev/null")):
        with replacing(path) as file:  # looked at first: as root a mistake here would take the device away
            assert file.fileno() > 2
            assert stat.S_ISCHR(os.fstat(file.fileno()).st_mode)
    assert Path("/dev/null").stat().st_rdev == number
    refused("cannot be written|the disk is full", write, Path("/dev/full"), b"1")


@posix
def test_a_socket_and_a_folder_are_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    refused("is a socket", write, tmp_path / "socket", b"1")
    refused("is a folder", write, tmp_path, b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["socket"]


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("ü" * 127)
    write(path, b"1")
    assert path.read_bytes() == b"1"


# Folders


def test_a_data_set_that_was_killed_is_begun_again(tmp_path):
    folder = tmp_path / "set"
    claim_folder(folder)
    (folder / UNFINISHED).touch()
    (folder / "train" / "good").mkdir(parents=True)
    (folder / "train" / "good" / "0.png").write_bytes(b"1")
    with filling(folder):
        assert [path.name for path in folder.iterdir()] == [UNFINISHED]
        claim_folder(folder)  # who writes it may ask again
        (folder / "test").mkdir()
    assert [path.name for path in folder.iterdir()] == ["test"]
    refused("is not empty", claim_folder, folder)


def test_nothing_of_others_is_deleted_with_it(tmp_path):
    (tmp_path / UNFINISHED).touch()
    (tmp_path / "notes").write_text("mine")
    refused("is not empty", claim_folder, tmp_path)
    assert (tmp_path / "notes").exists()


def test_a_data_set_that_fails_leaves_nothing(tmp_path):
    def fail():
        with filling(tmp_path / "set"):
            (tmp_path / "set" / "train").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "set").iterdir()) == []
    assert files.UNFINISHED.startswith(".")
