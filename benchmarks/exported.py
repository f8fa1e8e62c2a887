"""Exported files: how far each is from its detector, and how fast it runs beside anomalib's own OpenVINO export.

    python benchmarks/exported.py [--data FOLDER] [--methods NAME ...] [--peer PYTHON] [--rounds 100]

Each method is trained on drawn boards at 128 px (60 good images; those that train by gradient for a few steps only,
since it is the file that is measured here, not the method), saved, exported, and held against itself in torch: the
largest difference of scores and of map values over 27 drawn pictures, in units of the largest, by each engine.

With --peer, an interpreter that has anomalib 2.7.0 (see anomalib_peer.py), PatchCore and PaDiM are trained on mtd200
(see peer.py) by both, exported by both, and run in turns in this process: ours from a decoded 224 px array to verdict
and map by `Inspector`, the peer's by its bare OpenVINO graph on an input made ready beforehand, which leaves out all
that its own inferencer does in Python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flawmap import Detector, Inspector  # before NumPy and PyTorch, which read how to wait when they load
from flawmap.datasets.drawn import draw_dataset
from flawmap.export import export
from flawmap.methods import METHODS

# isort: split
import numpy as np

from latency import in_turns
from peer import DATA, SIZE, copy_mtd200

DRAWN = 128
SHORT: dict[str, dict[str, Any]] = {
    "cainnflow": {"epochs": 10},
    "cfa": {"epochs": 5},
    "cflow": {"epochs": 3},
    "cls_cnf": {"epochs": 3, "freeze_epochs": 5, "tune_epochs": 3},
    "differnet": {"epochs": 5},
    "draem": {"max_steps": 60},
    "f2r": {"epochs": 5},
    "pouta": {"max_steps": 60},
}


def differences(methods: list[str], folder: Path) -> None:
    data = folder / "boards"
    draw_dataset(data, "boards", 0, train=60, good=4, per_defect=2, size=DRAWN)
    print(f"{'method':12}{'MB':>8}{'seconds':>9}  {'engine':12}{'scores':>10}{'maps':>10}")
    for name in methods:
        detector = Detector(name, image_size=DRAWN, **SHORT.get(name, {})).fit(data)
        detector.save(folder / f"{name}.safetensors")
        start = time.perf_counter()
        exported = export(detector, folder / f"{name}.onnx")
        took = time.perf_counter() - start
        size = exported.path.stat().st_size / 1e6
        for proof in exported.proofs:
            maps = "" if proof.map_share is None else f"{proof.map_share:10.1e}"
            print(f"{name:12}{size:8.1f}{took:9.1f}  {proof.engine:12}{proof.score_share:10.1e}{maps}", flush=True)


def beside_the_peer(peer: str, data: Path, folder: Path, rounds: int) -> None:
    import openvino as ov

    copied = folder / "mtd200"
    copy_mtd200(data, copied)
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    theirs = (pixels.transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32)
    core = ov.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    print(f"{'method':12}{'ours, ms':>10}{'peer, ms':>10}{'ratio':>8}")
    for name in ("patchcore", "padim"):
        script = str(Path(__file__).with_name("anomalib_peer.py"))
        command = [peer, script, name, "--data", str(copied), "--size", str(SIZE), "--export", str(folder / name)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"{run.stderr}\nthe peer failed, see above")
        model = core.compile_model(
            core.read_model(json.loads(run.stdout.splitlines()[-1])["exported"]), "CPU", settings
        )
        detector = Detector(name, image_size=SIZE).fit(copied)
        export(detector, folder / f"{name}.onnx")
        inspector = Inspector.load(folder / f"{name}.onnx", engine="openvino")
        inspector.warm_up()

        def ours(inspector: Inspector = inspector) -> None:
            found = inspector.predict(pixels)
            _ = found.verdict, found.anomaly_map

        took = in_turns({"ours": ours, "peer": lambda model=model: model([theirs])}, rounds)
        print(f"{name:12}{took['ours']:10.2f}{took['peer']:10.2f}{took['peer'] / took['ours']:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        differences(options.methods, Path(name))
        if options.peer:
            beside_the_peer(options.peer, options.data, Path(name), options.rounds)


if __name__ == "__main__":
    main()
