"""What a method is, costs and can be set to, in lines for the terminal."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from flawmap.methods import Method
    from flawmap.methods.catalogue import Entry

_BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "to below {}"}


def method_lines(entry: Entry) -> list[str]:
    """Its paper, when to take it, its cost, its settings and presets, and where it differs from the paper."""
    method = entry.load()
    told, differs = _about(method)
    lines = [f"{entry.name}: {entry.paper}", f"when: {entry.when}", "", *told, "", "cost:"]
    lines += [f"  {line}" for line in _cost(method)]
    lines += ["", "settings, by --set NAME=VALUE:", *_settings(method)]
    if method.presets:
        lines += ["", "presets, by --preset NAME:", *_presets(method)]
    return [*lines, "", *differs] if differs else lines


def _about(method: type[Method]) -> tuple[list[str], list[str]]:
    """The docstring of the method's file: the lines before those on how it differs from the paper, and those."""
    paragraphs = (sys.modules[method.__module__].__doc__ or "").strip().split("\n\n")
    cut = next((i for i, paragraph in enumerate(paragraphs) if "setting" in paragraph), len(paragraphs))
    before, after = ("\n\n".join(part).splitlines() for part in (paragraphs[:cut], paragraphs[cut:]))
    return before, after


def _cost(method: type[Method]) -> Iterator[str]:
    from flawmap.methods import Method

    if method.optimises:
        yield "trains by gradient, and so holds out a fifth of the good images for calibration;"
        yield "--calibration crossfit holds out none, and trains once more for each fold"
    elif method.leave_one_out is not Method.leave_one_out:
        yield "collects in one pass, without training by gradient; calibration leaves each good image out"
        yield "in closed form, where settings and memory allow it, and else collects anew for each fold"
    else:
        yield "collects in one pass, without training by gradient; calibration collects anew for each fold"
    if method.tunes:
        yield "changes the backbone, so what is learnt after that takes its features anew"
    if not method.localises:
        yield "judges whole images: there is no map"
    if method.positional:
        yield "learns each place by itself: parts have to lie alike"
    yield f"{'learns' if method.updates else 'cannot learn'} further images later (--update)"
    yield f"can be moved after training: {', '.join(method.live) or 'nothing'}"


def _settings(method: type[Method]) -> list[str]:
    fields = method.Config.model_fields
    rows = [(name, _default(field), _values(field), field.description or "") for name, field in fields.items()]
    rows.insert(0, ("NAME", "default", "values", "meaning"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def _default(field: FieldInfo) -> str:
    if field.default is None:
        return "auto" if _is_list(field) else "none"
    return _text(field.default)


def _values(field: FieldInfo) -> str:
    """What a setting can be, in words."""
    kinds = [kind for kind in _kinds(field) if kind is not types.NoneType]
    if _is_list(field):
        return "names, separated by commas"
    if bool in kinds:
        return "true, false"
    if choices := [_text(choice) for kind in kinds for choice in typing.get_args(kind)]:
        return ", ".join(choices)
    if not {int, float} & set(kinds):
        return "a path"
    bounds = [
        words.format(_text(getattr(limit, name)))
        for name, words in _BOUNDS.items()
        for limit in field.metadata
        if hasattr(limit, name)
    ]
    return " ".join(bounds)


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    kind = field.annotation
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _is_list(field: FieldInfo) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in _kinds(field))


def _presets(method: type[Method]) -> list[str]:
    rows = [("NAME", "setting", "value", "source")]
    for name, preset in method.presets.items():
        rows += [(name, one.setting, one.value or "none", one.source) for one in preset.choices]
        rows += [] if preset.choices else [(name, "-", "-", "the defaults")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def _text(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)
