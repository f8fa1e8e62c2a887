"""Video files and streams: frames at intervals or triggered, each once, and never a stale one."""

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawmap import FlawmapError
from flawmap.service.database import open_database
from flawmap.service.records import Filter, Records
from flawmap.service.sources import cameras
from flawmap.service.sources.cameras import Camera, VideoFile, is_live, is_video
from flawmap.service.sources.triggers import on_http
from watching_processes import Process, free_port, wait_for

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture
def records(tmp_path):
    return Records(open_database(f"sqlite:///{tmp_path / 'records.db'}"))


@pytest.fixture(scope="session")
def part(drawn):
    return np.array(Image.open(drawn / "test" / "good" / "000.png").convert("RGB"))


@pytest.fixture
def video(tmp_path, part):
    """3.5 s of 10 frames a second, without losses, the first rows of each red and saying its number."""
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 10, part.shape[1::-1])
    assert writer.isOpened()
    for number in range(35):
        writer.write(np.ascontiguousarray(numbered(part, number)[:, :, ::-1]))
    writer.release()
    return path


def numbered(part, number):
    frame = part.copy()
    frame[:16] = (250, 0, 0)
    for bit in range(16):
        if number >> bit & 1:
            frame[:16, 8 * bit : 8 * bit + 8] = (0, 0, 0)
    return frame


def number_of(pixels):
    return sum(1 << bit for bit in range(16) if pixels[4:12, 8 * bit + 2 : 8 * bit + 6, 0].mean() < 125)


def rows_of(store):
    engine = open_database(f"sqlite:///{store / 'records.db'}")
    try:
        return list(Records(engine).each(Filter()))
    finally:
        engine.dispose()


def kept(store, row):
    return np.array(Image.open(BytesIO((store / "pictures" / row.picture[:2] / row.picture).read_bytes())))


# Video files


@pytest.mark.parametrize(
    ("every", "expected"), [(1.0, [0, 10, 20, 30]), (0.5, [*range(0, 35, 5)]), (0.0, [*range(35)]), (9.0, [0])]
)
def test_a_video_gives_a_frame_at_each_interval_of_its_own_time(video, records, part, every, expected):
    source = VideoFile(video, "m", records, every)
    shots = []
    while not source.finished():
        if (shot := source.take()) is not None:
            shots.append(shot)
    source.close()
    assert [number_of(shot.pixels) for shot in shots] == expected
    assert [shot.name for shot in shots] == [f"frame {number}" for number in expected]
    for shot, number in zip(shots, expected, strict=True):
        assert np.abs(shot.pixels.astype(int) - numbered(part, number)).max() <= 4  # RGB, and not BGR
        assert (np.array(Image.open(BytesIO(shot.content))) == shot.pixels).all()


def test_a_video_is_judged_once_also_after_a_kill(line_model, video, tmp_path):
    options = (line_model, video, "--store", tmp_path / "store", "--every", 0, "--keep", "all", "--format", "jsonl")
    with Process(*options) as watch:
        watch.until(lambda it: len(it.out) > 5)
        watch.process.kill()
    with Process(*options) as watch:
        assert watch.process.wait(60) in (0, 2, 3)
    rows = rows_of(tmp_path / "store")
    assert [row.name for row in rows] == [f"frame {number}" for number in range(35)]
    assert [number_of(kept(tmp_path / "store", row)) for row in rows] == list(range(35))
    assert json.loads(watch.out[-1])["path"].endswith("film.avi/frame 34")


def test_what_is_no_video_is_one_line(records, tmp_path, monkeypatch):
    bad = tmp_path / "film.mp4"
    bad.write_bytes(b"no video")
    with pytest.raises(FlawmapError, match="is no video"):
        VideoFile(bad, "m", records, 1.0)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(FlawmapError, match=r"pip install 'flawmap\[camera\]'"):
        VideoFile(bad, "m", records, 1.0)


def test_sources_are_told_apart_by_their_names():
    for live in ("usb:0", "usb:12", "rtsp://host/a", "rtsps://host", "http://host:80/x", "https://host"):
        assert is_live(live)
    for other in ("usb", "usb:", "usb:a", "folder", "usb:0/folder", "film.mp4"):
        assert not is_live(other)
    assert is_video("a/film.MP4")
    assert not is_video("a.png")


# Streams


class Stream:
    """An MJPEG stream over HTTP of numbered frames; it remembers when it sent each."""

    def __init__(self, part, rate=20, port=0, buffered=0):
        self.sent, self.rate, self.frozen = {}, rate, False
        self.connections = 0
        stream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stream.connections += 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                with suppress(OSError):
                    for _ in range(buffered):
                        self.wfile.write(stream.next(part))
                    while not stream.ended:
                        if not stream.frozen:
                            self.wfile.write(stream.next(part))
                        time.sleep(1 / stream.rate)

            def log_message(self, *arguments):
                pass

        self.ended, self._number = False, 0
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/live"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def next(self, part):
        number, self._number = self._number, self._number + 1
        out = BytesIO()
        Image.fromarray(numbered(part, number)).save(out, format="JPEG", quality=95)
        self.sent[number] = time.monotonic()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {out.tell()}\r\n\r\n"
        return head.encode() + out.getvalue() + b"\r\n"

    def close(self):
        self.ended = True
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stream(part):
    started = Stream(part)
    yield started
    started.close()


def next_shot(camera):
    return wait_for(camera.take)


def test_a_triggered_frame_is_one_that_came_after_the_trigger(stream):
    camera = Camera(stream.url, every=None)
    try:
        delays = []
        for pause in (0.0, 1.5, 0.3, 0.0, 0.7):
            time.sleep(pause)
            triggered = time.monotonic()
            camera.trigger()
            shot = next_shot(camera)
            assert shot.error is None
            delays.append(stream.sent[number_of(shot.pixels)] - triggered)
            assert camera.take() is None
        # A frame that was on its way when the trigger came may be the one.
        assert min(delays[1:]) > -0.2
        assert shot.pixels.shape == (128, 128, 3)
        assert not camera.finished()
    finally:
        camera.close()


def test_what_was_buffered_when_a_stream_is_opened_is_passed_over(part):
    stream = Stream(part, buffered=40)
    camera = Camera(stream.url, every=None)
    try:
        camera.trigger()
        assert number_of(next_shot(camera).pixels) >= 40
    finally:
        camera.close()
        stream.close()


def test_triggers_that_come_while_another_is_judged_have_frames_of_their_own_time(stream):
    camera = Camera(stream.url, every=None)
    try:
        camera.trigger()
        next_shot(camera)
        times = []
        for _ in range(3):
            times.append(time.monotonic())
            camera.trigger()
            time.sleep(0.4)
        shots = [next_shot(camera) for _ in range(3)]
        for shot, at in zip(shots, times, strict=True):
            assert abs(stream.sent[number_of(shot.pixels)] - at) < 0.35
    finally:
        camera.close()


def test_a_frame_each_interval_is_never_an_old_one(stream):
    camera = Camera(stream.url, every=0.3)
    try:
        next_shot(camera)
        time.sleep(1.5)  # whoever judges is busy; what was taken meanwhile is not handed on later
        camera.take()
        before = time.monotonic()
        shot = next_shot(camera)
        assert stream.sent[number_of(shot.pixels)] > before - 0.2
    finally:
        camera.close()


def test_a_lost_stream_is_opened_again_and_its_triggers_are_errors(part, monkeypatch, caplog):
    monkeypatch.setattr(cameras, "_PATIENCE", 0.5)
    first = Stream(part)
    camera = Camera(first.url, every=None)
    try:
        camera.trigger()
        assert next_shot(camera).error is None
        first.close()
        wait_for(lambda: caplog.messages)
        camera.trigger()
        shot = next_shot(camera)
        assert shot.pixels is None
        assert shot.content == b""
        assert "gave no picture" in shot.error
        second = Stream(part, port=first.port)
        wait_for(lambda: second.connections)
        wait_for(lambda: len(caplog.messages) == 2)
        camera.trigger()
        assert next_shot(camera).error is None
        second.close()
    finally:
        camera.close()
    assert "opened again" in caplog.messages[0]
    assert "again" in caplog.messages[1]


def test_a_stream_that_freezes_gives_errors_and_no_old_frame(stream, monkeypatch):
    monkeypatch.setattr(cameras, "_PATIENCE", 0.5)
    monkeypatch.setattr(cameras, "_TIMEOUT", 1000)
    camera = Camera(stream.url, every=None)
    try:
        camera.trigger()
        assert next_shot(camera).error is None
        stream.frozen = True
        time.sleep(0.3)
        camera.trigger()
        assert next_shot(camera).error is not None
    finally:
        stream.frozen = False
        camera.close()


def test_one_frame_once(stream):
    camera = Camera(stream.url, every=None, once=True)
    try:
        assert not camera.finished()
        assert next_shot(camera).error is None
        assert camera.finished()
        assert camera.take() is None
    finally:
        camera.close()


def test_an_address_is_shown_without_its_password(monkeypatch):
    monkeypatch.setattr(cameras, "_PATIENCE", 0.2)
    camera = Camera("rtsp://joe:s3cr3t@127.0.0.1:1/a?token=s3cr3t", every=None, once=True)
    try:
        shot = next_shot(camera)
    finally:
        camera.close()
    assert "s3cr3t" not in f"{shot}"
    assert shot.source == "watch:rtsp://127.0.0.1:1/a"


def post(url, **headers):
    request = urllib.request.Request(url, b"", headers, method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status


def test_the_key_enter_and_a_post_take_pictures(line_model, stream, tmp_path):
    port, store = free_port(), tmp_path / "store"
    options = ("--store", store, "--trigger-port", port, "--keep", "all")
    with Process(line_model, stream.url, *options) as watch:
        watch.until(lambda it: len(it.out) == 1)
        wait_for(lambda: stream.connections)
        time.sleep(0.5)
        assert len(watch.out) == 1
        watch.process.stdin.write("\n")
        watch.process.stdin.flush()
        watch.until(lambda it: len(it.out) == 2)
        posted = time.monotonic()
        assert wait_for(lambda: tried(f"http://127.0.0.1:{port}/")) == 202
        watch.until(lambda it: len(it.out) == 3)
        assert watch.end(signal.SIGTERM) == 0
    rows = rows_of(store)
    assert len(rows) == 2
    assert {row.source for row in rows} == {f"watch:{stream.url}"}
    assert stream.sent[number_of(kept(store, rows[1]))] > posted - 0.2


def tried(url):
    with suppress(urllib.error.URLError):
        return post(url)
    return None


def test_pages_in_a_browser_trigger_nothing():
    fired = []
    server = on_http(0, lambda: fired.append(1))
    url = f"http://127.0.0.1:{server.server_port}/"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        post(url, Origin="http://elsewhere")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(url, timeout=10)
    assert fired == []
    assert post(url) == 202
    assert fired == [1]
    with pytest.raises(FlawmapError, match="--trigger-port"):
        on_http(server.server_port, lambda: None)
    server.shutdown()
    server.server_close()


def test_watching_a_folder_needs_no_opencv(flawmap, line_model, drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    options = ("--once", "--engine", "onnxruntime", "--store", tmp_path / "store")
    assert flawmap("watch", line_model, drawn / "test" / "good", *options)[0] == 0
    code, _, err = flawmap("watch", line_model, "usb:0", *options)
    assert code == 2
    assert "flawmap[camera]" in err.splitlines()[-1]
    assert not Path("flawmap-records").exists()
