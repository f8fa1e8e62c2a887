"""What the documents tell to type does what they say; the unit for systemd is one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tutorial")


def run_as_shown(document, folder):
    """Runs the document's bash blocks, one after the other in one shell, which stops at the first that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / document).read_text(), re.DOTALL | re.MULTILINE)
    script = "set -euo pipefail\n" + "\n".join(blocks)
    script = script.replace("localhost:8000", f"localhost:{port}").replace(" &\n", f" --port {port} &\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Into a file: what the shell leaves running would hold a pipe.
    with (folder / f"{document}.log").open("w+b") as log:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = shell.wait(600)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
        told = (folder / f"{document}.log").read_text(errors="replace")
    assert code == 0, told
    return told


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("curl"), reason="the documents show bash and curl")
def test_the_tutorial_and_then_the_api_run_as_shown(folder):
    run_as_shown("tutorial.md", folder)
    assert (folder / "boards.html").is_file()
    assert (folder / "heatmaps" / "index.html").is_file()
    (header, *rows) = (folder / "records.csv").read_text().splitlines()
    assert header.startswith("id,at,model,")
    assert len(rows) == 1
    told = run_as_shown("api.md", folder)
    assert '"name":"board 4711","image_digest"' in told
    assert (folder / "overlay.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert '"version":1' in told


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_is_understood_by_systemd(tmp_path):
    unit = (DOCS / "flawmap.service").read_text()
    command = re.search(r"^ExecStart=(\S+)", unit, re.MULTILINE)[1]
    copy = tmp_path / "flawmap.service"
    copy.write_text(unit.replace(command, shutil.which("true")))  # the program must be there
    found = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert "flawmap.service" not in found.stderr, found.stderr
    assert found.returncode == 0, found.stderr


def test_the_unit_and_the_dockerfile_give_options_that_exist():
    from flawmap.cli.serve import serve_command

    known = {option for parameter in serve_command.params for option in parameter.opts}
    for name in ("flawmap.service", "Dockerfile"):
        given = set(
            re.findall(
                r"(?<![-\w])--[a-z-]+",
                "".join(
                    line for line in (DOCS / name).read_text().splitlines(True) if line.startswith(("ExecStart", "CMD"))
                ),
            )
        )
        assert given
        assert given <= known, name
