"""What verbs print: names of files take one line each and move no cursor."""

from __future__ import annotations

import click

from flawmap.text import printable


def say(line: str, *, err: bool = False) -> None:
    """One line, whatever the names in it hold."""
    click.echo(printable(line), err=err)


def say_all(text: str, *, err: bool = False) -> None:
    """Several lines."""
    click.echo("\n".join(map(printable, text.split("\n"))), err=err)
