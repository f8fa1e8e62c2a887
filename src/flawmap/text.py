"""Names and counts as they may be printed: whatever a file is called, it takes one line and moves no cursor."""

from __future__ import annotations

import os
import unicodedata

# Controls, surrogates, and the separators of lines and paragraphs. What joins and turns letters is part of scripts.
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")


def printable(name: str | os.PathLike[str]) -> str:
    """A name, with escapes for what a terminal would not show but obey."""
    text = os.fspath(name)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(sign) if unicodedata.category(sign) in _UNSEEN else sign for sign in text)


def cell(value: object) -> str:
    """A text for a cell of a CSV table; a spreadsheet would compute what begins like a formula, so that is quoted."""
    text = printable(str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def counted(count: int, one: str, many: str | None = None) -> str:
    """ "1 image" or "2 images"; `many` where the plural is not `one` and an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape", "surrogatepass").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
