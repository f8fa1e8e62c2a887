"""One inspector, however it is called: from many threads, in streams that cross, with arrays, files and errors."""

import copy
import itertools
import multiprocessing
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import flawmap.detector as detector_module
import flawmap.imaging.reading as reading
import flawmap.line.inspector as inspector_module
from flawmap import Detector, FlawmapError, ImageError
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.image_files import find_images
from flawmap.imaging.reading import BATCH
from flawmap.judging.judge import Judge
from flawmap.line import Inspector
from flawmap.line.engines import ENGINES

SIZE = 128
THREADS = 16


@pytest.fixture(scope="module")
def paths(drawn):
    """Four good test images and two of each defect."""
    return find_images(drawn / "test")


@pytest.fixture(scope="module")
def arrays(paths):
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def alike(one, other):
    """Whether two inspections say the same, to the bit."""
    same = (one.verdict, one.score, one.p_value, one.threshold) == (
        other.verdict,
        other.score,
        other.p_value,
        other.threshold,
    )
    if one.maps is None or other.maps is None:
        return same and one.maps is other.maps
    return same and np.array_equal(one.maps, other.maps)


def in_threads(work):
    """What `work(number)` gives in THREADS threads that start at once."""
    together = threading.Barrier(THREADS)

    def started(number):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(started, range(THREADS)))


# Threads


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["model_file", "live_file"])
def test_sixteen_threads_get_what_one_gets(model, engine, arrays, request):
    shared = Inspector.load(request.getfixturevalue(model), engine=engine)  # whose first images come all at once
    assert shared.engine.name == engine

    def work(number):
        order = random.Random(number).sample(range(len(arrays)), 2)
        return [(index, shared.predict(arrays[index])) for index in order]

    together = in_threads(work)
    alone = [shared.predict(array) for array in arrays]
    assert len({inspection.score for inspection in alone}) == len(arrays)
    assert "error" not in {inspection.verdict for inspection in alone}
    for index, inspection in itertools.chain(*together):
        assert alike(inspection, alone[index])


def test_a_live_inspector_is_moved_in_one_thread_while_others_predict(exported_live, arrays):
    for engine in ("onnxruntime", "openvino"):
        shared = Inspector.load(exported_live, engine=engine)
        settings = [{"alpha": 0.1 * number} for number in range(4)]
        expected = [shared.with_settings(**each).predict(arrays[0]) for each in settings]
        still = shared.predict(arrays[0])
        assert len({inspection.score for inspection in (*expected, still)}) == 5

        def work(number, shared=shared, settings=settings):
            if number % 2:
                return shared.predict(arrays[0])
            return shared.with_settings(**settings[number // 2 % 4]).predict(arrays[0])

        for number, found in enumerate(in_threads(work)):
            assert alike(found, still if number % 2 else expected[number // 2 % 4])


def test_first_predictions_of_a_detector_from_many_threads_compile_once(model_file, arrays, monkeypatch):
    detector, made = Detector.load(model_file), []
    create = detector_module.create_engine

    def counted(*arguments, **options):
        made.append(threading.get_ident())
        return create(*arguments, **options)

    monkeypatch.setattr(detector_module, "create_engine", counted)
    found = in_threads(lambda number: (detector.inspector(), detector.predict(arrays[0])))
    assert len(made) == 1
    assert len({id(inspector) for inspector, _ in found}) == 1
    assert all(alike(inspection, found[0][1]) for _, inspection in found)


# Streams, lists, files, arrays


def test_streams_that_cross_keep_apart(detector, paths):
    inspector = detector.inspector()
    expected = dict(zip(paths, inspector.stream(paths), strict=True))
    backwards = paths[::-1]
    one, other = inspector.stream(paths), inspector.stream(backwards[:9])
    found = list(itertools.zip_longest(one, other))
    assert [inspection.path for inspection, _ in found] == paths
    assert [inspection.path for _, inspection in found[:9]] == backwards[:9]
    for inspection, crossing in found:
        assert alike(inspection, expected[inspection.path])
        if crossing is not None:
            assert crossing.score == pytest.approx(expected[crossing.path].score, rel=1e-4)
            assert crossing.verdict == expected[crossing.path].verdict


def test_single_images_can_be_inspected_while_a_stream_runs(detector, paths, arrays):
    inspector = detector.inspector()
    alone = [inspector.predict(array) for array in arrays]
    before = list(inspector.stream(paths))
    for number, inspection in enumerate(inspector.stream(paths)):
        assert alike(inspection, before[number])
        assert alike(inspector.predict(arrays[-1 - number]), alone[-1 - number])


def test_batches_say_what_single_images_say(detector, arrays):
    inspector = detector.inspector()
    small = np.asarray(Image.fromarray(arrays[0]).resize((90, 150)))
    grey = arrays[1].mean(2).astype(np.uint8)
    mixed = [*arrays, small, grey]
    assert len(mixed) > BATCH
    for batched, array in zip(inspector.predict_batch(mixed), mixed, strict=True):
        single = inspector.predict(array)
        assert batched.verdict == single.verdict
        assert batched.score == pytest.approx(single.score, rel=1e-4)
        assert batched.size == single.size == array.shape[:2]
        np.testing.assert_allclose(batched.maps, single.maps, rtol=1e-4, atol=1e-4 * single.maps.max())


def test_files_folders_lists_and_generators_say_the_same(detector, drawn, paths, arrays):
    inspector = detector.inspector()
    streamed = list(inspector.stream(path for path in paths))
    for found in (
        inspector.predict(drawn / "test"),
        inspector.predict(str(drawn / "test")),
        inspector.predict(paths),
        inspector.predict([str(path) for path in paths]),
        inspector.predict(arrays),
        inspector.predict_batch(iter(arrays)),
        list(inspector.stream(iter(arrays))),
        list(inspector.stream(map(str, paths))),
    ):
        assert all(map(alike, found, streamed))
        assert len(found) == len(paths)
    assert [inspection.path for inspection in streamed] == paths
    assert inspector.predict(arrays[3]).path is None
    assert alike(inspector.predict(paths[3]), inspector.predict(arrays[3]))


def test_a_detector_hands_on_to_its_inspector(detector, paths, arrays):
    inspector = detector.inspector()
    assert detector.inspector() is inspector
    assert all(map(alike, detector.predict(paths), inspector.predict(paths)))
    assert all(map(alike, detector.stream(paths), inspector.stream(paths)))
    assert alike(detector.predict(arrays[0]), inspector.predict(arrays[0]))
    assert detector.heat_scale() == inspector.heat_scale()
    assert detector.settings() == inspector.settings()
    assert inspector.judge.threshold == detector.threshold_
    assert inspector.card.calibration is detector.calibration_


def test_what_cannot_be_judged_is_an_error_and_the_rest_goes_on(detector, paths, arrays, tmp_path):
    inspector = detector.inspector()
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    bad = [
        tmp_path / "broken.png",
        tmp_path / "missing.png",
        np.zeros(7),
        np.full((64, 64), np.nan),
        tmp_path / "text.png",
    ]
    sources = [*arrays[:3], bad[0], *paths[3:9], *bad[1:4], arrays[9], bad[4]]
    expected = iter([inspector.predict(array) for array in arrays[:10]])
    found = list(inspector.stream(iter(sources)))
    assert len(found) == len(sources)
    for source, inspection in zip(sources, found, strict=True):
        if any(source is one for one in bad):
            assert (inspection.verdict, inspection.score, inspection.p_value) == ("error", None, None)
            assert inspection.path == (None if isinstance(source, np.ndarray) else source)
            assert "\n" not in inspection.error
            assert str(source if not isinstance(source, np.ndarray) else "the array") in inspection.error
        else:
            single = next(expected)
            assert inspection.verdict == single.verdict
            assert inspection.score == pytest.approx(single.score, rel=1e-4)
    assert inspector.predict(bad[1]).verdict == "error"
    assert [inspection.verdict for inspection in inspector.predict([bad[0], paths[0]])] == ["error", "good"]
    assert all(inspection.verdict == "error" for inspection in inspector.stream(bad))
    assert list(inspector.stream([])) == []
    for call in (inspector.predict, lambda array: inspector.predict_batch([arrays[0], array])):
        with pytest.raises(ImageError):
            call(np.zeros(7))


def test_a_failed_capture_is_an_error_with_its_reason(detector, arrays):
    found = detector.inspector().predict(np.zeros_like(arrays[0]))
    assert (found.verdict, found.score) == ("error", None)
    assert "the array: " in found.error
    assert "black" in found.error


# Windows


@pytest.mark.parametrize("geometry", [Geometry.tile(64, 16), Geometry()], ids=["tile", "stretch"])
def test_windows_and_regions_are_those_of_the_graph_run_by_hand(drawn, arrays, geometry):
    region = np.zeros((SIZE, SIZE), bool)
    region[20:110, 30:100] = True
    region[20:50, 30:60] = False
    small = {"levels": ("blocks.1",), "deep_levels": (), "min_vectors": 200, "image_size": 64, "engine": "torch"}
    detector = Detector("patchcore", geometry=geometry, roi=region, max_false_reject=0.2, **small).fit(drawn)
    graph, preparation = detector.graph(), detector.preparation_
    windows = 0
    for inspection, pixels in zip(detector.inspector().stream(arrays), arrays, strict=True):
        placement = preparation.place(pixels)
        inputs = torch.from_numpy(np.stack(list(preparation.inputs(pixels, placement))))
        inside = torch.from_numpy(placement.inside()[:, None].astype(np.float32))
        with torch.inference_mode():
            maps, scores, embeddings = graph(inputs, inside)
        windows += len(scores)
        assert inspection.score == pytest.approx(float(scores.max()), rel=1e-5)
        assert inspection.verdict == ("defect" if float(scores.max()) >= detector.threshold_.value else "good")
        np.testing.assert_allclose(inspection.maps, maps[:, 0], rtol=1e-4, atol=1e-5)
        laid = placement.lay_back(maps[:, 0].numpy())
        np.testing.assert_allclose(inspection.anomaly_map, laid, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.isnan(inspection.anomaly_map), ~region)
        assert embeddings.shape[1] == len(detector.capture_limits_.centre)
    assert windows > len(arrays) or geometry == Geometry()


# Forks


def forked(work, seconds=60):
    """What `work()` says in a fork of this process, a line; one that does not end is ended, and says nothing."""
    context = multiprocessing.get_context("fork")
    receives, sends = context.Pipe(duplex=False)

    def started():
        try:
            sends.send(work())
        except FlawmapError as error:
            sends.send(str(error))

    process = context.Process(target=started)
    process.start()
    said = receives.recv() if receives.poll(seconds) else None
    process.kill()
    process.join()
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fork_of_a_process_that_has_predicted_says_that_it_cannot(engine, model_file, arrays):
    """Its engine's threads are not in the fork; one that waited for them would never end."""
    inspector = Inspector.load(model_file, engine=engine)
    before = inspector.predict(arrays[0])
    assert "load it in each process" in forked(lambda: inspector.predict(arrays[0]).verdict)
    assert "load it in each process" in forked(lambda: next(inspector.stream(arrays)).verdict)
    assert alike(inspector.predict(arrays[0]), before)


# Copies and other thresholds


@pytest.mark.parametrize(
    ("fixture", "copied"), [("detector", lambda one: pickle.loads(pickle.dumps(one))), ("padim", copy.deepcopy)]
)
def test_copies_of_a_detector_that_has_predicted_predict_the_same(fixture, copied, arrays, request):
    detector = request.getfixturevalue(fixture)
    expected = [detector.predict(array) for array in arrays[3:5]]
    other = copied(detector)
    assert other.threshold_ == detector.threshold_
    for one in (other, detector):
        assert all(alike(one.predict(array), before) for array, before in zip(arrays[3:5], expected, strict=True))


def test_another_threshold_leaves_the_inspector_alone(detector, arrays):
    inspector = detector.inspector()
    before = [inspector.predict(array) for array in arrays]
    scores = sorted(inspection.score for inspection in before)
    given = inspector.with_threshold(threshold=scores[4])
    assert given.engine is inspector.engine
    assert given.judge.pixel_threshold == inspector.judge.pixel_threshold
    assert given.judge.threshold.value == scores[4]
    assert given.heat_scale() == inspector.heat_scale()
    after = [given.predict(array) for array in arrays]
    assert [inspection.verdict for inspection in after] == [
        "defect" if inspection.score >= scores[4] else "good" for inspection in before
    ]
    for one, other in zip(after, before, strict=True):
        assert (one.score, one.p_value, one.threshold) == (other.score, other.p_value, scores[4])
        assert [region.box for region in one.regions] == [region.box for region in other.regions]
    looser = inspector.with_threshold(max_false_reject=0.5)
    assert looser.judge.threshold == detector.calibration_.threshold(0.5)
    assert looser.judge.pixel_threshold == detector.calibration_.pixel_threshold(0.5).value < before[0].pixel_threshold
    strict = looser.with_threshold(max_false_reject=0.1, guarantee="confidence")
    assert strict.judge.threshold == detector.calibration_.threshold(0.1, "confidence")
    assert all(map(alike, (inspector.predict(array) for array in arrays), before))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({}, "either a false-reject rate or a threshold"),
        ({"max_false_reject": 0.1, "threshold": 1.0}, "either a false-reject rate or a threshold"),
        ({"max_false_reject": 0.0}, "between 0 and 1"),
        ({"max_false_reject": 1.0}, "between 0 and 1"),
        ({"max_false_reject": float("nan")}, "between 0 and 1"),
        ({"threshold": float("nan")}, "must be a number"),
        ({"max_false_reject": 0.1, "guarantee": "certain"}, "choose marginal or confidence"),
    ],
)
def test_thresholds_that_cannot_be_are_refused_in_one_line(detector, wrong, match):
    with pytest.raises(FlawmapError, match=match) as caught:
        detector.inspector().with_threshold(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["detector", "file"])
def test_moved_settings_keep_the_rate_that_was_asked_for(live, exported_live, source):
    inspector = live.inspector() if source == "detector" else Inspector.load(exported_live, engine="onnxruntime")
    asked = inspector.with_threshold(max_false_reject=0.6, guarantee="confidence")
    moved = asked.with_settings(alpha=0.3)
    assert moved.judge.threshold == moved.judge.calibration.threshold(0.6, "confidence")
    again = moved.with_settings(beta=0.3)
    assert again.judge.threshold == again.judge.calibration.threshold(0.6, "confidence")
    waiting = asked.with_settings(alpha=0.3, calibrate=False)
    assert (waiting.judge.threshold, waiting.judge.max_false_reject) == (None, 0.6)
    assert inspector.judge.threshold.requested == 0.3
    assert inspector.with_settings(alpha=0.3).judge.threshold.requested == 0.3


def test_moved_settings_leave_the_unsure_unsure(detector):
    inspector = detector.inspector().with_threshold(unsure=True, tail=True)
    waiting = detector.inspector().with_threshold(max_false_reject=0.2)
    for calibration in (None, detector.calibration_):
        waiting.judge = Judge(0.1, "marginal", calibration)
        inspector._mover = lambda settings, calibrate: waiting
        moved = inspector.with_settings(alpha=1.0)
        assert (moved.judge.unsure, moved.judge.guarantee) == (True, "tail")
        assert moved.judge.between == (None if calibration is None else inspector.judge.between)


# What the engine is asked, by an engine that only looks


class Looking:
    """Notes what it is given; the first run of each batch size takes 1000 s on `clock`, every other 1 s."""

    name = "looking"

    def __init__(self, clock, values=1.0):
        self.clock, self.values = clock, values
        self.seen, self.inside = [], []

    def __call__(self, images, inside=None):
        self.clock.now += 1.0 if len(images) in self.seen else 1000.0
        self.seen.append(len(images))
        self.inside.append(inside)
        assert images.dtype == np.uint8
        count = len(images)
        scores = np.full(count, self.values, np.float32)
        return [np.ones((count, 1, *images.shape[2:]), np.float32), scores, np.ones((count, 2), np.float32)]


@pytest.fixture
def looking(detector, monkeypatch):
    """An inspector whose engine only looks, and a clock that stands still but for it."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(inspector_module, "time", clock)
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    inspector = detector.inspector()
    card = copy.copy(inspector.card)
    object.__setattr__(card, "captures", copy.copy(card.captures))
    object.__setattr__(card.captures, "centre", ())
    return Inspector(card, Looking(clock), inspector.judge, None)


def test_milliseconds_hold_no_compiling(looking, arrays):
    assert looking.predict(arrays[0]).milliseconds == pytest.approx(1000)
    assert [inspection.milliseconds for inspection in looking.predict_batch(arrays[:4])] == pytest.approx([250] * 4)
    batches = [inspection.milliseconds for inspection in looking.predict_batch(arrays[:10])]
    assert batches == pytest.approx([1000 / 8] * 8 + [500] * 2)
    assert looking.engine.clock.now == 1000 * 4 + 4  # each of 1, 4, 8 and 2 was tried once before


def test_warming_up_runs_what_single_images_and_streams_run(looking, arrays):
    looking.warm_up()
    assert looking.engine.seen == [1, BATCH]
    looking.warm_up()
    assert looking.engine.seen == [1, BATCH]
    looking.predict(arrays[0])
    list(looking.stream(arrays[:BATCH]))
    assert looking.engine.seen == [1, BATCH, 1, BATCH]
    assert looking.engine.inside == [None] * 4


def test_a_stream_reads_no_further_than_a_few_batches_ahead(looking, arrays):
    taken = itertools.count()

    def source():
        for _ in range(40 * BATCH):
            next(taken)
            yield arrays[0]

    before = threading.active_count()
    stream = looking.stream(source())
    next(stream)
    assert next(taken) <= 6 * BATCH
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_never_good(looking, arrays, value):
    looking.engine.values = value
    found = looking.predict(arrays[0])
    assert (found.verdict, found.score, found.maps) == ("error", None, None)
    assert "finite" in found.error


def test_pictures_and_tensors_are_judged_as_their_arrays(padim, paths, arrays):
    inspector, expected = padim.inspector(), padim.predict(arrays[0])
    picture, tensor = Image.open(paths[0]), torch.from_numpy(arrays[0].copy())
    for given in (picture, tensor, str(paths[0])):
        scores = [inspector.predict(given).score, padim.predict([given])[0].score]
        scores.append(next(inspector.stream([given])).score)
        assert scores == [expected.score] * 3
    together = [one.score for one in inspector.predict_batch([picture, tensor])]
    assert together == pytest.approx([expected.score] * 2)


@pytest.mark.parametrize(
    "given", [None, 3, b"\x89PNG", [None], [[1, 2], [3]], torch.zeros(3, 8, 8), np.zeros((2, 8, 8, 3), np.uint8)]
)
def test_what_is_no_image_is_refused_in_one_line(padim, given):
    for call in (padim.predict, padim.inspector().predict):
        with pytest.raises(FlawmapError, match=r"^got .*(expected|give)") as error:
            call(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [None, "folder", np.zeros((8, 8), np.uint8)])
def test_what_cannot_be_streamed_is_refused_in_one_line(padim, given):
    with pytest.raises(FlawmapError, match=r"^got .* to stream; give a list of images"):
        next(padim.stream(given))
    assert [one.verdict for one in padim.stream([None])] == ["error"]


@pytest.mark.parametrize("given", [None, 3, [None], [np.zeros((8, 8), np.uint8)]])
def test_what_cannot_be_learnt_from_is_refused_in_one_line(given):
    with pytest.raises(FlawmapError, match=r"^got .* as training images .*; give the path of a folder"):
        Detector("padim").fit(given)
