"""What several verbs read of their options, and the checks of output places before any work is done."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flawmap.cli.say import say
from flawmap.ranges import LOWEST_RATE, MOST_PIXELS, SCORES, SEEDS, SIDES

if TYPE_CHECKING:
    from flawmap.datasets import Dataset


class Finite(click.FloatRange):
    """A number within limits; click's own lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, context)
        return number


SEED = click.IntRange(*SEEDS)
SIDE = click.IntRange(*SIDES)
RATE = Finite(LOWEST_RATE, 1, max_open=True)
SCORE = Finite(*SCORES)


def _raise_limit(context: click.Context, option: click.Parameter, most: int | None) -> None:
    if most is not None:
        from flawmap.imaging.decoding import pixel_limit

        context.with_resource(pixel_limit(most))


MAX_PIXELS = click.option(
    "--max-pixels",
    type=click.IntRange(1, MOST_PIXELS),
    metavar="N",
    expose_value=False,
    callback=_raise_limit,
    help="Read images of up to N pixels.  [default: 178000000]",
)
"""For verbs that read images; it holds until the verb ends."""


def _add_plugins(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> None:
    if paths:
        from flawmap.methods.plugins import add_plugin

        for path in paths:
            add_plugin(path)


PLUGIN = click.option(
    "--plugin",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    expose_value=False,
    is_eager=True,
    callback=_add_plugins,
    help="A Python file with a method of your own, which is called by the file's name. It is run.",
)


STORE = click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("flawmap-records"),
    show_default=True,
    help="Folder of the records: pictures, and the database if none is named.",
)
DATABASE = click.option(
    "--database", metavar="URL", help="sqlite:///FILE or postgresql://USER@HOST/NAME; in --store by default."
)
KEEP = click.option(
    "--keep",
    type=click.Choice(["defects", "all", "none"]),
    default="defects",
    show_default=True,
    help="Of which inspections pictures are kept; defects are all that are not good.",
)
KEEP_GB = click.option(
    "--keep-gb", type=Finite(0, 1e6), default=10.0, show_default=True, help="What the pictures may take."
)


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


def check_output(path: Path, option: str = "-o") -> None:
    """Refuses, before any work is done, a place where the result could not be written.

    Raises:
        click.BadParameter: the folder is missing or cannot be written to, or the name is a folder, a socket or a disk.
    """
    if path.is_dir():
        raise click.BadParameter(f"{path} is a folder: give a file name in it", param_hint=option)
    if path.is_socket() or path.is_block_device():
        raise click.BadParameter(f"{path} is no file: give the name of one", param_hint=option)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise click.BadParameter(f"the folder {folder} does not exist: create it first", param_hint=option)
    if not (path.is_fifo() or path.is_char_device() or os.access(folder, os.W_OK)):
        raise click.BadParameter(f"the folder {folder} cannot be written to: choose another", param_hint=option)


def check_model_output(path: Path, option: str = "-o") -> None:
    """`check_output` for a model, which has to be a file.

    Raises:
        click.BadParameter: it is not, or as `check_output`.
    """
    check_output(path, option)
    if path.exists() and not path.is_file():
        raise click.BadParameter(f"{path} is no file: give the name of one", param_hint=option)


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """Refuses, before any work is done, results that would overwrite what is read, or one another.

    Args:
        outputs: the file that each option names, if it was given.
        inputs: files that are read: the model, images, masks, tables.

    Raises:
        click.BadParameter: two of them are the same file, under whatever names.
    """
    places = {option: path for option, path in outputs.items() if path is not None and _replaceable(path)}
    taken: dict[str, str] = {}
    for option, path in places.items():
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise click.BadParameter(f"{path} is also given with {other}: give another name", param_hint=option)
    there = {identity: option for option, path in places.items() if (identity := _identity(path)) is not None}
    if not there:
        return
    for read in inputs:
        if read is not None and (identity := _identity(read)) in there:
            option = there[identity]
            raise click.BadParameter(f"{places[option]} is read: give another name", param_hint=option)


def files_of(dataset: Dataset) -> Iterator[Path]:
    """The images and masks of a data set, and the table that lists them."""
    yield dataset.root
    for sample in dataset.samples:
        yield sample.path
        if sample.mask is not None:
            yield sample.mask


def _replaceable(path: Path) -> bool:
    """Whether something is lost when a result is written there."""
    return not (path.is_char_device() or path.is_fifo())


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def default_model(data: Path, category: str | None) -> Path:
    """The model file of a folder or a table of images where none is named: in the current folder, of the same name.

    Raises:
        click.UsageError: the folder has no name, or something else than a model lies there.
    """
    whole = data.resolve()
    name = category or (whole.stem if whole.suffix.lower() == ".csv" and not whole.is_dir() else whole.name)
    if not name:
        raise click.UsageError(f"{data} has no name to call the model by: give -o MODEL.safetensors")
    path = Path(f"{Path(name).name}.safetensors")
    if path.exists():
        from flawmap.model_file import is_model

        if not is_model(path):
            raise click.UsageError(f"{path} is there and is no model: give -o MODEL.safetensors")
    return path


def say_what_is_replaced(path: Path) -> None:
    """A line about a file that is no model and will be replaced by one."""
    if path.is_file() and path.stat().st_size:
        from flawmap.model_file import is_model

        if not is_model(path):
            say(f"flawmap: {path} is no model of flawmap; it is replaced by one", err=True)


def beside(model: Path) -> Path:
    """The report of a model file: m.html of m.safetensors, and m.v1.html of m.v1."""
    return model.with_suffix(".html") if model.suffix == ".safetensors" else model.with_name(model.name + ".html")
