"""flawmap inspect"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flawmap.cli.options import MAX_PIXELS, PLUGIN
from flawmap.cli.streams import nobody_reads
from flawmap.cli.verdict_lines import VerdictLines
from flawmap.text import counted, printable

if TYPE_CHECKING:
    from flawmap.judging.inspection import Inspection
    from flawmap.line import Inspector
    from flawmap.report.inspection_page import Inspected


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
@click.option("--caption", is_flag=True, help="Write verdict and score into the heatmaps.")
@click.option("--coco", type=click.Path(path_type=Path, dir_okay=False), help="Write the regions as a COCO file.")
@click.option(
    "--fail-on-defect", is_flag=True, help="Exit with 4 when a defect was found, else with 3 when one is unsure."
)
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be judged.")
@MAX_PIXELS
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@PLUGIN
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
    caption: bool,
    coco: Path | None,
    fail_on_defect: bool,
    strict: bool,
    engine: str,
    device: str,
) -> int:
    """Inspect image files and folders with a trained MODEL, .safetensors or .onnx.

    With -o, each image gets a heatmap <name>_overlay.png and a 16-bit map <name>_map.png, below the same folders, and
    index.html shows them all, worst first. A verdict is printed when all that belongs to it is written.
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

    found = find_parts(sources, output)
    check_outputs({"--coco": coco}, [model, *(path for path, _ in found)])
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
    if fail_on_defect and inspector.judge.threshold is None:
        raise FlawmapError("--fail-on-defect needs verdicts, and the model has no threshold: give --threshold")
    write = VerdictLines(form, max(len(printable(path)) for path, _ in found), inspector.digest)
    click.echo(inspector.judge.describe(), err=True)
    if not inspector.card.localises and (output is not None or coco is not None):
        click.echo(
            f"flawmap: {inspector.card.method} says nothing of where a flaw is: no heatmaps and regions", err=True
        )
    elif inspector.judge.pixel_threshold is None and coco is not None:
        click.echo("flawmap: regions need a calibration, which the model lacks: the COCO file has none", err=True)
    shown = None if output is None else Shown(output, model, inspector, found, caption)
    counts = {"good": 0, "defect": 0, "unsure": 0, "error": 0, None: 0}
    troubles: list[str] = []
    unwritten = overruled = 0
    regions = None
    if coco is not None:
        from flawmap.report.overlays import Coco

        regions = Coco()
    inspections = inspector.stream((path for path, _ in found), keep_pixels=shown is not None)
    try:
        for inspection in inspections:
            if inspection.verdict == "error":
                if strict:
                    raise FlawmapError(str(inspection.error))
                troubles.append(str(inspection.error))
            counts[inspection.verdict] += 1
            overruled += inspection.overruled
            if shown is not None:
                try:
                    shown.draw(sum(counts.values()) - 1, inspection)
                except FlawmapError as error:
                    troubles.append(str(error))
                    unwritten += 1
            if regions is not None:
                regions.add(inspection)
            write(inspection)
            del inspection  # its pixels and maps, before the next one's are taken
            if shown is None and coco is None and not fail_on_defect and nobody_reads():
                return 0  # and nothing else was asked for
    finally:
        if shown is not None and (trouble := shown.close(finished=sum(counts.values()) == len(found))):
            troubles.append(trouble)
            unwritten += 1
    if coco is not None and regions is not None:
        from flawmap.files import replacing

        with replacing(coco) as file:
            file.write(json.dumps(regions.to_json(), allow_nan=False).encode())
    if overruled:
        some = counted(
            overruled, "image is called good though a region of it", "images are called good though a region of each"
        )
        click.echo(f"{some} reaches the map's own threshold: a verdict goes by the image's score", err=True)
    between = f"{counts['unsure']} unsure, " if inspector.judge.unsure else ""
    verdicts = f"{counts['good']} good, {counts['defect']} defect, {between}"
    if inspector.judge.threshold is None:
        verdicts = f"{counts[None]} scored, "
    click.echo(f"{verdicts}{counts['error']} not judged", err=True)
    for trouble in troubles:
        click.echo(f"flawmap: {printable(trouble)}", err=True)
    return exit_code(
        len(found), counts["defect"], counts["unsure"], counts["error"], unwritten, fail_on_defect=fail_on_defect
    )


def exit_code(images: int, defects: int, unsure: int, unjudged: int, unwritten: int, *, fail_on_defect: bool) -> int:
    """What a run ends with: 2 nothing could be judged, 4 defects if that is to fail, 3 some trouble, else 0.

    Trouble is an image that could not be judged, drawings that could not be written, and, where defects are to fail, an
    image that is unsure.
    """
    if unjudged == images:
        return 2
    if fail_on_defect and defects:
        return 4
    return 3 if unjudged or unwritten or (fail_on_defect and unsure) else 0


def find_parts(sources: Sequence[Path], output: Path | None) -> list[tuple[Path, Path]]:
    """The images to inspect, each with its path below the source that it was found in.

    What is passed over is said: files that are no images, those below the output folder, and what flawmap itself wrote.

    Raises:
        FlawmapError: a folder holds no images.
    """
    from flawmap.errors import FlawmapError
    from flawmap.imaging.formats import FORMATS
    from flawmap.imaging.image_files import search_folder

    found: list[tuple[Path, Path]] = []
    below = None if output is None else output.resolve()
    for source in sources:
        if not source.is_dir():
            found.append((source, Path(source.name)))
            continue
        there = search_folder(source)
        parts = there.images
        if below is not None and below != source.resolve() and below.is_relative_to(source.resolve()):
            parts = [path for path in parts if not path.resolve().is_relative_to(below)]
        if note := there.note():
            click.echo(f"{printable(source)}: {note}", err=True)
        if inside := len(there.images) - len(parts):
            some = counted(inside, "image in the output folder is", "images in the output folder are")
            click.echo(f"{some} passed over", err=True)
        if not parts:
            raise FlawmapError(f"{source} holds no images: give a folder or files of {FORMATS}")
        found += [(path, path.relative_to(source)) for path in parts]
    return found


class Shown:
    """What -o asks for: the drawings of each image, and the page that shows them."""

    def __init__(
        self, folder: Path, model: Path, inspector: Inspector, found: Sequence[tuple[Path, Path]], caption: bool
    ) -> None:
        from flawmap.report.drawings import check_drawings, drawing_names, make_folder
        from flawmap.report.inspection_page import check_index

        make_folder(folder)
        check_index(folder)
        self.folder, self.model, self.inspector, self.caption = folder, model, inspector, caption
        self.found, self.names = found, drawing_names(found)
        check_drawings(folder, self.names, [path for path, _ in found])
        self.scale = inspector.heat_scale()
        self.items: list[Inspected] = []

    def draw(self, number: int, inspection: Inspection) -> None:
        """Raises FlawmapError where it cannot be written."""
        from flawmap.report.drawings import write_drawings
        from flawmap.report.inspection_page import inspected

        name = self.names[number]
        try:
            write_drawings(self.folder, name, inspection, self.scale, caption=self.caption)
        finally:
            self.items.append(inspected(self.folder, self.found[number][1], name, inspection))

    def close(self, *, finished: bool) -> str | None:
        """Writes the page of what was inspected, also of a run that was broken off; says why it could not, if so."""
        from flawmap.errors import FlawmapError
        from flawmap.report.inspection_page import write_index
        from flawmap.report.page import legend

        try:
            write_index(
                self.folder,
                self.items,
                model=self.model.name,
                digest=self.inspector.digest,
                describe=self.inspector.judge.describe(),
                legend=legend(self.scale, self.inspector.judge.pixel_threshold),
                finished=finished,
            )
        except FlawmapError as error:
            return str(error)
        return None
