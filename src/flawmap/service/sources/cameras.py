"""Video files, network streams and cameras, by OpenCV: frames at intervals, or when they are triggered.

A live frame is always one that arrived after it was asked for: a thread takes all frames that come, so that none waits
in a buffer, and hands on those that are wanted.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import FlawmapError
from flawmap.service.records import Records, Seen
from flawmap.service.sources import Shot
from flawmap.text import printable

_LOG = logging.getLogger("flawmap.service")

VIDEO_SUFFIXES = (".avi", ".mp4", ".m4v", ".mkv", ".mov", ".mpg", ".mpeg", ".webm", ".wmv", ".ts")

_USB = re.compile(r"usb:(\d{1,3})")
_TIMEOUT = 5000  # milliseconds that a stream may take to open, or to give a frame
_WAITS = (0.5, 30.0)  # seconds to wait before a stream is opened anew: at first, at most
_PATIENCE = 5.0  # seconds that a trigger waits for a frame
_BUFFERED = 1.0  # seconds after opening in which frames come out of a buffer, and are passed over
_TRIGGERED = 32  # frames that may wait to be judged


def is_live(source: str) -> bool:
    """Whether a source is a camera or a stream by its name, which no folder has."""
    return _USB.fullmatch(source) is not None or source.startswith(("rtsp://", "rtsps://", "http://", "https://"))


def is_video(source: str) -> bool:
    """Whether a source is a video file by its name."""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES


class VideoFile:
    """A `Source`: a frame at each interval of the video's own time, each once."""

    def __init__(self, path: Path, model: str, records: Records, every: float) -> None:
        """
        Args:
            path: the file.
            model: the name of the model.
            records: say which frames were judged before.
            every: seconds between frames; 0 for all of them.

        Raises:
            FlawmapError: it is no video, or OpenCV is not installed.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise FlawmapError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        cv2 = _opencv()
        self._video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._video.isOpened():
            raise FlawmapError(f"{path}: is no video that OpenCV can read; convert it, or check that it is whole")
        self._cv2, self._path, self._records, self._every = cv2, path, records, every
        rate = self._video.get(cv2.CAP_PROP_FPS)
        self._rate = rate if math.isfinite(rate) and rate > 0 else 25.0
        self._place = f"{model}:{printable(os.path.realpath(path))}"[-500:]
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._frame = 0  # the number of the next one
        self._next = 0.0  # when the next one to judge is shown
        self._taken: Seen | None = None  # the one that the video stands at
        self._ended = False

    def take(self) -> Shot | None:
        """As `Source.take`."""
        while not self._ended:
            if self._taken is None and not self._advance():
                break
            assert self._taken is not None
            seen = self._taken
            if self._records.was_seen([seen])[0]:
                self._taken = None
                continue
            self._taken = None
            whole, frame = self._video.retrieve()
            if not whole:
                break
            source = f"watch:{printable(self._path.name)}"[:200]
            pixels, content = _as_png(self._cv2, frame)
            return Shot(source, seen.name, self._path / seen.name, content, pixels, seen=seen)
        self._ended = True
        return None

    def judged(self, shot: Shot, verdict: str | None) -> None:
        """As `Source.judged`."""

    def finished(self) -> bool:
        """As `Source.finished`."""
        return self._ended

    def close(self) -> None:
        """As `Source.close`."""
        self._video.release()

    def _advance(self) -> bool:
        """Goes on to the next frame to judge; False at the end."""
        while self._video.grab():
            shown = self._frame / self._rate
            number, self._frame = self._frame, self._frame + 1
            if shown >= self._next - 0.5 / self._rate:
                self._next += self._every
                self._taken = Seen(self._place, f"frame {number}", *self._stamp)
                return True
        return False


class Camera:
    """A `Source`: a stream or a USB camera, opened anew whenever it is lost."""

    def __init__(
        self, address: str, *, every: float | None, once: bool = False, wake: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            address: `usb:0`, or an URL of rtsp or http.
            every: seconds between frames; None for frames that are triggered alone.
            once: whether it is finished after one frame.
            wake: called when there is a frame to take.

        Raises:
            FlawmapError: OpenCV is not installed.
        """
        self._cv2 = _opencv()
        self._address, self._every, self._once, self._wake = address, every, once, wake
        self._shown = _without_password(address)
        self._asked: deque[tuple[float, bool]] = deque()  # when, and whether by a trigger
        self._frames: queue.SimpleQueue[tuple[float, NDArray[Any] | None]] = queue.SimpleQueue()
        self._timed = False  # a frame is asked for by time, and has not come
        self._next = 0.0
        self._done = self._closing = self._lost = False
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def trigger(self) -> None:
        """Asks for a frame. Where none comes in time, that is an inspection with the verdict "error"."""
        self._asked.append((time.monotonic(), True))

    def take(self) -> Shot | None:
        """As `Source.take`."""
        at = time.monotonic()
        due = (self._every is not None and at >= self._next) or (self._once and self._next == 0.0)
        if due and not self._timed and not self._done:
            self._next = at + (self._every or math.inf)
            self._timed = True
            self._asked.append((at, self._once))
        try:
            moment, frame = self._frames.get_nowait()
        except queue.Empty:
            return None
        self._timed, self._done = False, self._once
        name = datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
        source, shown = f"watch:{self._shown}"[:200], Path(f"{self._shown.rpartition('://')[2]} {name}")
        if frame is None:
            error = f"{self._shown}: gave no picture in {_PATIENCE:g} s; check the camera and its cable"
            return Shot(source, name, shown, b"", None, error)
        pixels, content = _as_png(self._cv2, frame)
        return Shot(source, name, shown, content, pixels)

    def judged(self, shot: Shot, verdict: str | None) -> None:
        """As `Source.judged`."""

    def finished(self) -> bool:
        """As `Source.finished`."""
        return self._done

    def close(self) -> None:
        """As `Source.close`."""
        self._closing = True
        self._thread.join(2 * _TIMEOUT / 1000)

    # In the camera's thread

    def _run(self) -> None:
        wait = _WAITS[0]
        while not self._closing:
            video = self._opened()
            if video.isOpened():
                started = time.monotonic()
                self._read(video)
                if time.monotonic() - started > _WAITS[1]:
                    wait = _WAITS[0]
            video.release()
            if self._closing:
                return
            if not self._lost:
                _LOG.warning("%s: gives no pictures; it is opened again and again", self._shown)
            self._lost = True
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and not self._closing:
                self._give_up()
                time.sleep(0.05)
            wait = min(2 * wait, _WAITS[1])

    def _opened(self) -> Any:
        cv2 = self._cv2
        if match := _USB.fullmatch(self._address):
            video = cv2.VideoCapture(int(match[1]))
            video.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            return video
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT]
        return cv2.VideoCapture(self._address, cv2.CAP_FFMPEG, limits)

    def _read(self, video: Any) -> None:
        """Takes frames until there are none."""
        opened = time.monotonic()
        while not self._closing:
            before = time.monotonic()
            if not video.grab():
                return
            after = time.monotonic()
            if after - opened < _BUFFERED:
                continue
            if self._lost:
                _LOG.warning("%s: gives pictures again", self._shown)
                self._lost = False
            if self._asked and self._asked[0][0] <= after:
                self._hand_on(video, before, after)

    def _hand_on(self, video: Any, before: float, after: float) -> None:
        """Hands on the frame that came from `before` to `after`, to whoever asked before it came."""
        whole, frame = video.retrieve()
        while whole and self._asked and self._asked[0][0] <= before:
            self._asked.popleft()
            self._put(frame)
        self._give_up()

    def _give_up(self) -> None:
        """Answers triggers that no frame has come for in time."""
        while self._asked and time.monotonic() - self._asked[0][0] > _PATIENCE:
            triggered = self._asked.popleft()[1]
            if triggered:
                self._put(None)
            else:
                self._timed = False

    def _put(self, frame: NDArray[Any] | None) -> None:
        if self._frames.qsize() >= _TRIGGERED:
            _LOG.warning("%s: is triggered faster than can be judged; a trigger is passed over", self._shown)
            return
        self._frames.put((time.time(), frame))
        self._wake()


def _without_password(address: str) -> str:
    """A camera's address as it may be shown: the query may hold a password too."""
    if _USB.fullmatch(address):
        return address
    parts = urlsplit(address)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return printable(f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}")


def _as_png(cv2: ModuleType, frame: NDArray[Any]) -> tuple[NDArray[np.uint8], bytes]:
    """A frame of OpenCV's as pixels, grey or RGB, and as the bytes of a picture that holds just these."""
    pixels: NDArray[np.uint8] = frame if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    out = BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return pixels, out.getvalue()


def _opencv() -> ModuleType:
    # FFmpeg prints addresses, with what passwords are in them.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise FlawmapError(
            "cameras and videos need OpenCV, which is not installed: pip install 'flawmap[camera]'"
        ) from error
    return cv2
