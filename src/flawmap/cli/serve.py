"""`flawmap serve` and `flawmap key`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import click

from flawmap.cli.options import DATABASE, KEEP, KEEP_GB, STORE, Finite
from flawmap.cli.streams import Ended
from flawmap.errors import service_is_missing


@click.command("serve")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@STORE
@DATABASE
@KEEP
@KEEP_GB
@click.option(
    "--on-full",
    type=click.Choice(["refuse", "judge"]),
    default="refuse",
    show_default=True,
    help="When the pictures' disk is full: refuse images, or judge without keeping pictures.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), help="File of keys, see `flawmap key`; needed off this machine."
)
@click.option("--queue", type=click.IntRange(1, 10_000), default=64, show_default=True, help="Images that may wait.")
@click.option("--max-mb", type=Finite(0.001, 2000), default=64, show_default=True, help="Of one request.")
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="Folder that may be trained from.")
@click.option("--engine", type=click.Choice(["auto", "openvino", "onnxruntime", "torch"]), default="auto")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of the engine; all cores by default.")
def serve_command(
    models: tuple[Path, ...],
    host: str,
    port: int,
    store: Path,
    database: str | None,
    keep: Literal["defects", "all", "none"],
    keep_gb: float,
    on_full: str,
    keys: Path | None,
    queue: int,
    max_mb: float,
    data: Path | None,
    engine: str,
    threads: int | None,
) -> None:
    """Serve models: REST, a page for the line, and records of every inspection.

    Each MODEL is called by its file's name without the ending. The page is at the address that is printed; REST is
    below /v1, described at /openapi.json.
    """
    import logging

    try:
        from flawmap.service.keys import Keys
        from flawmap.service.server import serve
        from flawmap.service.service import Options
    except ModuleNotFoundError as error:
        raise service_is_missing("flawmap serve", error) from error
    if data is not None and not data.is_dir():
        raise click.BadParameter(f"{data} is no folder", param_hint="--data")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    options = Options(
        store=store,
        database=database,
        keep=keep,
        keep_bytes=round(keep_gb * 1e9),
        judge_when_full=on_full == "judge",
        keys=None if keys is None else Keys.read(keys),
        queue=queue,
        max_bytes=round(max_mb * 1e6),
        data=data,
        engine=engine,
        threads=threads,
    )

    def started(url: str) -> None:
        click.echo(f"page {url}/   REST {url}/v1   records {store}", err=True)
        if keys is None:
            click.echo("no keys: only this machine is served, and whoever is on it may do everything", err=True)

    with suppress(Ended, KeyboardInterrupt):  # what it accepted is finished then
        serve(list(models), options, host, port, started=started)


@click.command("key")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["inspect", "operate", "administer"]),
    default="inspect",
    show_default=True,
    help="inspect: send images and read; operate: also give words; administer: also thresholds and training.",
)
def key_command(file: Path, name: str, role: Literal["inspect", "operate", "administer"]) -> None:
    """Make a key for `flawmap serve --keys FILE`. It is printed once; the file keeps its hash alone."""
    from flawmap.service.keys import add_key

    click.echo(add_key(file, name, role))
