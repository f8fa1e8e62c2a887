"""The service for hours in minutes: killed fifty times, sent ten thousand broken requests, its memory watched."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

INSPECT = "/v1/models/fabric/inspections"
KILLS = int(os.environ.get("FLAWMAP_SOAK_KILLS", "50"))
BROKEN = int(os.environ.get("FLAWMAP_SOAK_BROKEN", "10000"))
INSPECTIONS = int(os.environ.get("FLAWMAP_SOAK_INSPECTIONS", "20000"))


def run(*arguments):
    subprocess.run([sys.executable, "-m", "flawmap", *map(str, arguments)], check=True, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def fabric(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fabric")
    run("sample", folder / "data", "--kind", "fabric")
    settings = ("--method", "patchcore", "--image-size", 64, "--set", "max_vectors=500", "--set", "min_vectors=100")
    run("train", folder / "data", "-o", folder / "fabric.safetensors", *settings)
    run("export", folder / "fabric.safetensors", "-o", folder / "fabric.onnx")
    return folder


@pytest.fixture(scope="module")
def contents(fabric) -> list[bytes]:
    return [path.read_bytes() for path in sorted((fabric / "data" / "test").rglob("*.png"))]


class Server:
    """`flawmap serve` in a process of its own; `lines` is what it says."""

    def __init__(self, model, store, *options):
        command = [sys.executable, "-m", "flawmap", "serve", model, "--port", 0, "--threads", 1, "--store", store]
        self.process = subprocess.Popen([*map(str, command), *options], stderr=subprocess.PIPE, text=True)
        self.lines = [self.process.stderr.readline()]
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        assert self.lines[0].startswith("page http"), self.lines
        self.url = self.lines[0].split()[1].rstrip("/")

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


def test_killed_it_loses_nothing_acknowledged_and_doubles_nothing(fabric, contents, tmp_path):
    answered: dict[str, int] = {}
    stop = threading.Event()
    address = {"url": ""}

    def ask(who):
        number = 0
        with httpx.Client(timeout=20) as client:
            while not stop.is_set():
                key = f"{who}-{number}"
                try:
                    answer = client.post(
                        address["url"] + INSPECT,
                        content=contents[(who + number) % len(contents)],
                        headers={"Idempotency-Key": key},
                    )
                except httpx.HTTPError:
                    time.sleep(0.05)
                    continue  # with the same key
                if answer.status_code == 200:
                    answered[key] = answer.json()["inspections"][0]["id"]
                    number += 1

    server = Server(fabric / "fabric.onnx", tmp_path / "store", "--keep", "all")
    address["url"] = server.url
    threads = [threading.Thread(target=ask, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    chance = random.Random(0)
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.3, 1.5))
        server.end(signal.SIGKILL)
        server = Server(fabric / "fabric.onnx", tmp_path / "store", "--keep", "all")
        address["url"] = server.url
    stop.set()
    for thread in threads:
        thread.join()
    lines = httpx.get(server.url + "/v1/export.jsonl", timeout=60).text.splitlines()
    kept = [json.loads(line)["id"] for line in lines]
    print(f"{KILLS} kills, {len(answered)} acknowledged, {len(kept)} kept")
    assert len(answered) > KILLS
    assert set(answered.values()) <= set(kept)
    assert len(set(answered.values())) == len(answered)
    # Each key was asked for until it was acknowledged, so whatever is kept beyond them was doubled.
    assert len(kept) == len(answered)
    assert server.end() == 0


def test_broken_requests_give_no_failure_and_no_traceback(fabric, contents, tmp_path):
    server = Server(fabric / "fabric.onnx", tmp_path / "store")
    chance = random.Random(1)
    counts: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(BROKEN):
            content = bytearray(chance.choice(contents))
            kind = chance.randrange(5)
            if kind == 0:
                content = content[: chance.randrange(len(content))]
            elif kind == 1:
                for _ in range(chance.randrange(1, 50)):
                    content[chance.randrange(len(content))] = chance.randrange(256)
            elif kind == 2:
                content = bytearray(chance.randbytes(chance.randrange(3000)))
            headers = {
                "content-type": chance.choice(
                    ("image/png", "multipart/form-data", "multipart/form-data; boundary=a", "text/\xff", "")
                ),
                "Idempotency-Key": chance.choice(("", "a" * 300, "\x7f", f"k{chance.random()}")),
                "X-Image-Name": chance.choice(("a\x1b[2J", "", "ä" * 400, "../../x")),
            }
            encoded = {name: value.encode("latin-1", "replace") for name, value in headers.items()}
            path = chance.choice((INSPECT, INSPECT, "/v1/models/%00/inspections", "/v1/models/../../x/inspections"))
            answer = client.request(
                chance.choice(("POST", "POST", "POST", "PUT", "GET")), path, content=bytes(content), headers=encoded
            )
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert client.get("/readyz").status_code == 200
    print(dict(sorted(counts.items())))
    assert max(counts) < 500
    assert server.end() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_slow_and_vanishing_clients_keep_nobody_waiting(fabric, contents, tmp_path):
    server = Server(fabric / "fabric.onnx", tmp_path / "store")
    host, port = server.url.removeprefix("http://").split(":")
    slow = []
    for number in range(200):
        one = socket.create_connection((host, int(port)))
        one.sendall(f"POST {INSPECT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100000\r\n\r\n".encode())
        one.sendall(contents[0][: number * 10])
        slow.append(one)
        if number % 2:
            one.close()
    times = []
    for number in range(100):
        begun = time.perf_counter()
        assert httpx.post(server.url + INSPECT, content=contents[number % len(contents)]).status_code == 200
        times.append(time.perf_counter() - begun)
    print(f"beside 100 slow and 100 vanished clients: median {1000 * sorted(times)[50]:.0f} ms")
    assert sorted(times)[50] < 2
    for one in slow:
        one.close()
    assert server.end() == 0


def memory(process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by /proc")
def test_memory_is_flat(fabric, contents, tmp_path):
    server = Server(fabric / "fabric.onnx", tmp_path / "store", "--keep", "all", "--keep-gb", "0.02")
    seen = []
    done = 0
    lock = threading.Lock()

    def ask():
        nonlocal done
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while done < INSPECTIONS:
                client.post(INSPECT, content=contents[done % len(contents)])
                with lock:
                    done += 1
                    if done % max(1, INSPECTIONS // 20) == 0:
                        seen.append(memory(server.process))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{done} inspections, MB: {seen}")
    assert max(seen[len(seen) // 2 :]) < 1.1 * max(seen[: len(seen) // 2]) + 10
    pictures = sum(path.stat().st_size for path in (tmp_path / "store" / "pictures").rglob("*") if path.is_file())
    assert pictures <= 20_000_000
    assert server.end() == 0
    shutil.rmtree(tmp_path / "store")
