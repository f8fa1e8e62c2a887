"""The methods by name. A method's file is imported when it is first asked for."""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flawmap.errors import FlawmapError
from flawmap.methods.contract import Config, Method
from flawmap.methods.presets import Preset


@dataclass(frozen=True)
class Entry:
    """One method: where its class is, the paper it follows, and when to take it, in one clause."""

    name: str
    location: str
    paper: str
    when: str

    def load(self) -> type[Method]:
        module, _, attribute = self.location.partition(":")
        method: type[Method] = getattr(importlib.import_module(module), attribute)
        return method


METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "cainnflow",
            "flawmap.methods.cainnflow:CAINNFlow",
            "Yan et al., arXiv 2206.01992",
            "hundreds of good images: of the flows the quickest, and the first in image AUROC on tiles",
        ),
        Entry(
            "cfa",
            "flawmap.methods.cfa:CFA",
            "Lee et al., IEEE Access 2022",
            "a small model: a tenth of the numbers of patchcore's bank; behind it in image AUROC on tiles",
        ),
        Entry(
            "cflow",
            "flawmap.methods.cflow:CFlow",
            "Gudovskiy et al., WACV 2022",
            "hundreds of good images: finds regions on tiles as well as cainnflow, at four times its training",
        ),
        Entry(
            "cls_cnf",
            "flawmap.methods.cls_cnf:ClsCnf",
            "Oh & Kim, IEEE Access 2024",
            "marking regions: the best AUPRO and pixel AP on tiles, at the longest training",
        ),
        Entry(
            "differnet",
            "flawmap.methods.differnet:DifferNet",
            "Rudolph et al., WACV 2021",
            "verdicts on whole images, where no map is needed",
        ),
        Entry(
            "draem",
            "flawmap.methods.draem:DRAEM",
            "Zavrtanik et al., ICCV 2021",
            "nothing pretrained may be used, and photographs of textures are at hand",
        ),
        Entry(
            "f2r",
            "flawmap.methods.f2r:F2R",
            "Zhu et al., IEEE Access 2023",
            "to move the weight of what is there and where it is after training",
        ),
        Entry(
            "gaussbank",
            "flawmap.methods.gaussbank:Gaussbank",
            "of PaDiM's and PatchCore's parts",
            "the default: the best mean of image AUROC and AUPRO over the sets measured",
        ),
        Entry(
            "padim",
            "flawmap.methods.padim:PaDiM",
            "Defard et al., ICPR 2021",
            "parts that all lie alike: quick to learn, best on boards; not for parts in any pose",
        ),
        Entry(
            "patchcore",
            "flawmap.methods.patchcore:PatchCore",
            "Roth et al., CVPR 2022",
            "windows of large images (--tile); on parts in any pose about level with gaussbank",
        ),
        Entry(
            "pouta",
            "flawmap.methods.pouta:POUTA",
            "Wang et al., TCSVT 2024",
            "nothing pretrained may be used: sharp outlines, ahead of draem in image AUROC, minutes to train",
        ),
    )
}


def automatic(tiled: bool) -> tuple[str, str]:
    """What `--method auto` stands for, and why, in one line."""
    if tiled:
        return "patchcore", "all windows of an image share their places, so a bank of patches alone"
    return "gaussbank", "a Gaussian at each place and a bank of patches together"


def entry_of(name: str) -> Entry:
    """Raises FlawmapError for a name that is not registered."""
    if name not in METHODS:
        raise FlawmapError(f"unknown method {name}: choose {', '.join(sorted(METHODS))}")
    return METHODS[name]


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
