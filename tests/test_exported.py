"""Exported files: read back they say what the detector says; damaged and forged ones are refused."""

import base64
import json
import re
import zlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from flawmap import Detector, FlawmapError, Inspector, read_image
from flawmap.datasets.drawn import draw_dataset
from flawmap.export import export, exporting, proof, quantisation
from flawmap.imaging.geometry import Geometry
from flawmap.judging.calibration import Calibration
from flawmap.line.exported import arrays_from_json, arrays_to_json, read_exported, with_metadata
from flawmap.line.protobuf import field
from flawmap.report.overlays import overlay

F2R = {"epochs": 3, "views": 2, "hidden": 0.5, "max_vectors": 300, "max_candidates": 10_000}
CLS_CNF = {"epochs": 2, "freeze_epochs": 2, "tune_epochs": 1}


@pytest.fixture(scope="module")
def path(detector, tmp_path_factory):
    written = tmp_path_factory.mktemp("exported") / "screws.onnx"
    export(detector, written)
    return written


@pytest.fixture(scope="module", params=["f2r", "cls_cnf"])
def live(request, drawn, tmp_path_factory):
    """A detector with settings that can be moved, its exported file, and other values of them."""
    settings = {"f2r": F2R, "cls_cnf": CLS_CNF}[request.param]
    detector = Detector(request.param, image_size=128, engine="torch", max_false_reject=0.2, **settings).fit(drawn)
    written = tmp_path_factory.mktemp("live") / "model.onnx"
    export(detector, written, check=drawn / "test" / "good")
    return detector, written, {"f2r": {"alpha": 0.5, "beta": 1.1}, "cls_cnf": {"weight": 0.3}}[request.param]


def assert_alike(found, expected, rel=1e-4):
    assert [one.verdict for one in found] == [one.verdict for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.score is None:
            continue
        assert ours.score == pytest.approx(theirs.score, rel=rel)
        assert ours.p_value == theirs.p_value
        assert ours.threshold == pytest.approx(theirs.threshold, rel=rel)
        np.testing.assert_allclose(ours.anomaly_map, theirs.anomaly_map, rtol=rel, atol=rel * theirs.maps.max())
        assert [region.box for region in ours.regions] == [region.box for region in theirs.regions]


def test_equal_models_give_equal_bytes_and_the_metadata_is_one_key_of_canonical_json(detector, path, tmp_path):
    export(detector, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    model = onnx.load(path)
    onnx.checker.check_model(model)
    (entry,) = model.metadata_props
    assert entry.key == "flawmap"
    content = json.loads(entry.value)
    assert entry.value == json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert content["format"] == 1
    assert content["calibration"]["scores"] == detector.calibration_.scores.tolist()
    assert content["training"]["fitted"] == detector.training_["fitted"]
    assert not {"time", "path", "date"} & content.keys()


def test_the_graph_takes_pixels_of_any_number_of_images(detector, path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["B", 3, 128, 128])
    assert [output.name for output in session.get_outputs()] == ["map", "score", "embedding"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 128, 128), dtype=np.uint8)
    normalised = torch.from_numpy(detector.preparation_.preprocessing.normalised(pixels))
    with torch.inference_mode():
        expected = detector.method_(normalised)
    for count in (1, 3):
        found = session.run(["map", "score"], {"images": pixels[:count]})
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs[:count], rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_thresholds_move_and_pictures_are_drawn_as_before(detector, path, drawn, engine):
    inspector = Inspector.load(path, engine=engine)
    assert_alike(inspector.predict(drawn / "test"), detector.predict(drawn / "test"))
    assert inspector.heat_scale() == detector.heat_scale()
    rate, value = {"max_false_reject": 0.3}, {"threshold": 3.0}
    for moved in (rate, value):
        assert_alike(
            inspector.with_threshold(**moved).predict(drawn / "test"),
            detector.with_threshold(**moved).predict(drawn / "test"),
        )
    image = next((drawn / "test" / "scratched_head").iterdir())
    pixels, scale = read_image(image), detector.heat_scale()
    ours, theirs = overlay(pixels, inspector.predict(image), scale), overlay(pixels, detector.predict(image), scale)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_tail_is_exported_as_it_is(detector, drawn, tmp_path):
    tail = detector.with_threshold(tail=True)
    export(tail, tmp_path / "tail.onnx", check=drawn / "test" / "good")
    inspector = Inspector.load(tmp_path / "tail.onnx", engine="onnxruntime")
    assert inspector.judge.threshold == tail.threshold_ == detector.calibration_.threshold(0.1, "tail")
    back = inspector.with_threshold(max_false_reject=0.1, guarantee="marginal", unsure=True)
    assert back.judge.threshold == detector.threshold_
    assert back.judge.between == detector.with_threshold(unsure=True).inspector().judge.between


@pytest.mark.parametrize("kind", ["tile", "keep_aspect", "crop", "roi", "register", "16 bit"])
def test_every_geometry_goes_along(drawn, tmp_path, kind):
    given, source, images = {}, drawn / "train" / "good", drawn / "test"
    if kind in ("tile", "keep_aspect", "crop"):
        tile = "96,16" if kind == "tile" else None
        given["geometry"] = Geometry.from_options(kind == "keep_aspect", 96 if kind == "crop" else None, tile)
    elif kind == "roi":
        mask = np.zeros((128, 128), np.uint8)
        mask[20:110, 30:100] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        given["roi"] = tmp_path / "mask.png"
    elif kind == "register":
        given["register"] = next(source.iterdir())
    else:
        source, images = tmp_path / "deep", tmp_path / "new"
        for folder, of in ((source, "train"), (images, "test")):
            folder.mkdir()
            for image in (drawn / of / "good").iterdir():
                grey = np.asarray(Image.open(image).convert("L")).astype(np.uint16)
                Image.fromarray(grey * 16 + 5).save(folder / image.name)
    detector = Detector("patchcore", image_size=128, max_false_reject=0.1, **given).fit(source)
    export(detector, tmp_path / "model.onnx", check=images)
    expected = detector.predict(images)
    assert {one.verdict for one in expected} - {"error"}
    assert_alike(Inspector.load(tmp_path / "model.onnx", engine="onnxruntime").predict(images), expected)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_live_settings_move_in_the_file_as_in_the_detector(live, drawn, engine):
    detector, path, values = live
    inspector = Inspector.load(path, engine=engine)
    before = inspector.predict(drawn / "test")
    assert_alike(before, detector.predict(drawn / "test"))
    moved, expected = inspector.with_settings(**values), detector.with_settings(**values)
    scores = expected.calibration_.scores
    np.testing.assert_allclose(moved.judge.calibration.scores, scores, rtol=1e-4, atol=1e-5 * float(scores.max()))
    assert moved.judge.threshold.value == pytest.approx(expected.threshold_.value, rel=1e-4)
    found, told = moved.predict(drawn / "test"), expected.predict(drawn / "test")
    assert any(abs(a.score - b.score) > 1e-3 for a, b in zip(found, before, strict=True))
    for ours, theirs in zip(found, told, strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
        np.testing.assert_allclose(ours.maps, theirs.maps, rtol=1e-4, atol=1e-4 * theirs.maps.max())
    assert {name: moved.card.config[name] for name in values} == values
    unsure = inspector.with_settings(calibrate=False, **values).predict(next((drawn / "test" / "good").iterdir()))
    assert (unsure.verdict, unsure.p_value) == (None, None)
    assert unsure.score == pytest.approx(found[[one.path for one in found].index(unsure.path)].score, rel=1e-6)
    for ours, theirs in zip(inspector.predict(drawn / "test"), before, strict=True):
        assert ours.score == theirs.score


def test_live_inputs_have_the_trained_values_where_none_are_given(live, drawn):
    detector, path, values = live
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    defaults = {entry.name for entry in session.get_overridable_initializers()}
    assert {"w" if name == "weight" else name for name in values} <= defaults
    image = read_image(next((drawn / "test" / "good").iterdir()))
    found = session.run(["score"], {"images": detector.preparation_.preprocessing(image)[None]})[0]
    assert float(found[0]) == pytest.approx(detector.predict(image).score, rel=1e-4)


def test_settings_that_cannot_be_moved_are_refused_in_one_line(live, path):
    _, written, values = live
    inspector, name = Inspector.load(written, engine="onnxruntime"), next(iter(values))
    for settings, named in (({name: -1}, f"{name}=-1"), ({name: "much"}, f"{name}=much"), ({"sigma": 1}, "sigma")):
        with pytest.raises(FlawmapError, match=named) as caught:
            inspector.with_settings(**settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(FlawmapError, match="no setting that can be moved"):
        Inspector.load(path, engine="onnxruntime").with_settings(alpha=1)


def refused(file):
    with pytest.raises(FlawmapError) as caught:
        Inspector.load(file, engine="onnxruntime")
    assert "\n" not in str(caught.value)
    assert file.name in str(caught.value)
    return str(caught.value)


def test_damaged_files_are_refused_in_one_line(path, tmp_path):
    whole, damaged = path.read_bytes(), tmp_path / "damaged.onnx"
    rng = np.random.default_rng(0)
    for length in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        refused(damaged)
    places = [*range(40), *rng.integers(0, len(whole), 60), *rng.integers(len(whole) - 9000, len(whole), 60)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(changed)
        refused(damaged)
    damaged.write_text("no model at all")
    refused(damaged)
    refused(tmp_path / "missing.onnx")
    with pytest.raises(FlawmapError, match="is no model"):
        Inspector.load(tmp_path / "model.pt")


def foreign(node_domain="", external=False):
    """A small ONNX model that flawmap did not make."""
    value = numpy_helper.from_array(np.ones(3, np.float32), "c")
    if external:
        value.ClearField("raw_data")
        value.data_location = TensorProto.EXTERNAL
        value.external_data.add(key="location", value="../elsewhere.bin")
    x = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3])
    y = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["B", 3])
    node = helper.make_node("Add", ["images", "c"], ["score"], domain=node_domain)
    graph = helper.make_graph([node], "foreign", [x], [y], [value])
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(node_domain, 1)] if node_domain else [])]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()


def test_forged_files_are_refused_in_one_line(path, tmp_path):
    _, content = read_exported(path)
    graph = read_exported(path)[0]
    file = tmp_path / "forged.onnx"
    file.write_bytes(foreign())
    assert "not made by flawmap" in refused(file)
    for forged, told in ((foreign("evil.ops"), "operators of"), (foreign(external=True), "data outside itself")):
        file.write_bytes(with_metadata(forged, content))
        assert told in refused(file)
    bomb = {"region": {"type": "uint8", "shape": [65 << 20], "zlib": ""}}
    bomb["region"]["zlib"] = base64.b64encode(zlib.compress(bytes(65 << 20), 9)).decode()
    for change in (
        {"arrays": bomb},
        {"arrays": {"region": {"type": "object", "shape": [1], "zlib": ""}}},
        {"calibration": {"mode": "crossfit", "scores": [], "peaks": []}},
        {"calibration": None},
        {"preparation": {}},
        {"guarantee": "surely"},
        {"max_false_reject": 7},
        {"captures": []},
        {"training": {}},
        {"live": 3},
        {"localises": False},
    ):
        file.write_bytes(with_metadata(graph, {**content, **change}))
        if change != {"localises": False}:  # which only drops the map
            refused(file)
    for key in content.keys() - {"format"}:
        file.write_bytes(with_metadata(graph, {name: value for name, value in content.items() if name != key}))
        if key not in ("precision", "training"):
            refused(file)


@pytest.mark.parametrize(
    "part",
    [
        field(8, b"\x0a"),
        field(8, b"\x0a\x09ab"),
        field(8, b"\x0b"),
        field(7, b"\x0b"),
        field(7, field(5, b"\x0b")),
        b"\x38\x05",
    ],
    ids=["opset cut off", "domain cut off", "opset", "graph", "weight", "graph that is a number"],
)
def test_a_well_signed_file_that_is_no_graph_is_refused_in_one_line(path, tmp_path, part):
    graph, content = read_exported(path)
    file = tmp_path / "forged.onnx"
    file.write_bytes(with_metadata(part if part[0] == 7 << 3 | 2 or part[0] == 0x38 else graph + part, content))
    assert "no graph that can be read" in refused(file)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("where", ["constant", "branch", "function"])
def test_no_tensor_is_read_from_another_file(path, tmp_path, monkeypatch, where, engine):
    """OpenVINO reads them from the working folder, of constants too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    value = numpy_helper.from_array(np.ones(3, np.float32), "k")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="secret.bin")
    constant = helper.make_node("Constant", [], ["k"], value=value)
    names = ("map", "score", "embedding")
    images, *outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3]) for name in ("images", *names))
    nodes, functions, weights = [constant], [], []
    opsets = [helper.make_opsetid("", 17)]
    if where == "branch":
        inner = helper.make_tensor_value_info("k", TensorProto.FLOAT, [3])
        branch = helper.make_graph([constant], "branch", [], [inner])
        weights = [helper.make_tensor("yes", TensorProto.BOOL, [], [True])]
        nodes = [helper.make_node("If", ["yes"], ["k"], then_branch=branch, else_branch=branch)]
    elif where == "function":
        functions = [helper.make_function("ai.onnx", "Secret", [], ["k"], [constant], opsets)]
        nodes = [helper.make_node("Secret", [], ["k"], domain="ai.onnx")]
    nodes += [helper.make_node("Add", ["images", "k"], [name]) for name in names]
    graph = helper.make_graph(nodes, "forged", [images], outputs, weights)
    forged = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8).SerializeToString()
    (tmp_path / "forged.onnx").write_bytes(with_metadata(forged, read_exported(path)[1]))
    with pytest.raises(FlawmapError, match=r"data outside itself|functions of its own"):
        Inspector.load(tmp_path / "forged.onnx", engine=engine)


def test_metadata_of_any_depth_is_refused_in_one_line(path, tmp_path):
    """Python's JSON is read to another depth than it is written."""
    graph, text = foreign(), json.dumps({**read_exported(path)[1], "digest": ""})[:-1]
    for depth in (10, *range(800, 1000), 100_000):
        nested = f'{text}, "deep": {"[" * depth}{"]" * depth}}}'
        (tmp_path / "deep.onnx").write_bytes(graph + field(14, field(1, b"flawmap") + field(2, nested.encode())))
        refused(tmp_path / "deep.onnx")


def test_arrays_go_through_json():
    arrays = {"b": np.eye(3, dtype=bool), "a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    kept = arrays_to_json(arrays)
    assert list(kept) == ["a", "b"]
    for name, array in arrays_from_json(json.loads(json.dumps(kept))).items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


@pytest.mark.parametrize(("output", "name"), [(0, "maps"), (1, "scores"), (2, "embeddings")])
def test_a_file_that_says_something_else_is_not_written(detector, tmp_path, monkeypatch, output, name):
    real = proof.inspector_of

    def spoilt(*arguments, **options):
        inspector = real(*arguments, **options)
        engine = inspector.engine

        def shifted(images, inside=None):
            found = engine(images, inside)
            found[output] = found[output] * np.float32(1.002)
            return found

        inspector.engine = shifted
        return inspector

    monkeypatch.setattr(proof, "inspector_of", spoilt)
    with pytest.raises(FlawmapError, match=f"something else: {name} differ by") as caught:
        export(detector, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_proof_counts_the_largest_difference():
    maps, scores = np.zeros((2, 1, 4, 4), np.float32), np.array([1.0, 4.0], np.float32)
    maps[1, 0, 2, 2] = 8
    theirs = [maps + np.float32(0.002), scores + np.array([1e-3, 0], np.float32)]
    found = proof._held_against("x", [([maps, scores], theirs)] * 2, ("map", "score"))
    assert (found.engine, found.images) == ("x", 4)
    assert (found.map, found.map_share) == pytest.approx((0.002, 0.00025), rel=1e-3)
    assert (found.score, found.score_share) == pytest.approx((1e-3, 0.00025), rel=1e-3)
    assert "4 " in found.describe()
    assert proof._held_against("x", [([scores], [scores])], ("score",)).map is None
    with pytest.raises(FlawmapError, match="scores differ"):
        proof._held_against("x", [([scores], [np.array([np.nan, 4], np.float32)])], ("score",))


def test_what_is_too_large_or_has_another_name_is_refused(detector, tmp_path, monkeypatch):
    with pytest.raises(FlawmapError, match=r"ends in \.onnx"):
        export(detector, tmp_path / "model.bin")
    monkeypatch.setattr(exporting, "LIMIT", 1000)
    with pytest.raises(FlawmapError, match=r"GB.*smaller backbone") as caught:
        export(detector, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_backbone_alone_is_quantised_and_calibrated_anew(tmp_path, monkeypatch):
    draw_dataset(tmp_path / "boards", "boards", 0, train=12, good=24, per_defect=1, size=128)
    detector = Detector("patchcore", image_size=128, max_false_reject=0.1, engine="torch").fit(tmp_path / "boards")
    good = tmp_path / "boards" / "test" / "good"
    with pytest.raises(FlawmapError, match="--check"):
        export(detector, tmp_path / "model.onnx", precision="int8")
    with pytest.raises(FlawmapError, match="not learnt from"):
        export(detector, tmp_path / "model.onnx", precision="int8", check=tmp_path / "boards" / "train" / "good")
    made = export(detector, tmp_path / "model.onnx", precision="int8", check=good, max_drop=1.0)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    taken = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    users = [node.name for node in nodes if taken & set(node.input) and node.op_type in ("Conv", "MatMul", "Gemm")]
    assert len(users) > 20
    assert all("/backbone/" in name for name in users)
    inspector = Inspector.load(tmp_path / "model.onnx", engine="onnxruntime")
    calibration = inspector.judge.calibration
    assert isinstance(calibration, Calibration)
    assert (calibration.mode, len(calibration.scores)) == ("folder", made.quantised.calibrated)
    found = np.array([one.score for one in inspector.predict(good)], np.float32)
    for score in calibration.scores:  # by another engine perhaps, whose 8-bit products are rounded otherwise
        assert np.abs(found / score - 1).min() < 0.05
    assert made.quantised.describe().startswith("int8: ")
    stand_out = iter([0.9, 0.8])
    monkeypatch.setattr(quantisation, "_stand_out", lambda *arguments: next(stand_out))
    with pytest.raises(FlawmapError, match="--max-drop"):
        export(detector, tmp_path / "lossy.onnx", precision="int8", check=good, max_drop=0.05)
    assert not (tmp_path / "lossy.onnx").exists()
    monkeypatch.setattr(quantisation, "_BACKBONE", re.compile("(?!)"))
    with pytest.raises(FlawmapError, match="has none"):
        export(detector, tmp_path / "lossy.onnx", precision="int8", check=good)


def test_a_model_with_a_region_of_interest_is_quantised_with_it(tmp_path, monkeypatch):
    draw_dataset(tmp_path / "boards", "boards", 0, train=12, good=12, per_defect=0, size=96)
    region = np.zeros((96, 96), bool)
    region[20:70, 30:80] = True
    detector = Detector(
        "padim", image_size=96, channels=8, roi=region, engine="torch", max_false_reject=0.1, calibration="crossfit"
    ).fit(tmp_path / "boards")
    good, file = tmp_path / "boards" / "test" / "good", tmp_path / "model.onnx"
    monkeypatch.setattr(quantisation, "_stand_out", lambda *arguments: 0.9)
    made = export(detector, file, precision="int8", check=good)
    inspector = Inspector.load(file)  # by the engine that calibrated it
    kept = inspector.judge.calibration.scores
    assert len(kept) == made.quantised.calibrated
    found = np.array([one.score for one in inspector.predict(good)], np.float32)
    for score in kept:
        assert np.abs(found / score - 1).min() < 1e-4
    image = read_image(next(good.iterdir())).copy()
    clean = inspector.predict(image)
    np.testing.assert_array_equal(np.isnan(clean.anomaly_map), ~region)
    image[40:60, 45:65] = (255, 0, 255)
    assert inspector.predict(image).score > 1.5 * clean.score
