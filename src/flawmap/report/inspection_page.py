"""The page beside an inspection's drawings: every image, worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from flawmap.errors import FlawmapError
from flawmap.imaging.own_files import OVERLAY
from flawmap.judging.inspection import Inspection
from flawmap.report.drawings import small_picture
from flawmap.report.page import Legend, write_page
from flawmap.text import printable

INDEX = "index.html"
_SCORED = "scored"  # of an image without a verdict
_ORDER = ("defect", "unsure", "error", "good", _SCORED)
_GENERATOR = b'<meta name="generator" content="flawmap'


@dataclass(frozen=True)
class Inspected:
    """What the page says of one image.

    Attributes:
        name: the image below its source.
        verdict, score, p_value: as `Inspection`; "scored" where there is no verdict.
        regions, largest: how many, and the pixels of the largest; 0 where there is none.
        overruled: as `Inspection.overruled`.
        reason: why it could not be judged; empty where it was.
        small, overlay: links relative to the page; None where there is no such picture.
        width, height: of the small picture.
    """

    name: str
    verdict: str
    score: float | None
    p_value: float | None
    regions: int
    largest: int
    overruled: bool
    reason: str
    small: str | None
    overlay: str | None
    width: int = 0
    height: int = 0


def inspected(folder: Path, image: Path, name: Path, inspection: Inspection) -> Inspected:
    """One image of the page, after its drawings were written.

    Args:
        folder: the output folder.
        image: the image below its source.
        name: of its drawings, see `drawing_names`.
    """
    small, overlay = small_picture(folder, name), folder / name.with_name(name.name + OVERLAY)
    width = height = 0
    if inspection.pixels is not None and small.exists():
        with Image.open(small) as picture:
            width, height = picture.size
    return Inspected(
        printable(image.as_posix()),
        inspection.verdict or _SCORED,
        inspection.score,
        inspection.p_value,
        len(inspection.regions),
        max((region.area for region in inspection.regions), default=0),
        inspection.overruled,
        printable((inspection.error or "").removeprefix(f"{inspection.path}: ")),
        _link(small, folder) if width else None,
        _link(overlay, folder) if inspection.maps is not None and overlay.exists() else None,
        width,
        height,
    )


def _link(path: Path, folder: Path) -> str:
    return quote(path.relative_to(folder).as_posix(), errors="surrogateescape")


def check_index(folder: Path) -> None:
    """Raises FlawmapError where the page would replace one that is not flawmap's."""
    page = folder / INDEX
    if not page.is_file():
        return
    with page.open("rb") as file:
        if _GENERATOR not in file.read(1024):
            raise FlawmapError(
                f"{page} was not written by flawmap and would be replaced: choose another folder with -o"
            )


def write_index(
    folder: Path,
    items: Sequence[Inspected],
    *,
    model: str,
    digest: str | None,
    describe: str,
    legend: Legend | None,
    finished: bool = True,
) -> None:
    """Writes the page.

    Args:
        folder: where the drawings are.
        items: in any order.
        model, digest: of the model file.
        describe: what the threshold promises.
        legend: what colours mean; None for a method without maps.
        finished: whether all images were reached.

    Raises:
        FlawmapError: it cannot be written.
    """
    ordered = sorted(items, key=lambda item: (_ORDER.index(item.verdict), -(item.score or 0.0), item.name))
    counts = {verdict: sum(item.verdict == verdict for item in items) for verdict in _ORDER}
    filters = [("all", len(items)), *((verdict, count) for verdict, count in counts.items() if count)]
    values: Mapping[str, object] = {
        "model": model,
        "digest": digest[:12] if digest else "",
        "describe": describe,
        "counts": counts,
        "all": len(items),
        "filters": filters,
        "items": ordered,
        "legend": legend,
        "unfinished": not finished,
    }
    write_page(folder / INDEX, "inspection.html", **values)
