"""From pixels to verdicts, without torch: the inspector, its engines, and the files it reads."""

from flawmap.line.inspector import Inspector

__all__ = ["Inspector"]
