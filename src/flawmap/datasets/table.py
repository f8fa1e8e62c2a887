"""Data sets listed in a table, a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

from flawmap.datasets.assembling import assembled, hold_out
from flawmap.datasets.names import GOOD_NAMES, TEST_NAMES, TRAIN_NAMES
from flawmap.datasets.pairing import mask_notes
from flawmap.datasets.samples import Dataset, Sample, first_few
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.image_files import open_regular

TABLE_SUFFIXES = (".csv", ".tsv")

_COLUMNS = ("path", "label", "mask", "split", "object")
_ALSO_CALLED = {"image": "path"}  # in the tables of VisA
_DELIMITERS = ",;\t"


def read_table(table: Path, category: str | None) -> Dataset:
    """The data set that a CSV file lists.

    Raises:
        FlawmapError: a faulty table, a missing file, no good images, or a missing or unknown category.
    """
    good: list[Sample] = []
    names: list[str] = []
    defects: list[Sample] = []
    notes: list[str] = []
    trained: list[Path] = []
    lines: dict[Path, int] = {}
    any_split = False
    for line, row in _chosen(table, category):
        where = f"{table}, line {line}"
        label, split = row["label"], row["split"].lower()
        path = _listed_file(table, row["path"], where)
        if path in lines:
            raise FlawmapError(f"{where}: {row['path']} is in line {lines[path]} already; remove one of the two")
        lines[path] = line
        if not label:
            raise FlawmapError(f"{where}: the label is empty; write good or the kind of defect")
        if split not in ("", *TRAIN_NAMES, *TEST_NAMES):
            raise FlawmapError(f"{where}: the split is {row['split']!r}; write train, test or nothing")
        any_split = any_split or bool(split)
        if label.lower() in (*GOOD_NAMES, "0"):
            good.append(Sample(path, "test" if split in TEST_NAMES else "train", 0, "good"))
            names.append(row["path"].replace("\\", "/"))
        elif split in TRAIN_NAMES:
            trained.append(path)
        else:
            mask = _listed_file(table, row["mask"], where) if row["mask"] else None
            defects.append(Sample(path, "test", 1, label, mask))
    if trained:
        notes.append(f"defective images of the train split are left out: {first_few(trained)}")
    notes += mask_notes(defects, {})
    if defects and not any_split:
        good = hold_out(good, names, notes)
    return assembled(table, "CSV table", good, defects, notes)


def _chosen(table: Path, category: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of one category, where the table has an `object` column; else all rows."""
    rows = list(_rows(table))
    objects = sorted({row["object"] for _, row in rows if row["object"]})
    if category is None and len(objects) > 1:
        raise FlawmapError(f"{table}: lists several data sets; choose one category of: {', '.join(objects)}")
    if category is not None and not objects:
        raise FlawmapError(f"{table}: has no column object; leave out the category {category!r}")
    if category is not None and category not in objects:
        raise FlawmapError(f"{table}: has no category {category!r}; it has: {', '.join(objects)}")
    return (one for one in rows if category is None or one[1]["object"] == category)


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a table; every row has all columns, stripped, "" where empty or absent."""
    line = 1
    try:
        # Not before it is read whole: what cannot be decoded is told with the line before it.
        with io.TextIOWrapper(open_regular(table), encoding=_encoding(table), newline="") as file:
            first = file.readline()
            if first.lower().startswith("sep="):  # for spreadsheet programs
                first = file.readline()
            header, delimiter = _header(first)
            if "path" not in header or "label" not in header:
                raise FlawmapError(
                    f"{table}, line 1: the columns are {header}; the first line must be path,label,mask,split "
                    "(mask and split may be left out)"
                )
            reader = csv.DictReader(file, header, strict=True, delimiter=delimiter)
            for row in reader:
                line = reader.line_num + 1
                if None in row:
                    raise FlawmapError(
                        f"{table}, line {line}: more values than columns; put values that hold a "
                        f"{'tab' if delimiter == chr(9) else 'comma' if delimiter == ',' else 'semicolon'} in quotes"
                    )
                yield line, {column: (row.get(column) or "").strip() for column in _COLUMNS}
    except UnicodeDecodeError as error:
        raise FlawmapError(f"{table}, after line {line}: is not UTF-8; save the table as CSV UTF-8") from error
    except csv.Error as error:
        raise FlawmapError(f"{table}, after line {line}: is not CSV ({error}); mend the line or its quotes") from error
    except ImageError as error:
        raise FlawmapError(str(error)) from error
    except OSError as error:
        raise FlawmapError(f"{table}: cannot be read ({error.strerror}); check its permissions") from error


def _encoding(table: Path) -> str:
    """UTF-8, with or without the mark that spreadsheet programs begin a file with; or UTF-16, if that mark says so."""
    with open_regular(table) as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _header(line: str) -> tuple[list[str], str]:
    """The columns, and what separates them: whichever of the delimiters makes the most of them."""

    def columns(delimiter: str) -> list[str]:
        named = [column.strip().lower() for column in next(csv.reader([line], delimiter=delimiter), [])]
        return [_ALSO_CALLED.get(column, column) if "path" not in named else column for column in named]

    delimiter = max(_DELIMITERS, key=lambda one: sum(column in _COLUMNS for column in columns(one)))
    return columns(delimiter), delimiter


def _listed_file(table: Path, name: str, where: str) -> Path:
    """Relative to the table's folder, or, as in the tables of VisA, to one of the two above it."""
    if not name:
        raise FlawmapError(f"{where}: the path is empty; write the image's path or remove the line")
    name = name.replace("\\", "/")
    above = [Path(os.path.normpath(table.parent / up / name)) for up in ("..", "../..")]
    paths = [table.parent / name, *above]
    found = next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113 (a long name makes Path.is_file raise)
    if found is None:
        raise FlawmapError(f"{where}: {paths[0]} does not exist; paths are relative to the table's folder")
    return found
