"""Where `flawmap watch` has its pictures from: folders, video files, cameras."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from flawmap.service.records import Seen


@dataclass(frozen=True)
class Shot:
    """A picture that is to be judged.

    Attributes:
        source: the place it comes from, as the records call it.
        name: what it is called there.
        shown: what a line about it calls it.
        content: the bytes that `pixels` were decoded from; none where there is no picture.
        pixels: (H, W) or (H, W, 3), uint8 or uint16; None where it cannot be judged.
        error: why, in one line.
        seen: what keeps it from being judged twice; None where nothing comes again.
    """

    source: str
    name: str
    shown: Path
    content: bytes = field(repr=False)
    pixels: NDArray[Any] | None = field(repr=False)
    error: str | None = None
    seen: Seen | None = None


class Source(Protocol):
    """A place that pictures come from. It is asked from one thread."""

    def take(self) -> Shot | None:
        """The next picture; None where there is none now. It does not wait for one.

        Raises:
            DatabaseGoneError: what was judged before cannot be told now; ask again.
        """

    def judged(self, shot: Shot, verdict: str | None) -> None:
        """Called when the inspection of a shot is committed; `verdict` is None where another process was quicker."""

    def finished(self) -> bool:
        """Whether nothing more will come."""

    def close(self) -> None:
        """Lets go of what it holds."""
