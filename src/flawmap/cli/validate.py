"""flawmap validate"""

from __future__ import annotations

from pathlib import Path

import click

from flawmap.cli.options import MAX_PIXELS, PLUGIN
from flawmap.cli.say import say, say_all


@click.command("validate")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tail", is_flag=True, help="Take the threshold estimated from the tail of the scores.")
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@MAX_PIXELS
@PLUGIN
def validate_command(model: Path, folder: Path, tail: bool, engine: str, device: str) -> int:
    """Hold MODEL against a FOLDER of good images that it has not seen: is what it promised kept, on this machine?"""
    from flawmap.cli.progress import ProgressLines, quiet_libraries

    quiet_libraries()
    from flawmap.errors import FlawmapError
    from flawmap.imaging.image_files import find_images
    from flawmap.line import Inspector
    from flawmap.line.validating import validate

    paths = find_images(folder) if folder.is_dir() else [folder]
    if not paths:
        raise FlawmapError(f"{folder} holds no images: give a folder of good parts that were not learnt from")
    inspector = Inspector.load(model, engine=engine, device=device)
    if tail:
        inspector = inspector.with_threshold(tail=True)
    with ProgressLines() as progress:
        found = validate(inspector, paths, progress=progress)
    say_all(found.describe())
    for line in found.unjudged:
        say(f"flawmap: {line}", err=True)
    if not found.images:
        return 2
    return 3 if found.unjudged else 0
