"""The line without the lab: mtd's test set inspected by exported models in an environment of its own, beside the lab.

    python benchmarks/clean_line.py [--data FOLDER] [--methods patchcore padim f2r]

Each method is trained on mtd200 (see peer.py) and exported. A new virtual environment gets flawmap without its extras
(`pip install .`, so it has no PyTorch) and inspects the whole test set with each file; so does the lab, with the same
file, and with the trained model itself, all by onnxruntime. Printed: images whose verdict, p-value, regions or overlay
differs from the lab's, and the largest difference of scores as a share of the largest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flawmap import Detector, Inspector
from flawmap.cli.inspect import draw
from flawmap.export import export
from flawmap.imaging.image_files import find_images
from peer import DATA, SIZE, copy_mtd200

ROOT = Path(__file__).parents[1]


def run(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stderr}\n{command[0]} failed, see above")
    return done.stdout


def compare(name: str, programs: Path, data: Path, folder: Path) -> None:
    detector = Detector(name, image_size=SIZE, engine="onnxruntime").fit(data)
    detector.save(folder / f"{name}.safetensors")
    export(detector, folder / f"{name}.onnx")
    there = folder / name / "line"
    told = run(
        *(programs / "flawmap", "inspect", folder / f"{name}.onnx", data / "test"),
        *("--format", "jsonl", "-o", there, "--engine", "onnxruntime"),
    )
    lines = [json.loads(line) for line in told.splitlines()]
    paths = find_images(data / "test")
    exported = Inspector.load(folder / f"{name}.onnx", engine="onnxruntime")
    for side, inspector in (("file in the lab", exported), ("trained model", detector.inspector())):
        apart = {"verdict": 0, "p_value": 0, "regions": 0, "overlay": 0}
        scores = []
        for path, found, expected in zip(paths, lines, inspector.stream(paths), strict=True):
            own = expected.to_json()
            apart["verdict"] += found["verdict"] != own["verdict"]
            apart["p_value"] += found["p_value"] != own["p_value"]
            boxes = [[region["box"] for region in one["regions"]] for one in (found, own)]
            apart["regions"] += boxes[0] != boxes[1]
            target = path.relative_to(data / "test")
            if expected.verdict != "error":
                scores.append((found["score"], own["score"]))
                draw(folder / name / side / target, path, expected, inspector.heat_scale())
                overlay = target.with_name(f"{target.name.replace('.', '_')}_overlay.png")
                apart["overlay"] += (there / overlay).read_bytes() != (folder / name / side / overlay).read_bytes()
        share = max(abs(a - b) for a, b in scores) / max(abs(b) for _, b in scores)
        cells = "".join(f"{count:10d}" for count in apart.values())
        print(f"{name:12}{side:16}{len(lines):10d}{cells}{share:10.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="*", default=["patchcore", "padim", "f2r"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        copy_mtd200(options.data, folder / "mtd200")
        run(sys.executable, "-m", "venv", folder / "venv")
        programs = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        for part in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / part, folder / part)
        shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        run(programs / "python", "-m", "pip", "install", "--quiet", folder)
        print(
            run(programs / "python", "-c", "import importlib.util as u; print('torch:', u.find_spec('torch'))").strip()
        )
        columns = ("images", "verdict", "p-value", "regions", "overlay", "scores")
        print(f"{'method':12}{'beside the':16}" + "".join(f"{column:>10}" for column in columns))
        for method in options.methods:
            compare(method, programs, folder / "mtd200", folder)


if __name__ == "__main__":
    main()
