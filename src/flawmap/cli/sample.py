"""flawmap sample"""

from __future__ import annotations

from pathlib import Path

import click

from flawmap.cli.options import SEED
from flawmap.cli.say import say_all


@click.command("sample")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--kind", type=click.Choice(["screws", "fabric", "boards"]), default="screws", show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Another seed draws other parts.")
def sample_command(folder: Path, kind: str, seed: int) -> None:
    """Draw a small data set of parts with four kinds of defect and exact masks, in the MVTec AD layout."""
    from flawmap.datasets import find_dataset
    from flawmap.datasets.drawn import draw_dataset
    from flawmap.files import filling, unwritable

    try:
        with filling(folder):
            draw_dataset(folder, kind, seed)
    except OSError as error:
        raise unwritable(folder, error) from error
    say_all(find_dataset(folder).describe())
