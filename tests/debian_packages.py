"""Programs that tests start for real, from Debian's packages where they are missing."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest


@cache
def _install(package):
    """Whether it could be installed; tried once."""
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        return False
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(["apt-get", "-q", "update"], timeout=120, env=environment, check=False, **quiet)
        command = ["apt-get", "-qy", "install", "--no-install-recommends", package]
        return subprocess.run(command, timeout=300, env=environment, check=False, **quiet).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def brought_by(package, find):
    """What `find` finds, after an installation if need be. Skips the test without it; where CI is set, fails it."""
    found = find() or (find() if _install(package) else None)
    if found is None:
        told = f"{package} is not installed and could not be"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    return found


def find_program(name):
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    return None if found is None else Path(found)


def find_postgresql():
    """The folder of the newest PostgreSQL's programs."""
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if folders:
        return max(folders, key=lambda folder: int(folder.parent.name))
    found = shutil.which("initdb")
    return None if found is None else Path(found).resolve().parent
