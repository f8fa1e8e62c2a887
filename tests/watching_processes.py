"""`flawmap watch` as a process of its own, followed line by line."""

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

BROUGHT_UP = 60  # seconds that anything may take on a busy machine


class Process:
    """Started on entry, killed at the end."""

    def __init__(self, *arguments, **more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more.pop("env", {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flawmap", "watch", "--engine", "onnxruntime", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            **more,
        )
        self.out, self.err = [], []
        self._news = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._follow, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    def _follow(self, stream, lines):
        for line in stream:
            lines.append(line.rstrip("\n"))
            self._news.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(10)

    def until(self, condition):
        """Waits for what it prints to fulfil a condition."""
        deadline = time.monotonic() + BROUGHT_UP
        while not condition(self):
            ended = self.process.poll() is not None and not any(thread.is_alive() for thread in self._threads)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"it never came to that: {self.out} {self.err}")
            try:
                self._news.get(timeout=0.2)
            except queue.Empty:
                continue
        return self

    def end(self, number):
        """Sends a signal; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(BROUGHT_UP)
        for thread in self._threads:
            thread.join(10)
        return code


def wait_for(condition):
    deadline = time.monotonic() + BROUGHT_UP
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Cut:
    """A way to a TCP port that can be cut and mended."""

    def __init__(self, port):
        self.port, self.whole, self._pairs = port, True, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if not self.whole:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.port))
            self._pairs += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one, other):
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.whole = False
        for end in self._pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.cut()
        self._server.close()
