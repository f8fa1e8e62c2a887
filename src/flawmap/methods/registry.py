"""The methods by name. A method's file is imported when it is first asked for."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flawmap.errors import FlawmapError
from flawmap.methods.catalogue import Entry
from flawmap.methods.contract import Config, Method
from flawmap.methods.plugins import known_methods
from flawmap.methods.presets import Preset


def automatic(tiled: bool) -> tuple[str, str]:
    """What `--method auto` stands for, and why, in one line."""
    if tiled:
        return "patchcore", "all windows of an image share their places, so a bank of patches alone"
    return "gaussbank", "a Gaussian at each place and a bank of patches together"


def entry_of(name: str) -> Entry:
    """Raises FlawmapError for a name that is not registered."""
    known = known_methods()
    if name not in known:
        raise FlawmapError(
            f"unknown method {name}: choose {', '.join(sorted(known))}, or name the file of your own with --plugin"
        )
    return known[name]


def method_class(name: str) -> type[Method]:
    """Raises FlawmapError for a name that is not registered."""
    return entry_of(name).load()


def preset_of(method: type[Method], name: str | None) -> Preset:
    """The preset of a name; an empty one for None and "default".

    Raises:
        FlawmapError: there is none.
    """
    if name not in (None, "default", *method.presets):
        raise FlawmapError(f"unknown preset {name}: choose {', '.join(('default', *method.presets))}")
    return method.presets.get(name or "default", Preset())


def configure(method: type[Method], settings: Mapping[str, Any], preset: str | None = None) -> Config:
    """The method's settings: its defaults, then the preset's, then the user's.

    Values may be text, as they come from the command line: lists are separated by commas.

    Raises:
        FlawmapError: an unknown preset or key, or a value that the key cannot take.
    """
    chosen = {}
    for key, value in {**preset_of(method, preset).settings, **settings}.items():
        field = method.Config.model_fields.get(key)
        if field is None:
            raise FlawmapError(f"unknown setting {key}: choose {', '.join(method.Config.model_fields)}")
        chosen[key] = _from_text(value, field.annotation) if isinstance(value, str) else value
    try:
        return method.Config(**chosen)
    except ValidationError as error:
        first = error.errors()[0]
        told = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise FlawmapError(f"the settings do not go together: {told}") from error
        key = str(first["loc"][0])
        raise FlawmapError(f"setting {key}={settings.get(key)} is not valid: {told.lower()}") from error


def _from_text(text: str, annotation: Any) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and text.lower() in ("none", "auto"):
        return None
    choices = [
        choice
        for option in options
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
    if choices:
        return next((choice for choice in choices if str(choice) == text), text)
    if any(typing.get_origin(option) is tuple for option in options):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text
