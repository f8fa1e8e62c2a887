"""Pictures that flawmap itself wrote, told by a mark in the file, so that they are never taken for parts."""

from __future__ import annotations

from pathlib import Path

OVERLAY, MAP = "_overlay.png", "_map.png"
"""How the names of heatmaps and maps end."""
SMALL = "index_files"
"""The folder of the small pictures, beside the page that shows them."""
JPEG_MARK = b"written by flawmap"
"""The comment of a JPEG that flawmap writes."""
OWN = "flawmap"
"""What a PNG that flawmap writes names as its software."""
_MARKS = (b"Software\x00" + OWN.encode(), JPEG_MARK)
_HEAD = 256  # bytes: the mark comes before the pixels


def is_own(path: Path) -> bool:
    """Whether flawmap wrote a picture: a heatmap, a map, or a small one for its page; False where it cannot be read.

    Only files that are called as those are are looked into.
    """
    if not (path.name.endswith((OVERLAY, MAP)) or SMALL in path.parts) or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return any(mark in head for mark in _MARKS)
