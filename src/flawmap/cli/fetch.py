"""flawmap fetch"""

from __future__ import annotations

from pathlib import Path

import click

from flawmap.cli.options import check_output
from flawmap.cli.say import say


@click.command("fetch")
@click.argument("backbone")
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: BACKBONE.safetensors in this folder]",
)
def fetch_command(backbone: str, output: Path | None) -> None:
    """Write the pretrained weights of BACKBONE, a timm name, into a file for machines without a network.

    There `flawmap train --backbone BACKBONE --weights FILE` takes them.
    """
    path = Path(f"{backbone}.safetensors") if output is None else output
    if path.suffix != ".safetensors":
        raise click.BadParameter(f"{path} does not end in .safetensors", param_hint="-o")
    check_output(path)
    from flawmap.cli.progress import quiet_libraries

    quiet_libraries()
    from flawmap.backbones import save_weights

    save_weights(backbone, path)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); use: --backbone {backbone} --weights {path}")
