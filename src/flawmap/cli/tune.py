"""flawmap tune"""

from __future__ import annotations

from pathlib import Path

import click

from flawmap.cli.options import MAX_PIXELS, PLUGIN, SEED
from flawmap.cli.say import say, say_all


@click.command("tune")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Model file to write."
)
@click.option("--category", help="One category of a data set root.")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=A,B,C",
    help="Values to try of a setting; repeatable.  [default: all]",
)
@click.option("--oracle", is_flag=True, help="Also print what each choice reaches on the test labels of DATA.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the synthetic defects.")
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@MAX_PIXELS
@PLUGIN
def tune_command(
    model: Path,
    data: Path,
    output: Path,
    category: str | None,
    grids: tuple[str, ...],
    oracle: bool,
    seed: int,
    engine: str,
    device: str,
) -> None:
    """Choose the settings of MODEL that training leaves open, without any test label.

    Those that training fixes are chosen by `flawmap train --tune`.

    Synthetic defects are made in good images of DATA that MODEL was not fitted on; the settings at which they stand out
    most are written to a new model file, calibrated on good images that did not serve the choice.
    """
    from flawmap.cli.options import check_model_output, check_outputs, files_of, parse_grid
    from flawmap.cli.progress import ProgressLines, quiet_libraries

    quiet_libraries()
    check_model_output(output)
    grid = {}
    for key, values in parse_grid(grids).items():
        try:
            grid[key] = [float(value) for value in values]
        except ValueError:
            told = f"{key}={','.join(values)}: give numbers, separated by commas"
            raise click.BadParameter(told, param_hint="--grid") from None
    from flawmap.datasets import find_dataset

    dataset = find_dataset(data, category)
    check_outputs({"-o": output}, [model, *files_of(dataset)])

    from flawmap.detector import Detector
    from flawmap.tuning.live import tune

    detector = Detector.load(model, engine=engine, device=device)
    with ProgressLines() as progress:
        tuned, tuning = tune(detector, dataset, grid=grid or None, seed=seed, oracle=oracle, progress=progress)
    tuned.save(output)
    say_all(tuning.describe())
    say_all(tuned.inspector().judge.describe())
    say(f"wrote {output}")
