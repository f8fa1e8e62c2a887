"""flawmap export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flawmap.cli.options import PLUGIN, Finite
from flawmap.cli.say import say, say_all


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8"]),
    default="fp32",
    show_default=True,
    help="int8 computes the pretrained backbone in 8-bit numbers.",
)
@click.option(
    "--check",
    type=click.Path(path_type=Path, file_okay=False),
    help="Images to prove the file on, drawn ones otherwise; for int8 good images that were not learnt from.",
)
@click.option(
    "--max-drop",
    type=Finite(0, 1),
    default=0.01,
    show_default=True,
    help="How much less synthetic defects may stand out in 8-bit numbers, of 1.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Move a setting that training leaves open first."
)
@PLUGIN
def export_command(
    model: Path, output: Path, precision: str, check: Path | None, max_drop: float, settings: tuple[str, ...]
) -> None:
    """Write MODEL as one ONNX file with all that inspection needs: `flawmap inspect` takes it without PyTorch.

    The file is read back and held against MODEL on images before it takes its name. Where it would say something that
    rounding does not explain, nothing is written.
    """
    from flawmap.cli.options import check_model_output, check_outputs, parse_settings
    from flawmap.cli.progress import ProgressLines, quiet_libraries
    from flawmap.imaging.image_files import find_images

    quiet_libraries()
    moved: dict[str, Any] = dict(parse_settings(settings))
    check_model_output(output)
    check_outputs({"-o": output}, [model, *(find_images(check) if check is not None and check.is_dir() else [])])
    from flawmap.detector import Detector
    from flawmap.export import export

    detector = Detector.load(model, engine="torch", device="cpu")
    if moved:
        detector = detector.with_settings(**moved)
    with ProgressLines() as progress:
        exported = export(
            detector,
            output,
            precision=precision,  # type: ignore[arg-type]
            check=check,
            max_drop=max_drop,
            progress=progress,
        )
    for proof in exported.proofs:
        say_all(proof.describe())
    if exported.quantised is not None:
        say_all(exported.quantised.describe())
    say(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
