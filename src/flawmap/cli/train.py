"""flawmap train"""

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


@click.command("train")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Model file to write."
)
@click.option("--category", help="One category of a data set root.")
@click.option("--method", default="patchcore", show_default=True, help="See `flawmap methods`.")
@click.option("--preset", help="Named settings of the method: default or paper.")
@click.option(
    "--backbone", default="tf_efficientnet_lite0", show_default=True, help="Any timm name; see `flawmap backbones`."
)
@click.option("--weights", help="Local weight file of the backbone, .safetensors or .pth; `random` for tests.")
@click.option("--image-size", default=256, show_default=True, help="Side of the model's input in pixels.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the method; repeatable.")
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option("--max-false-reject", default=0.01, show_default=True, help="Share of good parts that may be rejected.")
@click.option(
    "--guarantee",
    type=click.Choice(["marginal", "confidence"]),
    default="marginal",
    show_default=True,
    help="Keep it on average, or with 95 % confidence.",
)
@click.option(
    "--calibration", default="auto", show_default=True, help="holdout, crossfit, or a folder of further good images."
)
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be read.")
def train_command(
    data: Path,
    output: Path,
    category: str | None,
    method: str,
    preset: str | None,
    backbone: str,
    weights: str | None,
    image_size: int,
    settings: tuple[str, ...],
    engine: str,
    device: str,
    seed: int,
    max_false_reject: float,
    guarantee: str,
    calibration: str,
    strict: bool,
) -> None:
    """Learn from the good images in DATA and write a model file.

    DATA is a folder of good images, a folder with good/ and bad/, a data set in the MVTec AD layout, or a CSV file.
    """
    from flawmap.cli.progress import ProgressLines, quiet_libraries

    quiet_libraries()
    chosen = parse_settings(settings)
    check_output(output)
    from flawmap.datasets import find_dataset

    dataset = find_dataset(data, category)
    click.echo(dataset.describe())

    from flawmap.detector import Detector

    detector = Detector(
        method,
        preset=preset,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        engine=engine,
        device=device,
        seed=seed,
        max_false_reject=max_false_reject,
        guarantee=guarantee,  # type: ignore[arg-type]
        calibration=calibration,
        **chosen,
    )
    with ProgressLines() as progress:
        detector.fit(dataset, strict=strict, progress=progress, announce=lambda line: click.echo(line, err=True))
    detector.save(output)
    click.echo(detector.threshold_.describe())
    click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB, engine {detector.training_['engine']})")


def check_output(path: Path) -> None:
    """Refuses, before any work is done, a place where the result could not be written.

    Raises:
        click.BadParameter: the folder is missing, or the name is a folder.
    """
    if path.is_dir():
        raise click.BadParameter(f"{path} is a folder: give a file name in it", param_hint="-o")
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {path.parent} does not exist: create it first", param_hint="-o")
