"""Model files that are well signed and hostile: one line, soon, before anything large is made of them."""

import time

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from flawmap import Detector, FlawmapError
from flawmap.line.exported import read_exported, with_metadata
from flawmap.line.inspector import Inspector, read_card
from flawmap.model_file import read_model, write_model


def refused(load, path):
    start = time.monotonic()
    with pytest.raises(FlawmapError) as caught:
        load(path)
    assert time.monotonic() - start < 20
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def whole(model_file):
    return read_model(model_file)[:2]


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, '{"format": 3, "digest": ""' + ', "a": [' * 50_000])
def test_metadata_in_metadata(tmp_path, deep):
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", {"flawmap": deep})
    refused(Detector.load, tmp_path / "m.safetensors")
    refused(read_card, tmp_path / "m.safetensors")


PREPARATIONS = [
    {"size": [100_000, 100_000], "image_size": [100_000, 100_000]},
    {"size": [0, 0], "image_size": [0, 0]},
    {"size": [128, 128.5]},
    {"size": "128"},
    {"lowest_quality": float("1e300")},
    {"template_size": [3000, 3000]},
    {"template_size": [10**30, 1]},
    {"mean": [1e300, 0, 0], "std": [0, 0, 0]},
]
ARRAYS = [
    {"template": np.zeros((0, 0), np.float32)},
    {"template": np.zeros((0, 5), np.float32)},
    {"template": np.full((64, 64), np.nan, np.float32)},
    {"template": np.full((64, 64), 1e30, np.float32)},
    {"template": np.random.default_rng(0).random((3000, 3000), np.float32)},
    {"template": np.random.default_rng(0).random((64, 64))},
    {"template": np.random.default_rng(0).random((64, 64, 3), np.float32)},
    {"region": np.ones((4, 4, 3), np.uint8)},
    {"region": np.ones(4, np.uint8)},
    {"region": np.ones((0, 4), np.uint8)},
    {"region": np.full((4, 4), np.nan, np.float32)},
    {"other": np.ones((4, 4), np.uint8)},
]


@pytest.mark.parametrize("change", PREPARATIONS)
def test_a_preparation_that_cannot_be(whole, tmp_path, change):
    tensors, metadata = whole
    changed = {**metadata, "preparation": {**metadata["preparation"], **change}}
    write_model(tmp_path / "m.safetensors", tensors, changed)
    refused(Detector.load, tmp_path / "m.safetensors")
    refused(read_card, tmp_path / "m.safetensors")


@pytest.mark.parametrize("arrays", ARRAYS)
def test_pictures_that_cannot_be(whole, exported, tmp_path, arrays):
    from flawmap.line.exported import arrays_to_json

    tensors, metadata = whole
    size = [128, 128] if "template" in arrays else None
    preparation = {**metadata["preparation"], "template_size": size}
    kept = {f"preparation.{name}": torch.from_numpy(array) for name, array in arrays.items()}
    write_model(tmp_path / "m.safetensors", {**tensors, **kept}, {**metadata, "preparation": preparation})
    refused(Detector.load, tmp_path / "m.safetensors")
    refused(read_card, tmp_path / "m.safetensors")
    graph, content = read_exported(exported)
    changed = {**content, "preparation": preparation, "arrays": arrays_to_json(arrays)}
    (tmp_path / "m.onnx").write_bytes(with_metadata(graph, changed))
    refused(Inspector.load, tmp_path / "m.onnx")
    refused(read_card, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1}, {"seed": 10**30}, {"seed": "1"}, {"images": -1}, {"images": None},
    ],
)  # fmt: skip
def test_figures_of_a_training_that_cannot_be(whole, tmp_path, change):
    tensors, metadata = whole
    write_model(tmp_path / "m.safetensors", tensors, {**metadata, "training": {**metadata["training"], **change}})
    refused(Detector.load, tmp_path / "m.safetensors")
    refused(read_card, tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", ["type", "nan", "inf", "rows", "no rows", "columns", "dimensions"])
def test_tensors_that_cannot_be(whole, tmp_path, change):
    tensors, metadata = whole
    checked = 0
    for name, tensor in tensors.items():
        floats = tensor.is_floating_point()
        if name.startswith("backbone.") or tensor.numel() == 0 or (change in ("nan", "inf") and not floats):
            continue
        if change in ("rows", "no rows", "columns") and tensor.dim() < (2 if change == "columns" else 1):
            continue
        forged = {
            "type": lambda t: t.double() if t.is_floating_point() else t.float(),
            "nan": lambda t: torch.full_like(t, float("nan")),
            "inf": lambda t: torch.full_like(t, float("inf")),
            "rows": lambda t: torch.cat([t, t[:1]]),
            "no rows": lambda t: t[:0],
            "columns": lambda t: t[:, :-1].contiguous(),
            "dimensions": lambda t: t[None].contiguous(),
        }[change](tensor)
        write_model(tmp_path / "m.safetensors", {**tensors, name: forged}, metadata)
        if change == "rows" and "index" in name:  # a bank may have any number of vectors
            Detector.load(tmp_path / "m.safetensors")
            continue
        refused(Detector.load, tmp_path / "m.safetensors")
        checked += 1
    assert checked > 2


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("differnet", {"blocks": 100_000}), ("cainnflow", {"steps": 100_000}), ("draem", {"width": 100_000}),
        ("pouta", {"width": 100_000}), ("cflow", {"blocks": 100_000}), ("f2r", {"steps": 100_000}),
    ],
)  # fmt: skip
def test_networks_without_end(whole, tmp_path, method, settings):
    tensors, metadata = whole
    write_model(tmp_path / "m.safetensors", tensors, {**metadata, "method": method, "config": settings})
    refused(Detector.load, tmp_path / "m.safetensors")


# Exported files


def graph_of(nodes, initializers=(), **more):
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
            list(initializers),
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        **more,
    )


def ints(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def giant(operator, *values):
    node = helper.make_node(operator, ["s"] if operator == "ConstantOfShape" else ["images", "s"], ["score"])
    return graph_of([node], [ints("s", *values)])


def claiming():
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [2], [1.0, 2.0])
    tensor.dims[0] = 10**12
    return graph_of([helper.make_node("Add", ["images", "c"], ["score"])], [tensor])


def looping():
    body = helper.make_graph([], "body", [], [])
    return graph_of([helper.make_node("Loop", ["n", "c"], ["score"], body=body)])


def nested(depth):
    part = helper.make_graph([], "inner", [], [])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["x"], then_branch=part, else_branch=helper.make_graph([], "no", [], []))
        part = helper.make_graph([node], "inner", [], [])
    return graph_of([helper.make_node("If", ["c"], ["score"], then_branch=part, else_branch=part)])


def constant_shape():
    value = helper.make_node("Constant", [], ["s"], value=ints("", 100_000, 100_000))
    return graph_of([value, helper.make_node("Expand", ["images", "s"], ["score"])])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (giant("ConstantOfShape", 100_000, 100_000), "a constant of 1e"),
        (giant("Expand", 1, 10**6, 10**6), "a constant of 1e"),
        (giant("Tile", 1, 1, 10**5, 10**5), "a constant of 1e"),
        (constant_shape(), "a constant of 1e"),
        (claiming(), "holds less than it says"),
        (looping(), "Loop, which may run without end"),
        (nested(30), "graphs in graphs"),
        (
            graph_of([helper.make_node("EPContext", ["images"], ["score"], domain="com.microsoft")]),
            "EPContext of com.microsoft",
        ),
        (graph_of([helper.make_node("Run", ["images"], ["score"], domain="evil")]), "operators of b'evil'"),
    ],
)  # fmt: skip
def test_graphs_that_are_not_run(exported, tmp_path, model, told):
    content = read_exported(exported)[1]
    (tmp_path / "m.onnx").write_bytes(with_metadata(model.SerializeToString(), content))
    with pytest.raises(FlawmapError, match=told) as caught:
        Inspector.load(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
