"""flawmap demo"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click

from flawmap.cli.say import say, say_all

_MARK = ".flawmap-demo"


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"), show_default=True
)
def demo_command(output: Path) -> None:
    """Draw a data set of circuit boards, train on it, evaluate, and inspect its test images."""
    from flawmap.cli.evaluate import report_table, write_report
    from flawmap.cli.inspect import Shown, find_parts
    from flawmap.cli.progress import ProgressLines, quiet_libraries
    from flawmap.datasets import find_dataset
    from flawmap.datasets.drawn import draw_dataset
    from flawmap.errors import FlawmapError
    from flawmap.report.drawings import make_folder
    from flawmap.text import counted

    quiet_libraries()
    start = time.monotonic()
    if output.exists() and any(output.iterdir()):
        if not (output / _MARK).exists():
            raise FlawmapError(f"{output} is not empty and was not made by `flawmap demo`: give another folder with -o")
        shutil.rmtree(output)
    make_folder(output)
    (output / _MARK).touch()
    data, model, heatmaps = output / "boards", output / "boards.safetensors", output / "heatmaps"
    say(f"$ flawmap sample {data}")
    draw_dataset(data, "boards", 0)
    dataset = find_dataset(data)
    say_all(dataset.describe())

    from flawmap.detector import Detector

    say_all(f"\n$ flawmap train {data} -o {model} --method padim")
    with ProgressLines() as progress:
        detector = Detector("padim").fit(dataset, progress=progress)
    detector.save(model)
    say_all(detector.inspector().judge.describe())
    say(f"wrote {model} ({model.stat().st_size / 1e6:.1f} MB)")

    page = output / "report.html"
    say_all(f"\n$ flawmap evaluate {model} {data} --html {page}")
    report = detector.evaluate(dataset)
    say_all(report_table(report))
    write_report(page, detector.inspector(), dataset, report)
    say(f"wrote {page}")

    say_all(f"\n$ flawmap inspect {model} {data / 'test'} -o {heatmaps}")
    parts = find_parts([data / "test"], heatmaps)
    shown = Shown(heatmaps, model, detector.inspector(), parts, caption=False)
    for number, inspection in enumerate(detector.inspector().stream((path for path, _ in parts), keep_pixels=True)):
        shown.draw(number, inspection)
    shown.close(finished=True)
    say(f"wrote {counted(len(parts), 'heatmap')} to {heatmaps}, and {heatmaps / 'index.html'} that shows them")
    say_all(f"\ndone in {time.monotonic() - start:.0f} s")
