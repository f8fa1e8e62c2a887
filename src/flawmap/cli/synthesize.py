"""flawmap synthesize"""

from __future__ import annotations

import os
from pathlib import Path

import click

from flawmap.cli.say import say, say_all


@click.command("synthesize")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="New folder to write."
)
@click.option("--category", help="One category of a data set root.")
@click.option("--count", default=100, show_default=True, help="How many defects.")
@click.option("--seed", default=0, show_default=True, help="Another seed makes other defects.")
@click.option(
    "--size",
    type=int,
    metavar="PX",
    help="Resize images to this longer side.  [default: as they are]",
)
@click.option(
    "--roi", type=click.Path(path_type=Path), metavar="MASK", help="Region of interest: a mask, white inside."
)
@click.option(
    "--textures",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Photographs of textures, instead of drawn ones.",
)
@click.option("--workers", type=int, help="Processes.  [default: one for each core]")
def synthesize_command(
    data: Path,
    output: Path,
    category: str | None,
    count: int,
    seed: int,
    size: int | None,
    roi: Path | None,
    textures: Path | None,
    workers: int | None,
) -> int:
    """Make synthetic defects on the good images in DATA and write them with masks, in the MVTec AD layout.

    They are made on good images that are not in OUTPUT/train/good. Defects that change their pixels by less than 16 of
    255 levels on average, or fewer than 16 pixels, are drawn anew. Look at OUTPUT/contact_sheet.png, which names each.
    """
    from flawmap.cli.progress import ProgressLines, quiet_libraries
    from flawmap.datasets import find_dataset
    from flawmap.synthesis.dataset import write_defects
    from flawmap.text import counted

    quiet_libraries()
    dataset = find_dataset(data, category)
    with ProgressLines() as progress:
        written = write_defects(
            dataset,
            output,
            count=count,
            seed=seed,
            size=size,
            roi=roi,
            textures=textures,
            workers=(os.cpu_count() or 1) if workers is None else workers,
            progress=progress,
        )
    say_all(written.foreground.describe())
    say(f"made from {written.held_out}")
    say(", ".join(f"{kind} {written.kinds[kind]}" for kind in sorted(written.kinds)))
    if written.failed:
        left, they = ("defect", "it") if written.failed == 1 else ("defects", "they")
        say(
            f"{written.failed} {left} found no place where {they} may lie and can be seen, and "
            f"{'is' if written.failed == 1 else 'are'} left out"
        )
    say(f"wrote {counted(sum(written.kinds.values()), 'defect')} to {output}; look at {output / 'contact_sheet.png'}")
    for line in written.unreadable:
        say(f"flawmap: {line}", err=True)
    return 3 if written.unreadable else 0
