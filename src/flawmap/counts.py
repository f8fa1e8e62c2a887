"""Counts with their nouns, in the singular or the plural."""

from __future__ import annotations


def counted(count: int, one: str, many: str | None = None) -> str:
    """ "1 image" or "2 images"; `many` where the plural is not `one` and an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"
