"""flawmap evaluate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flawmap.cli.options import MAX_PIXELS, PLUGIN
from flawmap.text import counted, printable

if TYPE_CHECKING:
    from flawmap.datasets import Dataset
    from flawmap.judging.evaluation import EvaluationReport
    from flawmap.line import Inspector

_TITLES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max (oracle)",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max (oracle)",
    "aupro": "AUPRO (limit 0.3)",
    "escape_rate": "escape rate",
    "overkill_rate": "overkill rate",
    "escape_rate_oracle": "best escape rate (oracle)",
    "caught_at_overkill_0.001_oracle": "caught at 0.1 % overkill (oracle)",
    "caught_at_overkill_0.01_oracle": "caught at 1 % overkill (oracle)",
    "caught_at_overkill_0.05_oracle": "caught at 5 % overkill (oracle)",
}
_COUNTS = {
    "images": "images",
    "rejected": "rejected",
    "on_defect": "on the defect",
    "unsure": "unsure",
    "refused": "refused",
    "errors": "not scored",
}


@click.command("evaluate")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--category", help="One category of a data set root.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures as one flat JSON object; - is stdout.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report that opens anywhere.")
@click.option("--full-resolution", is_flag=True, help="Pixel figures on the original pixels, not at the input size.")
@click.option(
    "--no-capture-check", is_flag=True, help="Judge captures unlike those learnt from, instead of refusing them."
)
@click.option("--tail", is_flag=True, help="Take the threshold estimated from the tail of the scores.")
@click.option("--unsure", is_flag=True, help="Verdicts as those of `flawmap inspect --unsure`.")
@click.option(
    "--oracle",
    is_flag=True,
    help="Also print what settings chosen on the test labels would reach. Slow; for methods whose papers did so.",
)
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@MAX_PIXELS
@PLUGIN
def evaluate_command(
    model: Path,
    data: Path,
    category: str | None,
    json_file: str | None,
    html: Path | None,
    full_resolution: bool,
    no_capture_check: bool,
    tail: bool,
    unsure: bool,
    oracle: bool,
    engine: str,
    device: str,
) -> int:
    """Measure MODEL on the labelled test images in DATA."""
    from flawmap.cli.options import check_output, check_outputs, files_of
    from flawmap.cli.progress import ProgressLines, quiet_libraries

    quiet_libraries()
    outputs = {"--json": Path(json_file) if json_file not in (None, "-") else None, "--html": html}
    for option, path in outputs.items():
        if path is not None:
            check_output(path, option)
    from flawmap.datasets import find_dataset

    dataset = find_dataset(data, category)
    check_outputs(outputs, [model, *files_of(dataset)])

    from flawmap.line import Inspector
    from flawmap.line.evaluating import evaluate_inspector

    grid = None
    with ProgressLines() as progress:
        if oracle:
            from flawmap.detector import Detector
            from flawmap.tuning.oracle import oracle_grid, oracle_table

            detector = Detector.load(model, engine=engine, device=device)
            inspector = detector.inspector()
            grid = oracle_grid(detector, dataset, progress=progress)
        else:
            inspector = Inspector.load(model, engine=engine, device=device)
        if tail or unsure:
            inspector = inspector.with_threshold(tail=tail, unsure=unsure)
        if no_capture_check:
            inspector = inspector.without_capture_check()
        report = evaluate_inspector(inspector, dataset, full_resolution=full_resolution, progress=progress)
    text = json.dumps(report.to_json() | ({} if grid is None else grid.to_json()), indent=2, allow_nan=False)
    if json_file == "-":
        click.echo(text)
    else:
        click.echo(dataset.describe())
        click.echo(inspector.judge.describe())
        click.echo(report_table(report))
        if grid is not None:
            click.echo("\n" + oracle_table(grid, {name: float(inspector.card.config[name]) for name in grid.points[0]}))
    if json_file not in (None, "-"):
        from flawmap.files import replacing

        with replacing(Path(str(json_file))) as file:
            file.write(text.encode() + b"\n")
    if html is not None:
        write_report(html, inspector, dataset, report)
        click.echo(f"wrote {html}", err=json_file == "-")
    for line in report.unjudged:
        click.echo(f"flawmap: {line}", err=True)
    if report.errors and not report.images:
        return 2
    return 3 if report.errors else 0


def write_report(path: Path, inspector: Inspector, dataset: Dataset, report: EvaluationReport) -> None:
    """The page of an evaluation; the images worth showing are inspected again for their maps."""
    from flawmap.imaging.decoding import read_image
    from flawmap.imaging.masks import read_mask
    from flawmap.report.evaluation_page import worth_showing, write_evaluation_page
    from flawmap.report.pictures import take_picture

    masks = {sample.path: sample.mask for sample in dataset.test}
    scale = inspector.heat_scale()
    shown = {i: image for i in worth_showing(report) if (image := report.results[i].path) is not None}
    pictures = {}
    for (i, image), inspection in zip(shown.items(), inspector.stream(shown.values()), strict=True):
        mask = masks[image]
        truth = None if mask is None else read_mask(mask)
        if inspection.verdict != "error":
            pictures[i] = take_picture(read_image(image), inspection, scale, truth)
    write_evaluation_page(
        path,
        report,
        inspector.judge.calibration,
        inspector.judge.threshold,
        pictures,
        scale=scale,
        pixel_threshold=inspector.judge.pixel_threshold,
        config=dict(inspector.card.config),
    )


def remarks(report: EvaluationReport) -> list[str]:
    """What the figures do not say by themselves, a line each."""
    lines = []
    if located := report.counted("located"):
        lines.append(
            f"caught in the right place: {report.counted('on_defect')} of {located} rejected images with a mask have a "
            "region on the defect"
        )
    if refused := report.counted("refused"):
        defective = sum(judged.refused and judged.defective for judged in report.results)
        images = counted(refused, "image is", "images are")
        lines.append(
            f"{images} refused by the capture check ({refused - defective} good, {defective} defective): their scores "
            "count in all figures; they are called neither good nor defects. --no-capture-check judges them"
        )
    if report.without_mask:
        images = counted(report.without_mask, "defective image has", "defective images have")
        lines.append(f"{images} no mask and count in no pixel figure")
    return lines


def report_table(report: EvaluationReport) -> str:
    """The figures with their 95 % intervals, and each kind of image with what became of it."""
    lines = []
    for name, title in _TITLES.items():
        value, interval = report.figures[name], report.intervals[name]
        shown = "-" if value is None else f"{value:.3f}"
        spread = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
        lines.append(f"{title:<{max(map(len, _TITLES.values()))}} {shown:>6}{spread}")
    lines.append("")
    always = (
        "images",
        *(("rejected",) if report.decides else ()),
        "errors",
        *(("on_defect",) if report.counted("located") else ()),
    )
    heads = {column: head for column, head in _COUNTS.items() if column in always or report.counted(column)}
    width = max(len(printable(kind)) for kind in report.kinds)
    lines.append("  ".join([f"{'kind':<{width}}", *heads.values()]))
    for kind, counts in report.kinds.items():
        lines.append(
            "  ".join(
                [f"{printable(kind):<{width}}", *(f"{counts[name]:{len(head)}d}" for name, head in heads.items())]
            )
        )
    lines += remarks(report)
    lines.append(
        f"{counted(report.images, 'image')}, {report.milliseconds_per_image or 0:.1f} ms each (median, decoding not "
        "counted)"
    )
    return "\n".join(lines)
