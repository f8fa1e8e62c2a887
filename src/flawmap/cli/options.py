"""What several verbs read of their options, and the checks of output places before any work is done."""

from __future__ import annotations

from pathlib import Path

import click


def parse_settings(pairs: tuple[str, ...]) -> dict[str, str]:
    """`--set key=value` -> a dictionary.

    Raises:
        click.BadParameter: a pair without `=`.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not key=value", param_hint="--set")
        settings[key.strip()] = value.strip()
    return settings


def parse_grid(pairs: tuple[str, ...]) -> dict[str, list[str]]:
    """`--grid key=a,b` -> the values of each key; those of a key that is given again are added.

    Raises:
        click.BadParameter: a pair without `=`.
    """
    grid: dict[str, list[str]] = {}
    for pair in pairs:
        key, equals, values = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not key=a,b,c", param_hint="--grid")
        grid.setdefault(key.strip(), []).extend(value.strip() for value in values.split(","))
    return grid


def check_output(path: Path) -> None:
    """Refuses, before any work is done, a place where the result could not be written.

    Raises:
        click.BadParameter: the folder is missing, or the name is a folder.
    """
    if path.is_dir():
        raise click.BadParameter(f"{path} is a folder: give a file name in it", param_hint="-o")
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {path.parent} does not exist: create it first", param_hint="-o")
