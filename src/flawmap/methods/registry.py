"""The methods by name. A method's file is imported when it is first asked for.

Further ones come from installed packages, by entry points of the group `flawmap.methods` (name -> `module:Class`), and
from files that the user names, see `add_plugin`.
"""

from __future__ import annotations

import importlib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
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
        """Raises FlawmapError where a method that is not of this package cannot be had."""
        module, _, attribute = self.location.partition(":")
        try:
            method = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if self.name in METHODS:
                raise
            raise FlawmapError(
                f"method {self.name} {self.paper} cannot be imported ({error}): install it anew"
            ) from error
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise FlawmapError(f"method {self.name} {self.paper} is no subclass of flawmap.methods.Method: mend it")
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


ENTRY_POINTS = "flawmap.methods"

_from_files: dict[str, Entry] = {}


def known_methods() -> dict[str, Entry]:
    """All methods by name: those here, those of installed packages, those of files that the user named."""
    return {**METHODS, **_installed(), **_from_files}


@lru_cache(1)
def _installed() -> dict[str, Entry]:
    found = entry_points(group=ENTRY_POINTS)
    return {
        one.name: Entry(one.name, one.value, f"of {one.dist.name if one.dist else one.module}", "see its own documents")
        for one in sorted(found, key=lambda one: one.name)
        if one.name not in METHODS
    }


def add_plugin(path: Path) -> Entry:
    """Makes the one method that a Python file holds known, under the file's name.

    The file is run, as any program that the user starts.

    Raises:
        FlawmapError: it cannot be run, holds no method or several, or its name is taken or none that a method can have.
    """
    name = path.stem
    if not name.isidentifier() or name in METHODS or name == "auto":
        taken = "is the name of another method" if name.isidentifier() else "is no name of a method"
        raise FlawmapError(f"{path}: {name} {taken}; rename the file")
    module_name = f"flawmap_plugin_{name}"
    spec = spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FlawmapError(f"{path}: is no Python file; give one that holds a method")
    module = module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise FlawmapError(f"{path}: cannot be run ({type(error).__name__}: {error}); mend it") from error
    methods = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
    ]
    if len(methods) != 1:
        held = "no method" if not methods else f"{len(methods)} methods ({', '.join(methods)})"
        raise FlawmapError(f"{path}: holds {held}; give a file with one subclass of flawmap.methods.Method")
    entry = Entry(name, f"{module_name}:{methods[0]}", f"of {path.name}", "see its file")
    _from_files[name] = entry
    return entry


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
