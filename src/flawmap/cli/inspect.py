"""flawmap inspect"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from flawmap.judging.inspection import Inspection
    from flawmap.report.overlays import HeatScale

SCHEMA = 1
"""Of a JSON line: it grows by further keys, and is counted up where one changes its meaning or goes."""

_COLUMNS = ("path", "verdict", "score", "p_value", "threshold", "regions", "milliseconds", "error")


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SOURCE...")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for heatmaps and maps.")
@click.option("--format", "form", type=click.Choice(["table", "jsonl", "csv"]), default="table", show_default=True)
@click.option("--max-false-reject", type=float, help="Another false-reject rate than the model was trained for.")
@click.option("--guarantee", type=click.Choice(["marginal", "confidence"]), help="What that rate promises.")
@click.option("--threshold", type=float, help="A threshold on the raw score.")
@click.option("--tail", is_flag=True, help="Estimate the threshold from the tail of the scores; promises nothing.")
@click.option(
    "--unsure",
    is_flag=True,
    help="Call a score between the conformal threshold and the tail's unsure, rather than good or defect.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Move a setting that training leaves open; repeatable.",
)
@click.option("--coco", type=click.Path(path_type=Path, dir_okay=False), help="Write the regions as a COCO file.")
@click.option(
    "--fail-on-defect", is_flag=True, help="Exit with 4 when a defect was found, else with 3 when one is unsure."
)
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be judged.")
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def inspect_command(
    model: Path,
    sources: tuple[Path, ...],
    output: Path | None,
    form: str,
    max_false_reject: float | None,
    guarantee: str | None,
    threshold: float | None,
    tail: bool,
    unsure: bool,
    settings: tuple[str, ...],
    coco: Path | None,
    fail_on_defect: bool,
    strict: bool,
    engine: str,
    device: str,
) -> int:
    """Inspect image files and folders with a trained MODEL, .safetensors or .onnx.

    With -o, each image gets a heatmap <name>_overlay.png and a 16-bit map <name>_map.png, below the same folders.
    """
    from flawmap.cli.options import check_output, check_outputs, parse_settings
    from flawmap.cli.progress import quiet_libraries

    quiet_libraries()
    moved: dict[str, Any] = dict(parse_settings(settings))
    if max_false_reject is not None and threshold is not None:
        raise click.UsageError("give --max-false-reject or --threshold, not both")
    if threshold is not None and (tail or unsure):
        raise click.UsageError("--tail and --unsure need thresholds of the calibration: leave --threshold out")
    if tail and guarantee is not None:
        raise click.UsageError("a tail promises nothing: give --tail or --guarantee, not both")
    if coco is not None:
        check_output(coco, "--coco")
    from flawmap.errors import FlawmapError
    from flawmap.imaging.image_files import find_images

    found: list[tuple[Path, Path]] = []  # each image with its name below the output folder
    for source in sources:
        below = [(path, path.relative_to(source)) for path in find_images(source)] if source.is_dir() else []
        if source.is_dir() and not below:
            raise FlawmapError(f"{source} holds no images: give a folder or files of JPEG, PNG, BMP, TIFF or WebP")
        found += below or [(source, Path(source.name))]
    check_outputs({"--coco": coco}, [model, *(path for path, _ in found)])
    taken: dict[Path, Path] = {}
    for path, name in found:
        if output is not None and taken.setdefault(name, path) != path:
            raise FlawmapError(
                f"{taken[name]} and {path} would get the same heatmap {name}: inspect them one after the other"
            )
    if not any(path.exists() for path, _ in found):
        raise FlawmapError(f"{found[0][0]} does not exist: check the path")

    from flawmap.line import Inspector

    inspector = Inspector.load(model, engine=engine, device=device)
    if moved:
        inspector = inspector.with_settings(**moved)
    if threshold is not None:
        inspector = inspector.with_threshold(threshold=threshold)
    elif max_false_reject is not None or guarantee is not None or tail or unsure:
        rate = inspector.judge.max_false_reject if max_false_reject is None else max_false_reject
        inspector = inspector.with_threshold(max_false_reject=rate, guarantee=guarantee, tail=tail, unsure=unsure)
    assert inspector.judge.threshold is not None
    write = _Writer(form, max(len(str(path)) for path, _ in found), inspector.digest)
    click.echo(inspector.judge.describe(), err=True)
    if not inspector.card.localises and (output is not None or coco is not None):
        method = inspector.card.method
        click.echo(f"flawmap: {method} says nothing of where a flaw is: no heatmaps and regions", err=True)
        output = None
    if output is not None:
        make_folder(output)
    counts = {"good": 0, "defect": 0, "unsure": 0, "error": 0}
    unjudged: list[Inspection] = []
    kept: list[Inspection] = []
    for (path, name), inspection in zip(found, inspector.stream(path for path, _ in found), strict=True):
        assert inspection.verdict is not None
        counts[inspection.verdict] += 1
        if inspection.verdict == "error":
            if strict:
                raise FlawmapError(str(inspection.error))
            unjudged.append(inspection)
        write(inspection)
        if output is not None and inspection.verdict != "error":
            draw(output / name, path, inspection, inspector.heat_scale())
        if coco is not None:
            kept.append(inspection.without_map())
    if coco is not None:
        from flawmap.files import replacing
        from flawmap.report.overlays import coco as as_coco

        with replacing(coco) as file:
            file.write(json.dumps(as_coco(kept)).encode())
    between = f"{counts['unsure']} unsure, " if inspector.judge.unsure else ""
    click.echo(f"{counts['good']} good, {counts['defect']} defect, {between}{counts['error']} not judged", err=True)
    for inspection in unjudged:
        click.echo(f"flawmap: {inspection.error}", err=True)
    if len(unjudged) == len(found):
        return 2
    if unjudged:
        return 3
    if fail_on_defect and counts["defect"]:
        return 4
    return 3 if fail_on_defect and counts["unsure"] else 0


class _Writer:
    """Prints one inspection at a time, so that a long run can be followed and piped."""

    def __init__(self, form: str, width: int, model: str | None) -> None:
        self.form, self.width, self.model = form, width, model
        if form == "csv":
            self._row(_COLUMNS)
        elif form == "table":
            click.echo(f"{'image':<{width}}  verdict      score  p-value  regions")

    def __call__(self, inspection: Inspection) -> None:
        values = inspection.to_json()
        if self.form == "jsonl":
            judged = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            click.echo(json.dumps({"schema": SCHEMA, "time": judged, "model": self.model, **values}))
        elif self.form == "csv":
            values["regions"] = len(values["regions"])
            self._row(["" if values[column] is None else values[column] for column in _COLUMNS])
        elif inspection.score is None:
            click.echo(f"{values['path']:<{self.width}}  {'error':<7}")
        else:
            click.echo(
                f"{values['path']:<{self.width}}  {inspection.verdict:<7}  {inspection.score:9.4g}  "
                f"{inspection.p_value:7.4f}  {len(inspection.regions):7d}"
            )

    def _row(self, values: Iterable[object]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(values)
        click.echo(line.getvalue())


def draw(target: Path, path: Path, inspection: Inspection, scale: HeatScale | None) -> None:
    """Writes <target>_overlay.png and <target>_map.png of one inspected image; nothing for a method without maps."""
    from flawmap.imaging.decoding import read_image
    from flawmap.report.overlays import write_map, write_overlay

    if scale is None:
        return
    make_folder(target.parent)
    # The suffix stays in the name: a.png and a.jpg may lie side by side.
    stem = target.name.replace(".", "_")
    write_overlay(target.with_name(f"{stem}_overlay.png"), read_image(path), inspection, scale)
    write_map(target.with_name(f"{stem}_map.png"), inspection, scale)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        FlawmapError: it cannot be made.
    """
    from flawmap.files import unwritable

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
