"""Methods that are not of this package.

They come from installed packages, by entry points of the group `flawmap.methods` (name -> `module:Class`), and from
files that the user names, see `add_plugin`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from flawmap.errors import FlawmapError
from flawmap.methods.catalogue import METHODS, Entry
from flawmap.methods.contract import Method

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
