"""Watched folders: every file once, whatever happens, and none before it is whole."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from flawmap import FlawmapError
from flawmap.line import Inspector
from flawmap.service.database import open_database
from flawmap.service.hosting import Host
from flawmap.service.pictures import Pictures
from flawmap.service.recording import Recorder
from flawmap.service.records import Filter, Records, Seen
from flawmap.service.sources.folders import WatchedFolder
from flawmap.service.sources.moving import move_beside
from flawmap.service.tables import InspectionRow
from flawmap.service.watching import Watch
from watching_processes import Cut, Process, wait_for

ENGINE = ("--engine", "onnxruntime")
ONCE = ("--once", *ENGINE)


@pytest.fixture
def records(tmp_path):
    return Records(open_database(f"sqlite:///{tmp_path / 'records.db'}"))


@pytest.fixture
def folder(drawn, tmp_path):
    """Three good images, a defective one in a sub-folder, all of them old."""
    made = tmp_path / "incoming"
    (made / "sub").mkdir(parents=True)
    for number in range(3):
        put(drawn / "test" / "good" / f"{number:03}.png", made / f"{number}.png")
    put(drawn / "test" / "good" / "003.png", made / "sub" / "a.png")
    return made


def put(source, target):
    shutil.copy(source, target)
    os.utime(target, (0, time.time() - 100))


def rows_of(url, **which):
    engine = open_database(url)
    try:
        return list(Records(engine).each(Filter(**which)))
    finally:
        engine.dispose()


def sqlite(store):
    return f"sqlite:///{store / 'records.db'}"


def png(pixels):
    out = BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


# Judging what is there


def test_once_judges_what_is_there_as_inspect_does_and_nothing_twice(flawmap, line_model, folder, tmp_path):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    store = tmp_path / "store"
    options = (*ONCE, "--store", store, "--patience", 0.3, "--format", "jsonl")
    code, out, err = flawmap("watch", line_model, folder, *options)
    assert code == 3, err
    lines = [json.loads(line) for line in out.splitlines()]
    _, told, _ = flawmap("inspect", line_model, folder, "--format", "jsonl", *ENGINE)
    expected = {line["path"]: line for line in map(json.loads, told.splitlines())}
    assert {line["path"] for line in lines} == set(expected)
    for line in lines:
        other = expected[line["path"]]
        assert line.keys() == other.keys()
        for key in ("schema", "model", "verdict", "p_value", "threshold"):
            assert line[key] == other[key], key
        if line["verdict"] == "error":
            continue
        assert line["score"] == pytest.approx(other["score"], rel=1e-5)
        assert [region["box"] for region in line["regions"]] == [region["box"] for region in other["regions"]]
        assert line["digest"] == hashlib.sha256(Path(line["path"]).read_bytes()).hexdigest()
    assert "broken.png: cannot be decoded" in err
    assert "1 not judged" in err
    rows = rows_of(sqlite(store))
    assert sorted(row.name for row in rows) == ["0.png", "1.png", "2.png", "broken.png", "sub/a.png"]
    assert {row.source for row in rows} == {"watch:incoming"}
    assert {row.model for row in rows} == {"screws"}
    for row in rows:  # of those that are not good the bytes are kept
        assert (row.picture is not None) == (row.verdict != "good")
        if row.picture is not None:
            kept = store / "pictures" / row.picture[:2] / row.picture
            assert kept.read_bytes() == (folder / row.name).read_bytes()
    assert flawmap("watch", line_model, folder, *options)[:2] == (0, "")
    put(folder / "1.png", folder / "0.png")  # another one under the same name
    code, out, _ = flawmap("watch", line_model, folder, *options)
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(folder / "0.png")]


def test_another_model_judges_the_same_files_again(flawmap, line_model, folder, tmp_path):
    other = tmp_path / "other.onnx"
    shutil.copy(line_model, other)
    for model in (line_model, other):
        assert flawmap("watch", model, folder, *ONCE, "--store", tmp_path / "store")[0] == 0
    counts = Counter((row.model, row.name) for row in rows_of(sqlite(tmp_path / "store")))
    assert len(counts) == 8
    assert set(counts.values()) == {1}


def test_hidden_and_own_files_and_the_folders_of_results_are_no_parts(flawmap, line_model, folder, tmp_path):
    put(folder / "0.png", folder / ".hidden.png")
    (folder / "@eaDir").mkdir()
    put(folder / "0.png", folder / "@eaDir" / "thumb.png")
    assert flawmap("inspect", line_model, folder / "0.png", "-o", folder / "heat")[0] == 0
    options = (*ONCE, "--keep", "all", "--store", folder / "records", "--move", folder / "done")
    assert flawmap("watch", line_model, folder, *options)[0] == 0
    assert flawmap("watch", line_model, folder, *options)[0] == 0
    names = sorted(row.name for row in rows_of(sqlite(folder / "records")))
    assert names == ["0.png", "1.png", "2.png", "sub/a.png"]


def hosted(line_model, records, name="m"):
    return Host(name, line_model, records, lambda path: Inspector.load(path, engine="onnxruntime"))


def test_a_threshold_is_a_version_in_the_records_and_stays(line_model, records):
    host = hosted(line_model, records, "screws")
    trained = host.serving.inspector.judge.threshold.value
    assert host.serving.version == 0
    for _ in range(2):
        given = host.keep_threshold(rate=None, value=1.0, by="watch")
        assert (given.version, given.inspector.judge.threshold.value) == (1, 1.0)
    other = hosted(line_model, records, "screws")
    assert (other.serving.version, other.serving.inspector.judge.threshold.value) == (1, 1.0)
    assert other.keep_threshold(rate=0.5, value=None, by="watch").version == 2
    assert host.refresh()
    assert host.serving.inspector.judge.max_false_reject == 0.5
    records.set_threshold("screws", "of another file", 3.0, None, "someone")
    host.refresh()
    assert (host.serving.version, host.serving.inspector.judge.threshold.value) == (4, trained)


def test_a_threshold_that_is_set_meanwhile_holds_from_then_on(folder, records, line_model, tmp_path):
    host = hosted(line_model, records)
    recorder = Recorder(records, Pictures(tmp_path / "pictures", records, 10**9))
    watch = Watch(host, recorder, [WatchedFolder(folder, "m", records)])
    thread = threading.Thread(target=watch.run)
    thread.start()
    wait_for(lambda: sum(watch.counts.values()) == 4)
    records.set_threshold("m", host.serving.inspector.digest or "", -1e9, None, "someone")
    wait_for(lambda: host.serving.version == 1)
    shutil.copy(folder / "0.png", folder / "late.png")
    wait_for(lambda: sum(watch.counts.values()) == 5)
    watch.end()
    thread.join()
    newest = records.latest(Filter(), 1)[0]
    assert (newest.name, newest.verdict, newest.threshold_version) == ("late.png", "defect", 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{model}"], "SOURCE"),
        ([], "MODEL"),
        (["{model}", "{tmp}/nowhere"], "nowhere does not exist"),
        (["{model}", "{tmp}", "--move", "{tmp}"], "--move"),
        (["{model}", "{tmp}", "--threshold", "1", "--max-false-reject", "0.1"], "not both"),
        (["{model}", "{tmp}", "--webhook", "ftp://host/"], "--webhook"),
        (["{model}", "{tmp}", "--webhook", "http://127.0.0.1/"], "FLAWMAP_WEBHOOK_SECRET"),
        (["{model}", "{tmp}", "--mqtt", "http://host"], "--mqtt"),
        (["{model}", "{tmp}", "--opcua", "http://host"], "--opcua"),
        (["{model}", "{tmp}", "--database", "mysql://host/x"], "--database"),
        (["{model}", "{tmp}/film.avi"], "film.avi"),
    ],
)
def test_what_cannot_be_watched_is_one_line(flawmap, line_model, tmp_path, monkeypatch, arguments, named):
    monkeypatch.delenv("FLAWMAP_WEBHOOK_SECRET", raising=False)
    given = [argument.format(model=line_model, tmp=tmp_path) for argument in arguments]
    code, out, err = flawmap("watch", *given, *ONCE, "--store", tmp_path.parent / f"{tmp_path.name}-store")
    assert code == 2
    assert out == "" or out.startswith("image")
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err


# Whole files only


def looked(source):
    """What the next look gives."""
    source._next_look = 0.0
    found = []
    while (shot := source.take()) is not None:
        found.append(shot)
        source.judged(shot, "good")
    return [shot.name for shot in found]


def test_an_old_file_is_taken_at_once_and_a_new_one_at_the_second_look(folder, records):
    source = WatchedFolder(folder, "m", records)
    assert looked(source) == ["0.png", "1.png", "2.png", "sub/a.png"]
    shutil.copy(folder / "0.png", folder / "new.png")
    future = folder / "of another clock.png"
    put(folder / "0.png", future)
    os.utime(future, (0, time.time() + 1000))
    moved = folder.parent / "old.png"
    put(folder / "0.png", moved)
    moved.rename(folder / "renamed in.png")
    assert looked(source) == ["renamed in.png"]
    os.utime(folder / "new.png")  # it has changed
    assert looked(source) == ["of another clock.png"]
    assert looked(source) == ["new.png"]
    assert looked(source) == []


def test_a_file_that_grows_is_judged_when_it_is_whole(line_model, folder, tmp_path):
    """At each moment it can be decoded, so that only its size and time tell."""
    whole = (folder / "0.png").read_bytes()
    target = folder / "growing.png"
    with Process(line_model, folder, "--store", tmp_path / "store") as watch:
        watch.until(lambda it: len(it.out) == 5)
        with target.open("wb") as file:
            file.write(whole)
            for _ in range(15):
                file.write(b"more")
                file.flush()
                time.sleep(0.1)
        watch.until(lambda it: len(it.out) == 6)
        time.sleep(1.2)
        assert len(watch.out) == 6
        assert watch.end(signal.SIGTERM) == 0
    (row,) = [row for row in rows_of(sqlite(tmp_path / "store")) if row.name == "growing.png"]
    assert row.image_digest == hashlib.sha256(target.read_bytes()).hexdigest()


def test_a_file_that_cannot_be_decoded_is_waited_for(folder, records):
    source = WatchedFolder(folder, "m", records, patience=0.5)
    looked(source)
    late, whole = folder / "late.png", (folder / "0.png").read_bytes()
    late.write_bytes(whole[:200])
    os.utime(late, (0, 1000))
    bad = folder / "bad.png"
    bad.write_bytes(b"")
    os.utime(bad, (0, 1000))
    assert looked(source) == []
    with late.open("ab") as file:
        file.write(whole[200:])
    os.utime(late, (0, 2000))
    assert looked(source) == ["late.png"]
    time.sleep(0.5)
    source._next_look = 0.0
    shot = source.take()
    assert shot.name == "bad.png"
    assert shot.pixels is None
    assert "is empty" in shot.error


def test_names_that_no_database_takes_are_kept_in_another_form(postgresql_url, tmp_path, good_image):
    records = Records(open_database(postgresql_url))
    folder = tmp_path / "in"
    deep = folder.joinpath(*["d" * 200] * 3)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(png(good_image))
    odd = os.fsencode(folder) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(png(good_image))
    source = WatchedFolder(folder, "m", records)
    looked(source)
    shots = []
    source._next_look = 0.0
    while (shot := source.take()) is not None:
        shots.append(shot)
        records.add([a_row(shot.name)], seen=[shot.seen])
    assert len(shots) == 2
    again = WatchedFolder(folder, "m", records)
    assert looked(again) + looked(again) == []


def a_row(name, verdict="good"):
    texts = dict.fromkeys(("model_digest", "source", "owner", "image_digest"), "")
    numbers = dict.fromkeys(("at", "threshold_version", "milliseconds", "stored"), 0)
    return {**texts, **numbers, "model": "m", "name": name[:300], "verdict": verdict, "regions": []}


# Moving


def test_files_are_moved_below_their_verdict_and_none_is_replaced(flawmap, line_model, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    done = tmp_path / "done"
    (done / "good").mkdir(parents=True)
    (done / "good" / "0.png").write_bytes(b"another one")
    content = {path.name: path.read_bytes() for path in folder.rglob("*.png")}
    options = (*ONCE, "--store", tmp_path / "store", "--move", done, "--patience", 0.2)
    # Such that all of them are good: the verdicts are not what is tested.
    assert flawmap("watch", line_model, folder, *options, "--threshold", 1e6)[0] == 3
    moved = {path.relative_to(done).as_posix(): path.read_bytes() for path in done.rglob("*") if path.is_file()}
    assert moved == {
        "good/0.png": b"another one",
        "good/0-1.png": content["0.png"],
        "good/1.png": content["1.png"],
        "good/2.png": content["2.png"],
        "good/sub/a.png": content["a.png"],
        "error/broken.png": content["broken.png"],
    }
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_what_was_judged_and_not_moved_is_moved_by_the_next_run(flawmap, line_model, folder, tmp_path):
    """A run without --move leaves what one leaves that is killed between the commit and the move."""
    options = (*ONCE, "--store", tmp_path / "store", "--threshold", 1e6)
    assert flawmap("watch", line_model, folder, *options)[0] == 0
    code, out, _ = flawmap("watch", line_model, folder, *options, "--move", tmp_path / "done")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert len(list((tmp_path / "done" / "good").rglob("*.png"))) == 4
    assert list(folder.rglob("*.png")) == []
    assert len(rows_of(sqlite(tmp_path / "store"))) == 4


def other_file_system(tmp_path):
    other = Path("/dev/shm")
    if not (other.is_dir() and os.access(other, os.W_OK) and other.stat().st_dev != tmp_path.stat().st_dev):
        pytest.skip("there is no second file system")
    return other / f"flawmap-{os.getpid()}"


@pytest.mark.parametrize("kind", ["one file system", "two", "without hard links"])
def test_a_move_replaces_nothing_and_a_broken_off_one_is_finished(tmp_path, monkeypatch, kind):
    target = tmp_path if kind != "two" else other_file_system(tmp_path)
    if kind == "without hard links":

        def refuse(*paths):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    try:
        for content, place in ((b"a", "x.png"), (b"b", "x-1.png"), (b"c", "x-2.png"), (b"b", "x-1.png")):
            new = tmp_path / "new.png"
            new.write_bytes(content)
            os.utime(new, (0, 1000))
            assert move_beside(new, target / "good" / "x.png") == target / "good" / place
            assert not new.exists()
            assert (target / "good" / place).stat().st_mtime == 1000
        found = {path.name: path.read_bytes() for path in (target / "good").iterdir()}
        assert found == {"x.png": b"a", "x-1.png": b"b", "x-2.png": b"c"}
    finally:
        shutil.rmtree(target / "good", ignore_errors=True)
        if kind == "two":
            target.rmdir()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_of_a_link_what_it_leads_to_is_copied(tmp_path):
    (tmp_path / "real.png").write_bytes(b"a")
    (tmp_path / "in").mkdir()
    link = tmp_path / "in" / "link.png"
    link.symlink_to("../real.png")
    there = move_beside(link, tmp_path / "done" / "deep" / "link.png")
    assert not there.is_symlink()
    assert there.read_bytes() == b"a"
    assert not link.is_symlink()
    assert (tmp_path / "real.png").exists()


def test_a_file_that_was_replaced_after_its_verdict_is_not_moved(folder, records, tmp_path):
    source = WatchedFolder(folder, "m", records, move=tmp_path / "done")
    shot = source.take()
    put(folder / "2.png", shot.shown)
    os.utime(shot.shown, (0, 2000))
    source.judged(shot, "good")
    assert shot.shown.exists()
    assert not (tmp_path / "done").exists()


def test_what_cannot_be_moved_is_tried_again(folder, records, tmp_path, caplog):
    done = tmp_path / "done"
    done.write_bytes(b"no folder")
    source = WatchedFolder(folder, "m", records, move=done)
    assert len(looked(source)) == 4
    assert source.unmoved == 4
    assert len(caplog.messages) == 1
    assert "cannot be moved" in caplog.messages[0]
    done.unlink()
    assert looked(source) == []
    assert source.unmoved == 0
    assert len(list(done.rglob("*.png"))) == 4


# Faults


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_killed_in_mid_run_each_file_is_judged_and_moved_exactly_once(request, line_model, drawn, tmp_path, kind):
    url = request.getfixturevalue("postgresql_url") if kind == "postgresql" else sqlite(tmp_path / "store")
    folder, done = tmp_path / "incoming", tmp_path / "done"
    folder.mkdir()
    pixels = np.array(Image.open(drawn / "test" / "good" / "000.png").convert("RGB"))
    for number in range(60):
        pixels[0, 0] = number
        (folder / f"{number:03}.png").write_bytes(png(pixels))
    options = (line_model, folder, "--store", tmp_path / "store", "--database", url, "--move", done)
    printed = []
    for kill_at in (5, 20):
        with Process(*options) as watch:
            watch.until(lambda it, kill_at=kill_at: len(it.out) > kill_at)
            watch.process.kill()
        printed += watch.out[1:]
    with Process(*options, "--once") as watch:
        assert watch.process.wait(60) == 0
    printed += watch.out[1:]
    names = [row.name for row in rows_of(url) if row.source == "watch:incoming" and row.model == "screws"]
    assert sorted(names) == [f"{number:03}.png" for number in range(60)]
    assert len([path for path in done.rglob("*") if path.is_file()]) == 60
    assert len(list(folder.iterdir())) == 0
    assert 58 <= len(printed) <= 60  # a line may be lost with the process, a record may not
    assert len(printed) == len(set(printed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_image_in_hand(line_model, drawn, tmp_path, number):
    folder = tmp_path / "incoming"
    folder.mkdir()
    for copy in range(200):
        put(drawn / "test" / "good" / "000.png", folder / f"{copy:03}.png")
    with Process(line_model, folder, "--store", tmp_path / "store") as watch:
        watch.until(lambda it: len(it.out) > 3)
        assert watch.end(number) == 0
    assert "Traceback" not in "\n".join(watch.err)
    judged = len(watch.out) - 1
    assert judged < 200
    assert len(rows_of(sqlite(tmp_path / "store"))) == judged
    assert f"{judged} not judged" in watch.err[-1] or "good" in watch.err[-1]


def test_a_database_that_is_gone_is_waited_for_and_nothing_is_lost(postgresql_url, line_model, folder, tmp_path):
    head, _, tail = postgresql_url.rpartition(":")
    port, _, name = tail.partition("/")
    cut = Cut(int(port))
    other = tmp_path / "gone.onnx"
    shutil.copy(line_model, other)
    try:
        with Process(other, folder, "--store", tmp_path, "--database", f"{head}:{cut.address}/{name}") as watch:
            watch.until(lambda it: len(it.out) == 5)
            cut.cut()
            put(folder / "0.png", folder / "late.png")
            watch.until(lambda it: any("waits for it" in line for line in it.err))
            put(folder / "0.png", folder / "later.png")
            cut.whole = True
            watch.until(lambda it: len(it.out) == 7)
            assert watch.end(signal.SIGTERM) == 0
    finally:
        cut.close()
    assert sum("waits for it" in line for line in watch.err) == 1
    assert "Traceback" not in "\n".join(watch.err)
    assert Counter(row.name for row in rows_of(postgresql_url, model="gone")) == Counter(
        ["0.png", "1.png", "2.png", "sub/a.png", "late.png", "later.png"]
    )


def test_a_commit_whose_answer_is_lost_is_not_done_twice(flawmap, line_model, folder, tmp_path, monkeypatch):
    from flawmap.service import watching
    from flawmap.service.database import DatabaseGoneError
    from flawmap.service.recording import Recorder

    record, lost = Recorder.record, []

    def lose(self, *arguments, **more):
        rows = record(self, *arguments, **more)
        if not lost:
            lost.append(rows)
            raise DatabaseGoneError("the answer is lost")
        return rows

    monkeypatch.setattr(Recorder, "record", lose)
    monkeypatch.setattr(watching, "until_it_can", persistent(watching.until_it_can))
    code, out, _ = flawmap("watch", line_model, folder, *ONCE, "--store", tmp_path / "store")
    assert code == 0
    assert len(out.splitlines()) == 5
    assert len(lost) == 1
    assert len(rows_of(sqlite(tmp_path / "store"))) == 4


def persistent(until_it_can):
    """Also with --once it does not give up."""
    return lambda do, ended, *, once, **more: until_it_can(do, ended, once=False, **more)


def test_a_folder_that_is_gone_is_waited_for(folder, records, caplog):
    source = WatchedFolder(folder, "m", records)
    assert len(looked(source)) == 4
    away = folder.rename(folder.with_name("away"))
    for _ in range(3):
        assert looked(source) == []
    assert [message for message in caplog.messages if "gone" in message] == caplog.messages
    assert len(caplog.messages) == 1
    put(away / "0.png", away / "new.png")
    away.rename(folder)
    assert looked(source) == ["new.png"]
    assert "is there again" in caplog.messages[-1]
    with pytest.raises(FlawmapError, match="does not exist"):
        WatchedFolder(folder / "no", "m", records)


def test_a_file_that_another_process_has_judged_is_passed_over(folder, records, line_model, tmp_path):
    source = WatchedFolder(folder, "m", records, once=True)
    taken = source.take

    def take():
        shot = taken()
        if shot is not None and shot.name == "1.png":
            records.add([a_row("1.png", "defect")], seen=[shot.seen])
        return shot

    source.take = take
    written = []
    recorder = Recorder(records, Pictures(tmp_path / "pictures", records, 10**9))
    watch = Watch(hosted(line_model, records), recorder, [source], write=written.append, once=True)
    watch.run()
    assert [one.path.name for one in written] == ["0.png", "2.png", "a.png"]
    with Session(records.engine) as session:
        assert len(list(session.scalars(select(InspectionRow)))) == 4


def test_an_image_that_no_engine_can_take_is_an_error_and_not_the_end(folder, records, line_model, tmp_path):
    host = hosted(line_model, records)

    def fail(*arguments):
        raise RuntimeError("bad_alloc")

    host.serving.inspector.engine = fail
    recorder = Recorder(records, Pictures(tmp_path / "pictures", records, 10**9))
    watch = Watch(host, recorder, [WatchedFolder(folder, "m", records, once=True)], once=True)
    watch.run()
    assert watch.counts == {"good": 0, "defect": 0, "unsure": 0, "error": 4}
    assert all("bad_alloc" in row.error for row in records.each(Filter()))


def test_deliveries_are_committed_with_the_inspection_or_not_at_all(records):
    seen = Seen("s", "n", 1, 1)
    records.add([a_row("a")], seen=[seen], deliveries=["http://a/", "http://b/"])
    from flawmap.service.records import RepeatedError
    from flawmap.service.tables import DeliveryRow

    with pytest.raises(RepeatedError):
        records.add([a_row("a")], seen=[seen], deliveries=["http://a/"])
    with Session(records.engine) as session:
        assert [(row.url, row.state, row.tries) for row in session.scalars(select(DeliveryRow))] == [
            ("http://a/", "waiting", 0),
            ("http://b/", "waiting", 0),
        ]
    wait_for(lambda: records.verdict_of(seen) == "good")
    assert records.verdict_of(Seen("s", "n", 2, 1)) is None
