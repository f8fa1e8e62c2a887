"""ONNX graphs in the engines of the line, on graphs made by onnx.helper: values, defaults, threads."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor

from flawmap import FlawmapError
from flawmap.line.engines import ENGINES, available_engines, compile_graph
from flawmap.line.pruning import pruned

GRAPH_ENGINES = ("onnxruntime", "openvino")
F = TensorProto.FLOAT
TABLE = np.arange(12, dtype=np.float32).reshape(6, 2)


def info(name, *shape, kind=F):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.fixture(scope="module")
def graph():
    """images (B, 3, 4, 5) times `gain`; the `table`, of which `rows` are picked; `broken` cannot be computed.

    gain, table and rows are inputs that have a default.
    """
    nodes = [
        helper.make_node("Mul", ["images", "gain"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled"], ["map"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["scaled"], ["score"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["table", "gain"], ["moved_table"]),
        helper.make_node("Gather", ["moved_table", "rows"], ["picked"]),
        helper.make_node("Reshape", ["images", "impossible"], ["broken"]),
    ]
    inputs = [info("images", "B", 3, 4, 5), info("gain"), info("table", 6, 2), info("rows", 4, kind=TensorProto.INT64)]
    outputs = [
        info("map", "B", 1, 4, 5),
        info("score", "B"),
        info("moved_table", 6, 2),
        info("picked", 4, 2),
        info("broken", 7, 11),
    ]
    initializers = [
        helper.make_tensor("gain", F, [], [2.0]),
        helper.make_tensor("table", F, [6, 2], TABLE.ravel()),
        helper.make_tensor("rows", TensorProto.INT64, [4], [0, 1, 2, 3]),
        helper.make_tensor("impossible", TensorProto.INT64, [2], [7, 11]),
    ]
    return model(nodes, inputs, outputs, initializers).SerializeToString()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((5, 3, 4, 5), dtype=np.float32)


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
class TestEachEngine:
    def test_outputs_come_in_the_order_of_their_names(self, engine, graph, images):
        compiled = compile_graph(graph, engine, outputs=("score", "map"))
        assert compiled.name == engine
        for batch in (images, images[:1]):
            score, anomaly_map = compiled(batch)
            np.testing.assert_allclose(score, 2 * batch.max((1, 2, 3)), rtol=1e-6)
            np.testing.assert_allclose(anomaly_map, 2 * batch.mean(1, keepdims=True), rtol=1e-5, atol=1e-6)
        (score,) = compile_graph(graph, engine, outputs=("score",))(images)
        np.testing.assert_allclose(score, 2 * images.max((1, 2, 3)), rtol=1e-6)

    def test_defaults_hold_until_others_are_given(self, engine, graph, images):
        compiled = compile_graph(graph, engine, outputs=("score",))
        highest = images.max((1, 2, 3))
        moved = compiled.moved({"gain": np.array(5, np.float32)})
        again = moved.moved({"table": TABLE + 1})
        for _ in range(2):
            np.testing.assert_allclose(compiled(images)[0], 2 * highest, rtol=1e-6)
            np.testing.assert_allclose(moved(images)[0], 5 * highest, rtol=1e-6)
            np.testing.assert_allclose(again(images)[0], 5 * highest, rtol=1e-6)
        np.testing.assert_array_equal(compiled.run({}, ["moved_table"])[0], 2 * TABLE)
        np.testing.assert_array_equal(moved.run({}, ["moved_table"])[0], 5 * TABLE)
        np.testing.assert_array_equal(again.run({}, ["moved_table"])[0], 5 * (TABLE + 1))
        np.testing.assert_array_equal(moved.run({"gain": np.array(3, np.float32)}, ["moved_table"])[0], 3 * TABLE)
        np.testing.assert_array_equal(moved.run({}, ["moved_table"])[0], 5 * TABLE)

    def test_what_is_given_at_first_is_no_default(self, engine, graph, images):
        compiled = compile_graph(graph, engine, outputs=("score",), given={"gain": np.array(-1, np.float32)})
        np.testing.assert_allclose(compiled(images)[0], -images.min((1, 2, 3)), rtol=1e-6)
        np.testing.assert_array_equal(compiled.run({}, ["picked"])[0], -TABLE[:4])

    def test_only_what_is_asked_for_is_computed(self, engine, graph, images):
        compiled = compile_graph(graph, engine, outputs=("map", "score"))
        rows = np.array([5, 5, 0, 1])
        picked, table = compiled.run({"rows": rows}, ["picked", "moved_table"])  # without images
        np.testing.assert_array_equal(picked, 2 * TABLE[rows])
        np.testing.assert_array_equal(table, 2 * TABLE)
        with pytest.raises(Exception, match=r"(?i)shape"):
            compiled.run({"images": images}, ["broken"])
        np.testing.assert_allclose(compiled(images)[1], 2 * images.max((1, 2, 3)), rtol=1e-6)

    def test_results_stay_when_the_engine_runs_again(self, engine, graph, images):
        compiled = compile_graph(graph, engine, outputs=("map", "score"))
        first = compiled(images)
        before = [output.copy() for output in first]
        compiled(-images)
        for one, other in zip(first, before, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_sixteen_threads_get_what_one_gets(self, engine, graph, images):
        compiled = compile_graph(graph, engine, outputs=("map", "score"))
        moved = {gain: compiled.moved({"gain": np.array(gain, np.float32)}) for gain in range(16)}
        expected = {gain: moved[gain](images * gain) for gain in moved}
        together = threading.Barrier(16)

        def work(gain):
            together.wait()
            found = []
            for turn in range(30):
                found.append(moved[gain](images * gain))
                if turn % 10 == 0:
                    (table,) = moved[gain].run({"table": TABLE + turn}, ["moved_table"])
                    np.testing.assert_array_equal(table, gain * (TABLE + turn))
            return found

        with ThreadPoolExecutor(16) as pool:
            for gain, found in zip(moved, pool.map(work, moved), strict=True):
                for outputs in found:
                    for one, other in zip(outputs, expected[gain], strict=True):
                        np.testing.assert_array_equal(one, other)

    def test_where_inputs_are_scored_reaches_the_graphs_that_ask_for_it(self, engine, images, graph):
        nodes = [
            helper.make_node("Mul", ["images", "inside"], ["kept"]),
            helper.make_node("ReduceSum", ["kept"], ["score"], keepdims=0),
        ]
        nodes[1] = helper.make_node("ReduceMax", ["kept"], ["score"], axes=[1, 2, 3], keepdims=0)
        masked = model(nodes, [info("images", "B", 3, 4, 5), info("inside", "B", 1, 4, 5)], [info("score", "B")])
        inside = (np.random.default_rng(1).random((5, 1, 4, 5)) > 0.5).astype(np.float32)
        (score,) = compile_graph(masked.SerializeToString(), engine, outputs=("score",))(images, inside)
        np.testing.assert_allclose(score, (images * inside).max((1, 2, 3)), rtol=1e-6)
        (score,) = compile_graph(graph, engine, outputs=("score",))(images, inside)  # which does not look at it
        np.testing.assert_allclose(score, 2 * images.max((1, 2, 3)), rtol=1e-6)

    def test_large_products_are_those_of_float32(self, engine):
        """On processors with bfloat16 or TF32 units engines take those where they are let."""
        weights = np.random.default_rng(2).standard_normal((300, 40), dtype=np.float32)
        nodes = [helper.make_node("MatMul", ["images", "weights"], ["score"])]
        graph = model(
            nodes, [info("images", "B", 300)], [info("score", "B", 40)],
            [helper.make_tensor("weights", F, [300, 40], weights.ravel())],
        )  # fmt: skip
        x = np.random.default_rng(3).standard_normal((50, 300), dtype=np.float32)
        (found,) = compile_graph(graph.SerializeToString(), engine, outputs=("score",))(x)
        np.testing.assert_allclose(found, x.astype(np.float64) @ weights, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "match"),
    [("tensorrt", "unknown engine tensorrt: choose auto, openvino, onnxruntime, torch"), ("torch", r"\.safetensors")],
)
def test_other_engines_are_refused_in_one_line(graph, engine, match):
    with pytest.raises(FlawmapError, match=match) as caught:
        compile_graph(graph, engine, outputs=("score",))
    assert "\n" not in str(caught.value)


def test_an_engine_that_is_not_installed_is_named_with_its_extra(graph, monkeypatch):
    import flawmap.line.engines as engines

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert available_engines() == ["onnxruntime", "torch"]
    assert compile_graph(graph, outputs=("score",)).name == "onnxruntime"
    with pytest.raises(FlawmapError, match=r"openvino is not installed: pip install 'flawmap\[openvino\]'"):
        compile_graph(graph, "openvino", outputs=("score",))


def test_auto_takes_the_first_of_the_fixed_order(graph):
    assert ENGINES == ("openvino", "onnxruntime", "torch")
    assert compile_graph(graph, outputs=("score",)).name == available_engines()[0]


def test_engines_need_no_torch_and_no_onnx(graph, tmp_path):
    (tmp_path / "graph.onnx").write_bytes(graph)
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from flawmap.line.engines import compile_graph\n"
        "graph = Path(sys.argv[1]).read_bytes()\n"
        "for engine in ('onnxruntime', 'openvino'):\n"
        "    compile_graph(graph, engine, outputs=('score',))(np.ones((1, 3, 4, 5), np.float32))\n"
        "print(sorted({'torch', 'onnx', 'timm'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "graph.onnx"], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# Pruning, held against onnx's own


@st.composite
def graphs(draw):
    """A graph of up to 12 nodes, each of which takes one or two of the inputs, weights and nodes before it."""
    names, nodes = ["x", "y", "w", "v"], []
    for number in range(draw(st.integers(1, 12))):
        taken = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
        nodes.append(helper.make_node("Sum", taken, [f"n{number}"], name=f"node{number}"))
        names.append(f"n{number}")
    computed = names[4:]
    outputs = draw(st.lists(st.sampled_from(computed), min_size=1, unique=True))
    weights = [helper.make_tensor(name, F, [3], [1, 2, index]) for index, name in enumerate("wvy")]
    made = model(nodes, [info("x", 3), info("y", 3)], [info(name, 3) for name in outputs], weights)
    made = onnx.shape_inference.infer_shapes(made)
    return made, draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_pruning_keeps_the_nodes_that_onnx_keeps(drawn):
    whole, asked = drawn
    found = onnx.load_from_string(pruned(whole.SerializeToString(), asked))
    onnx.checker.check_model(found, full_check=True)
    expected = Extractor(whole).extract_model([], asked)
    assert [node.name for node in found.graph.node] == [node.name for node in expected.graph.node]
    assert {output.name for output in found.graph.output} == set(asked)
    needed = {name for node in found.graph.node for name in node.input}
    assert {entry.name for entry in found.graph.initializer} == needed & {"w", "v", "y"}
    assert {entry.name for entry in found.graph.input} == needed & {"x", "y"}
    assert found.opset_import == whole.opset_import
    x = {"x": np.array([4, 5, 6], np.float32)}
    expected = ReferenceEvaluator(whole).run(asked, x)
    for one, other in zip(ReferenceEvaluator(found).run(asked, x), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pruning_keeps_what_branches_take_from_around_them():
    branches = [
        helper.make_graph([helper.make_node("Add", ["a", name], [f"out_{name}"])], name, [], [info(f"out_{name}", 3)])
        for name in ("w", "v")
    ]
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("If", ["which"], ["score"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Exp", ["x"], ["other"]),
    ]
    weights = [helper.make_tensor(name, F, [3], [1, 2, index]) for index, name in enumerate("wvu")]
    whole = model(
        nodes, [info("x", 3), info("which", kind=TensorProto.BOOL)], [info("score", 3), info("other", 3)], weights
    )
    found = onnx.load_from_string(pruned(whole.SerializeToString(), ["score"]))
    onnx.checker.check_model(found, full_check=True)
    assert [node.op_type for node in found.graph.node] == ["Neg", "If"]
    assert {entry.name for entry in found.graph.initializer} == {"w", "v"}
    session = onnxruntime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    for which, last in ((True, 0), (False, 1)):
        (score,) = session.run(["score"], {"x": np.zeros(3, np.float32), "which": np.array(which)})
        np.testing.assert_array_equal(score, [1, 2, last])
