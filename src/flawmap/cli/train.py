"""flawmap train"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flawmap.cli.options import MAX_PIXELS, PLUGIN, RATE, SEED, SIDE
from flawmap.cli.say import say, say_all

if TYPE_CHECKING:
    from flawmap.datasets import Dataset

log = logging.getLogger(__name__)

_FEW = 20  # images; fewer do not calibrate


@click.command("train")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="MODEL",
    help="Model file to write.  [default: the name of DATA, or the category's, with .safetensors, in the current "
    "folder; an earlier model of that name is replaced, any other file is not]",
)
@click.option("--category", help="One category of a data set root.")
@click.option("--method", default="auto", show_default=True, help="See `flawmap methods`; auto chooses one.")
@click.option(
    "--preset",
    metavar="NAME",
    help="Named settings, those of the paper for one, see `flawmap methods NAME`. What else is given wins.",
)
@click.option(
    "--backbone", help="Any timm name; see `flawmap backbones`.  [default: tf_efficientnet_lite0, or the preset's]"
)
@click.option("--weights", help="Local weight file of the backbone, .safetensors or .pth; `random` for tests.")
@click.option(
    "--image-size", type=SIDE, help="Side that images (or tiles) are resized to.  [default: 256, or the preset's]"
)
@click.option("--keep-aspect", is_flag=True, help="Keep the aspect ratio: the short side is padded.")
@click.option("--crop", type=int, metavar="N", help="Use the centre N x N of the resized image only.")
@click.option("--tile", metavar="SIZE[,OVERLAP]", help="Cut images into windows of SIZE original pixels.")
@click.option(
    "--roi", type=click.Path(path_type=Path), metavar="MASK", help="Region of interest: a mask, white inside."
)
@click.option(
    "--register",
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="Align each image to this one first, the one on which the region of interest is drawn.",
)
@click.option(
    "--no-capture-check",
    "capture_check",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Judge captures unlike the good images (black, blurred, of another part) too, instead of refusing them.",
)
@click.option("--epochs", type=int, help="Of methods that train by gradient.")
@click.option("--views", type=int, help="Rotated views of each image, of methods that train on them.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the method; repeatable.")
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of everything random.")
@click.option(
    "--max-false-reject", type=RATE, default=0.01, show_default=True, help="Share of good parts that may be rejected."
)
@click.option(
    "--guarantee",
    type=click.Choice(["marginal", "confidence"]),
    default="marginal",
    show_default=True,
    help="Keep it on average, or with 95 % confidence.",
)
@click.option(
    "--tail", is_flag=True, help="Keep the threshold estimated from the tail of the scores, which promises nothing."
)
@click.option(
    "--calibration",
    help="loo (leave one out), holdout, crossfit, a folder of further good images, or none: all images are learnt "
    "from, and there are scores and maps, but no threshold and no verdicts.  [default: auto, or the preset's]",
)
@click.option("--shots", type=click.IntRange(2), metavar="K", help="Learn from K of the good images, drawn by --seed.")
@click.option(
    "--tune", is_flag=True, help="Choose settings on synthetic defects first, fitting anew for each; see --grid."
)
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=A,B,C",
    help="With --tune: values to try of image_size or a setting of the method; repeatable. The levels of one value are "
    "joined by +, as in levels=blocks.2+blocks.4,blocks.1+blocks.2; auto is the method's own choice. What is set "
    "without it is tried too.  [default: two sizes and some levels]",
)
@click.option("--oracle", is_flag=True, help="With --tune: also print what each choice reaches on the test labels.")
@click.option(
    "--drop-atypical", type=click.IntRange(0), default=0, metavar="N", help="Leave out the N most unusual good images."
)
@click.option(
    "--update",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Learn DATA on top of what MODEL knows; its settings stay.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted training of the same output.")
@click.option(
    "--discard",
    is_flag=True,
    help="Start anew: delete what an interrupted training of the same output left, and leave nothing on Ctrl-C.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Report to write.  [default: beside -o]")
@click.option(
    "--json",
    "findings",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what training found, for programs: the threshold, and the good images, the most unusual first.",
)
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be read.")
@click.option("--progress-file", type=click.Path(path_type=Path, dir_okay=False), hidden=True)
@MAX_PIXELS
@PLUGIN
def train_command(
    data: Path,
    output: Path | None,
    category: str | None,
    settings: tuple[str, ...],
    keep_aspect: bool,
    crop: int | None,
    tile: str | None,
    epochs: int | None,
    views: int | None,
    shots: int | None,
    tune: bool,
    grids: tuple[str, ...],
    oracle: bool,
    drop_atypical: int,
    update: Path | None,
    resume: bool,
    discard: bool,
    html: Path | None,
    findings: Path | None,
    strict: bool,
    progress_file: Path | None,
    tail: bool,
    **options: Any,
) -> None:
    """Learn from the good images in DATA and write a model file, and a report beside it.

    DATA is a folder of good images, a folder with good/ and bad/, a data set in the MVTec AD layout, or a CSV file.
    """
    from flawmap.cli.options import (
        beside,
        check_model_output,
        check_output,
        check_outputs,
        default_model,
        files_of,
        parse_grid,
        parse_settings,
        say_what_is_replaced,
    )
    from flawmap.cli.progress import ProgressLines, quiet_libraries
    from flawmap.cli.training_report import notes, threshold_lines, write_findings, write_report

    quiet_libraries()
    output = output or default_model(data, category)
    check_model_output(output)
    html = html or beside(output)
    check_output(html, "--html")
    if findings is not None:
        check_output(findings, "--json")
    if (grids or oracle) and not tune:
        raise click.BadParameter("chooses nothing without --tune", param_hint="--grid" if grids else "--oracle")
    if tail:
        if click.get_current_context().get_parameter_source("guarantee") is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError("a tail promises nothing: give --tail or --guarantee, not both")
        options["guarantee"] = "tail"
    if resume and discard:
        raise click.UsageError("give --resume to go on, or --discard to start anew, not both")
    grid = _searched(parse_grid(grids))
    own = {"epochs": epochs, "views": views}
    chosen: dict[str, Any] = {**parse_settings(settings), **{k: v for k, v in own.items() if v is not None}}
    if update is not None:
        _refuse_beside_update(click.get_current_context())
    from flawmap.datasets import find_dataset

    dataset = find_dataset(data, category)
    given = [options[name] for name in ("weights", "roi", "register") if options[name] is not None]
    check_outputs({"-o": output, "--html": html, "--json": findings}, [*map(Path, given), *files_of(dataset)])
    check_outputs({"--html": html}, [update])  # a model may be updated in its place
    say_what_is_replaced(output)
    say_all(dataset.describe())

    from flawmap.detector import Detector
    from flawmap.imaging.geometry import Geometry
    from flawmap.methods import automatic

    laid = keep_aspect or crop is not None or tile is not None
    settled = {"geometry": Geometry.from_options(keep_aspect, crop, tile) if laid else None, **options, **chosen}
    fresh = None if update is not None else Detector(**settled)
    if fresh is not None:
        if fresh.preset is not None:
            say(f"preset {fresh.preset}")
        if fresh.calibration == "none":
            _refuse_rates(click.get_current_context())
        if shots is not None:
            dataset = _drawn(dataset, shots, fresh.seed, str(fresh.calibration))

    tuning = None
    workspace = output.with_name(output.name + ".training")
    with ProgressLines(progress_file) as progress, _discarding(workspace) if discard else nullcontext():
        told: dict[str, Any] = {
            "strict": strict,
            "progress": progress,
            "announce": lambda line: say(line, err=True),
        }
        if fresh is None:
            detector = Detector.load(str(update), engine=options["engine"], device=options["device"])
            detector.update(dataset, **told)
        else:
            told |= {"workspace": workspace, "resume": resume, "drop_atypical": drop_atypical}
            if tune:
                from flawmap.tuning.refitting import tune_fit

                detector, tuning = tune_fit(dataset, grid or None, oracle=oracle, **told, **settled)
            else:
                detector = fresh.fit(dataset, **told)
        detector.save(output)
        if options["method"] == "auto" and update is None:
            say(f"method {detector.method}: {automatic(tile is not None)[1]}")
        if detector.training_.get("levelling"):
            say(detector.training_["levelling"])
        progress("report", 0, 1)
        write_report(html, detector, dataset)
        if findings is not None:
            write_findings(findings, detector)
    if tuning is not None:
        say_all(tuning.describe())
    for line in [*threshold_lines(detector), *notes(detector, update is not None)]:
        say(line)
    say(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB, engine {detector.training_['engine']}) and {html}")


@contextmanager
def _discarding(workspace: Path) -> Iterator[None]:
    """Deletes what lies in the workspace first, and where the user ends it with Ctrl-C."""
    from flawmap.learning.workspace import discard

    discard(workspace)
    try:
        yield
    except KeyboardInterrupt:
        discard(workspace)
        raise


def _searched(grid: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The values as `flawmap.tuning.refitting.tune_fit` takes them: sizes as numbers, levels joined by + as tuples."""
    searched: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if key == "image_size":
            try:
                searched[key] = [int(value) for value in values]
            except ValueError:
                told = f"{key}={','.join(values)}: give whole numbers, separated by commas"
                raise click.BadParameter(told, param_hint="--grid") from None
        else:
            searched[key] = [value if _is_number(value) or "+" not in value else _joined(value) for value in values]
    return searched


def _joined(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split("+"))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _drawn(dataset: Dataset, shots: int, seed: int, calibration: str) -> Dataset:
    """The data set with so many good images; says which."""
    from flawmap.datasets.shots import draw_shots
    from flawmap.text import counted

    drawn = draw_shots(dataset, shots, seed)
    root = dataset.root if dataset.root.is_dir() else dataset.root.parent  # of a table
    names = ", ".join(os.path.relpath(sample.path, root) for sample in drawn.train)
    say(f"shots: {shots} of {counted(len(dataset.train), 'good image')}, drawn by seed {seed}: {names}")
    if shots < _FEW and calibration in ("auto", "loo", "holdout", "crossfit"):
        log.warning(
            "%d images say little of how good parts vary: what is stated of false rejects is weak; "
            "--calibration FOLDER with further good images makes it firmer",
            shots,
        )
    return drawn


_WITH_UPDATE = {
    "data",
    "output",
    "category",
    "update",
    "engine",
    "device",
    "html",
    "strict",
    "findings",
    "progress_file",
}


def _refuse_rates(context: click.Context) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("max_false_reject", "guarantee", "tail")
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(
            f"{' and '.join(given)}: without good images to calibrate on no rate can be kept: leave it out, or give "
            "another --calibration"
        )


def _refuse_beside_update(context: click.Context) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in _WITH_UPDATE
        and context.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT)
    ]
    if given:
        raise click.UsageError(f"--update keeps the model's settings: leave {' and '.join(given)} out")
