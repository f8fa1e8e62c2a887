"""The service over HTTP: verdicts, records, keys, and what happens when something is full, gone, wrong or killed."""

import csv
import hashlib
import io
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import text

from flawmap import FlawmapError, Inspector
from flawmap.service import pictures as pictures_module
from flawmap.service.api import create_app
from flawmap.service.database import DatabaseGoneError, open_database
from flawmap.service.keys import Keys, add_key
from flawmap.service.records import Asked, Filter, Records, RepeatedError
from flawmap.service.service import Options, open_service
from flawmap.service.tables import Base
from watching_processes import Cut, wait_for

INSPECT = "/v1/models/screws/inspections"


def png(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


@pytest.fixture
def model(exported, tmp_path) -> Path:
    path = tmp_path / "models" / "screws.onnx"
    path.parent.mkdir()
    shutil.copyfile(exported, path)
    return path


@pytest.fixture
def opened(model, tmp_path):
    """A function that opens the service and gives a client of it."""
    clients = []

    def open_it(**options):
        service = open_service([model], Options(tmp_path / "store", threads=1, **options))
        client = TestClient(create_app(service), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return service, client

    yield open_it
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(opened):
    return opened()[1]


@pytest.fixture(scope="module")
def good(good_image) -> bytes:
    return png(good_image)


@pytest.fixture(scope="module")
def broken(broken_image) -> bytes:
    return png(broken_image)


# Verdicts


def test_it_answers_what_the_inspector_says(client, exported, good, broken, good_image, broken_image):
    inspector = Inspector.load(exported, threads=1)
    for content, pixels, verdict in ((good, good_image, "good"), (broken, broken_image, "defect")):
        answer = client.post(INSPECT, content=content, headers={"X-Image-Name": "part 7"})
        assert answer.status_code == 200, answer.text
        (found,) = answer.json()["inspections"]
        expected = inspector.predict(pixels)
        assert found["verdict"] == verdict == expected.verdict
        assert found["score"] == pytest.approx(expected.score, rel=1e-5)
        assert found["p_value"] == expected.p_value
        assert found["threshold"] == expected.threshold
        assert [region["box"] for region in found["regions"]] == [list(region.box) for region in expected.regions]
        assert found["image_digest"] == hashlib.sha256(content).hexdigest()
        assert found["model_digest"] == inspector.digest
        assert (found["width"], found["height"], found["name"]) == (*pixels.shape[1::-1], "part 7")
        assert client.get(f"/v1/inspections/{found['id']}").json() == found


def test_the_images_of_a_form_are_answered_in_their_order(client, good, broken):
    names = ["a.png", "../../etc/passwd", "\x1b[2Jc.png"]
    files = [("image", (name, content)) for name, content in zip(names, (broken, good, broken), strict=True)]
    found = client.post(INSPECT, files=files).json()["inspections"]
    assert [one["verdict"] for one in found] == ["defect", "good", "defect"]
    assert [one["name"] for one in found[:2]] == names[:2]
    assert "\x1b" not in found[2]["name"]
    assert [one["id"] for one in found] == [1, 2, 3]


def test_pictures_are_of_what_was_judged(client, broken, broken_image, good):
    found = client.post(INSPECT, content=broken).json()["inspections"][0]
    picture, overlay, values = (
        Image.open(io.BytesIO(client.get(found["links"][kind]).content)) for kind in ("picture", "overlay", "map")
    )
    assert picture.format == "JPEG"
    assert np.abs(np.asarray(picture).astype(int) - broken_image).mean() < 5
    assert overlay.format == "PNG"
    assert overlay.size == picture.size == values.size
    heat = np.asarray(values)
    assert heat[40:70, 60:95].mean() > 1.5 * heat[:20].mean()
    assert values.mode.startswith("I")
    # The outline of the region goes round the square.
    drawn = (np.asarray(overlay) == (0, 220, 255)).all(-1)
    left, top, right, bottom = found["regions"][0]["box"]
    assert drawn[top - 1, left:right].any()
    assert not drawn[bottom + 5 :].any()
    kept_none = client.post(INSPECT, content=good).json()["inspections"][0]
    assert kept_none["links"] == {"picture": None, "overlay": None, "map": None}
    assert client.get(f"/v1/inspections/{kept_none['id']}/picture").status_code == 404


def test_a_capture_that_cannot_be_judged_is_an_error_and_is_kept(client):
    black = png(np.zeros((128, 128, 3), np.uint8))
    (found,) = client.post(INSPECT, content=black, headers={"X-Image-Name": "dark.png"}).json()["inspections"]
    assert found["verdict"] == "error"
    assert found["score"] is None
    assert found["error"].startswith("dark.png: ")
    assert found["links"]["picture"] is not None


def many_pixels() -> bytes:
    """A PNG whose header tells of 400 megapixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "kind", "status", "told"),
    [
        (b"", "image/png", 422, "no image"),
        (b"not an image", "image/png", 422, "is not a JPEG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "image/png", 422, "cannot be decoded"),
        (b"--x\r\n", "multipart/form-data; boundary=x", 422, "no files"),
        (b"nothing", "multipart/form-data", 400, "cannot be read"),
        (b"x" * 300_001, "image/png", 413, "over the limit of 300000"),
        ("pixels", "image/png", 413, "400000000 pixels"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line_and_keeps_nothing(opened, content, kind, status, told):
    service, client = opened(max_bytes=300_000)
    content = many_pixels() if content == "pixels" else content
    answer = client.post(INSPECT, content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    assert service.records.counts(Filter()) == {}


def test_a_body_without_a_length_is_cut_off_at_the_limit(opened):
    _, client = opened(max_bytes=10_000)
    sent = []

    def blocks():
        for _ in range(100):
            sent.append(1)
            yield b"x" * 1000

    answer = client.post(INSPECT, content=blocks(), headers={"content-type": "image/png"})
    assert answer.status_code == 413


def test_one_bad_image_of_a_form_refuses_all_and_is_named(opened, good):
    service, client = opened()
    answer = client.post(INSPECT, files=[("image", ("a.png", good)), ("image", ("b.png", b"nothing"))])
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("b.png: ")
    assert service.records.counts(Filter()) == {}


# Requests that are made again


def test_an_idempotency_key_keeps_one_record_and_gives_one_answer(opened, good, broken):
    service, client = opened()
    first = client.post(INSPECT, content=broken, headers={"Idempotency-Key": "part-1"})
    again = client.post(INSPECT, content=broken, headers={"Idempotency-Key": "part-1"})
    assert first.json() == again.json()
    other = client.post(INSPECT, content=good, headers={"Idempotency-Key": "part-1"})
    assert other.status_code == 409
    assert service.records.counts(Filter()) == {"defect": 1}


def test_the_same_key_at_the_same_time_keeps_one_record(opened, broken):
    service, client = opened()
    with ThreadPoolExecutor(8) as pool:
        headers = {"Idempotency-Key": "once"}
        answers = list(pool.map(lambda _: client.post(INSPECT, content=broken, headers=headers), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert sum(service.records.counts(Filter()).values()) == 1


# Lists, words, thresholds


def test_lists_go_on_by_cursor_and_filter(client, good, broken):
    for content in (good, broken, good, broken, good):
        client.post(INSPECT, content=content)
    seen, cursor = [], None
    while True:
        page = client.get("/v1/inspections", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [one["id"] for one in page["inspections"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == [5, 4, 3, 2, 1]
    assert [one["id"] for one in client.get("/v1/inspections?verdict=defect").json()["inspections"]] == [4, 2]
    at = client.get("/v1/inspections/3").json()["at"]
    assert [one["id"] for one in client.get("/v1/inspections", params={"since": at}).json()["inspections"]] == [5, 4, 3]
    assert [one["id"] for one in client.get("/v1/inspections", params={"until": at}).json()["inspections"]] == [2, 1]


def test_a_word_is_kept_with_those_before_and_exported(client, good):
    client.post(INSPECT, content=good, headers={"X-Image-Name": "=cmd()"})
    for word in ("defect", "unsure"):
        assert client.put("/v1/inspections/1/word", json={"word": word}).json()["word"] == word
    assert [said["word"] for said in client.get("/v1/inspections/1/words").json()] == ["defect", "unsure"]
    (row,) = csv.DictReader(io.StringIO(client.get("/v1/export.csv").text))
    assert (row["word"], row["verdict"]) == ("unsure", "good")
    assert not row["name"].startswith("=")
    (line,) = client.get("/v1/export.jsonl").text.splitlines()
    assert json.loads(line)["word"] == "unsure"
    assert client.get("/v1/export.jsonl?word=good").text == ""
    assert client.put("/v1/inspections/2/word", json={"word": "good"}).status_code == 404
    assert client.put("/v1/inspections/1/word", json={"word": "bad"}).status_code == 422


def test_a_threshold_is_a_version_that_records_name_and_that_lasts(opened, model, tmp_path, good):
    _, client = opened()
    before = client.get("/v1/models/screws/threshold").json()
    assert before["version"] == 0
    score = client.post(INSPECT, content=good).json()["inspections"][0]["score"]
    moved = client.put("/v1/models/screws/threshold", json={"value": score * 0.9}).json()
    assert (moved["version"], moved["rate"]) == (1, None)
    (found,) = client.post(INSPECT, content=good).json()["inspections"]
    assert (found["verdict"], found["threshold_version"]) == ("defect", 1)
    assert client.put("/v1/models/screws/threshold", json={"rate": 0.2}).json()["version"] == 2
    # Another process finds it.
    service = open_service([model], Options(tmp_path / "store", threads=1))
    assert service.host("screws").serving.version == 2
    assert service.host("screws").serving.rate == 0.2
    service.close()
    for wrong in ({}, {"rate": 0.1, "value": 1.0}, {"rate": 0}, {"rate": 1.0}, {"value": "high"}, {"value": 1e39}):
        assert client.put("/v1/models/screws/threshold", json=wrong).status_code == 422, wrong
    assert [one["version"] for one in client.get("/v1/models/screws/thresholds").json()["thresholds"]] == [1, 2]


# A model file that is replaced


def test_a_replaced_model_is_taken_without_losing_a_request(opened, model, padim, drawn, tmp_path, broken):
    from flawmap.export import export

    service, client = opened()
    old = service.host("screws").serving.inspector.digest
    client.put("/v1/models/screws/threshold", json={"value": 1.0})
    new = tmp_path / "new.onnx"
    export(padim, new, check=drawn / "test" / "good")
    statuses, ended = [], threading.Event()

    def keep_asking():
        while not ended.is_set():
            statuses.append(client.post(INSPECT, content=broken).status_code)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    model.write_bytes(new.read_bytes()[:1000])  # half of it: the old one goes on
    service.host("screws").refresh()
    assert "not in use" in service.host("screws").trouble
    assert service.host("screws").serving.inspector.digest == old
    assert client.get("/readyz").json()["trouble"]
    new.replace(model)
    deadline = time.monotonic() + 20
    while service.host("screws").serving.inspector.digest == old and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.set()
    thread.join()
    assert set(statuses) == {200}
    serving = service.host("screws").serving
    assert serving.inspector.digest == padim.inspector().digest or serving.inspector.digest != old
    assert service.host("screws").trouble is None
    # A value is of the old model's units, and is not kept.
    assert serving.inspector.judge.threshold.value != 1.0


# Too much at once


def slow(service, seconds):
    """Has the model take as long as that for each batch."""
    host = service.host("screws")
    inspector = host.serving.inspector

    class Slow:
        def __getattr__(self, name):
            return getattr(inspector, name)

        def predict(self, images):
            time.sleep(seconds)
            return inspector.predict(images)

    host.serving = type(host.serving)(Slow(), host.serving.version, host.serving.rate)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(opened, good):
    service, client = opened(queue=2)
    slow(service, 1.0)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post(INSPECT, content=good), range(6)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(200) >= 2
    assert statuses.count(429) >= 2
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0
    assert service.records.counts(Filter()) == {"good": statuses.count(200)}
    assert service.batcher.waiting == 0


def test_requests_are_judged_together(opened, good):
    service, client = opened()
    slow(service, 0.3)
    sizes = []
    inspector = service.host("screws").serving.inspector
    predict = inspector.predict
    inspector.predict = lambda images: sizes.append(len(images)) or predict(images)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.post(INSPECT, content=good), range(9)))
    assert sum(sizes) == 9
    assert max(sizes) > 4
    assert max(sizes) <= 8


# Disks and databases


def test_a_full_disk_refuses_or_judges_without_pictures(opened, broken, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pictures_module, "replacing", full)
    service, client = opened()
    answer = client.post(INSPECT, content=broken)
    assert answer.status_code == 507
    assert "disk" in answer.json()["detail"]
    assert service.records.counts(Filter()) == {}
    _, other = opened(judge_when_full=True)
    (found,) = other.post(INSPECT, content=broken).json()["inspections"]
    assert found["verdict"] == "defect"
    assert found["links"]["picture"] is None


def test_a_database_that_is_gone_is_told_and_comes_back(opened, good, monkeypatch):
    service, client = opened()

    def gone(*_, **__):
        raise DatabaseGoneError("the database cannot be reached: check that it runs, and --database")

    with monkeypatch.context() as patched:
        patched.setattr(service.records, "add", gone)
        patched.setattr(service.records, "ping", gone)
        answer = client.post(INSPECT, content=good)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
    assert client.post(INSPECT, content=good).status_code == 200
    assert client.get("/readyz").json() == {"ready": True, "trouble": []}


def test_pictures_stay_within_their_budget_and_good_ones_go_first(opened, good_image, broken_image, tmp_path):
    service, client = opened(keep="all")
    client.post(INSPECT, content=png(broken_image))
    budget = service.pictures.budget = 6 * service.records.stored()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = (broken_image if number % 4 == 0 else good_image).copy()
        pixels[:8, :8] ^= rng.integers(0, 2, (8, 8, 3), np.uint8)
        assert client.post(INSPECT, content=png(pixels)).status_code == 200
    rows = list(service.records.each(Filter()))
    files = [path for path in (tmp_path / "store" / "pictures").rglob("*") if path.is_file()]
    assert sum(row.stored for row in rows) == sum(path.stat().st_size for path in files) <= budget
    kept = {row.picture for row in rows if row.picture} | {row.map for row in rows if row.map}
    assert kept == {path.name for path in files}
    assert all(row.picture for row in rows if row.verdict == "defect")
    good = [row.picture is not None for row in rows if row.verdict == "good"]
    assert good == sorted(good)  # the oldest went
    assert not good[0]
    service.pictures.budget = 0
    client.post(INSPECT, content=png(good_image))
    assert service.records.stored() == 0


def test_a_picture_that_two_inspections_share_stays_until_both_are_gone(opened, broken):
    service, client = opened()
    for _ in range(2):
        client.post(INSPECT, content=broken)
    assert service.records.drop_pictures([1]) == []
    assert client.get("/v1/inspections/2/picture").status_code == 200
    assert len(service.records.drop_pictures([2])) == 2


# Keys and other sites


def test_roles_may_what_they_may(opened, tmp_path, good):
    file = tmp_path / "keys"
    keys = {role: add_key(file, f"the-{role}", role) for role in ("inspect", "operate", "administer")}
    assert all(key not in file.read_text() for key in keys.values())
    _, client = opened(keys=Keys.read(file))

    def status(role, method, path, **content):
        headers = {"Authorization": f"Bearer {keys[role]}"} if role else {}
        return client.request(method, path, headers=headers, **content).status_code

    word, threshold = {"json": {"word": "good"}}, {"json": {"rate": 0.1}}
    assert status(None, "POST", INSPECT, content=good) == 401
    assert status("inspect", "POST", INSPECT, content=good) == 200
    assert status("inspect", "PUT", "/v1/inspections/1/word", **word) == 403
    assert status("operate", "PUT", "/v1/inspections/1/word", **word) == 200
    assert status("operate", "PUT", "/v1/models/screws/threshold", **threshold) == 403
    assert status("administer", "PUT", "/v1/models/screws/threshold", **threshold) == 200
    headers = {"Authorization": f"Bearer {keys['inspect']}"}
    assert client.get("/v1/inspections/1", headers=headers).json()["word_by"] == "the-operate"
    for path in ("/v1/inspections", "/v1/export.csv", "/v1/models", "/metrics", "/v1/inspections/1/picture"):
        assert status(None, "GET", path) == 401, path
    assert status(None, "GET", "/healthz") == 200
    for _ in range(9):
        assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    refused = client.get("/v1/models", headers=headers)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0


def test_key_files_are_checked(tmp_path):
    file = tmp_path / "keys"
    with pytest.raises(FlawmapError, match="does not exist"):
        Keys.read(file)
    for content, told in (("", "no keys"), ("a inspect abc\n", "line 1"), (f"a boss {'0' * 64}\n", "line 1")):
        file.write_text(content)
        with pytest.raises(FlawmapError, match=told):
            Keys.read(file)
    file.write_text("# who\n")
    with pytest.raises(FlawmapError, match="no keys"):
        add_key(file, "a", "inspect")
    file.unlink()
    key = add_key(file, "a", "operate")
    assert Keys.read(file).caller(key).name == "a"
    with pytest.raises(FlawmapError, match="named a"):
        add_key(file, "a", "inspect")


def test_pages_of_other_sites_are_refused_and_headers_are_there(model, tmp_path, good):
    service = open_service([model], Options(tmp_path / "store", threads=1))
    with TestClient(create_app(service, local=True), base_url="http://localhost:8000") as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/v1/models", headers={"Host": "127.0.0.1.evil.example"}).status_code == 403
        evil = client.post(INSPECT, content=good, headers={"Origin": "https://evil.example"})
        assert evil.status_code == 403
        assert client.post(INSPECT, content=good, headers={"Origin": "http://localhost:8000"}).status_code == 200
        answer = client.get("/v1/models")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert str(tmp_path) not in client.get("/v1/models").text + client.get("/v1/inspections").text
    assert service.records.counts(Filter()) == {"good": 1}


# The records, on both databases


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.db'}"
    return request.getfixturevalue("postgresql_url")


def row(**values):
    known = {
        "at": 1_700_000_000_000, "model": "m", "model_digest": "d", "threshold_version": 0, "source": "api",
        "name": "n", "owner": "", "image_digest": "i", "width": 1, "height": 1, "verdict": "good", "score": 0.1,
        "p_value": 0.5, "threshold": 2.0, "regions": [], "error": None, "milliseconds": 1.0, "statistics": [0.5],
        "picture": None, "map": None, "stored": 0,
    }  # fmt: skip
    return {**known, **values}


def test_the_migrations_make_the_tables(url):
    engine = open_database(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    open_database(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        with pytest.raises(FlawmapError, match="newer flawmap"):
            open_database(url)
    finally:
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))


def test_records_are_whole_or_not_there(url):
    records = Records(open_database(url))
    start = max((one.id for one in records.latest(Filter(), 1)), default=0)
    score = 0.1 + 1e-17
    added = records.add([row(score=score), row(verdict="defect")], Asked("me", "k", "x"))
    assert [one.id - start for one in added] == [1, 2]
    assert records.get(added[0].id).score == score
    with pytest.raises(RepeatedError):
        records.add([row(), row()], Asked("me", "k", "x"))
    assert [one.id - start for one in records.each(Filter(after=start), block=1)] == [1, 2]
    digest, rows = records.answered("me", "k")
    assert (digest, [one.id for one in rows]) == ("x", [one.id for one in added])
    assert records.answered("you", "k") is None
    records.add([row()], Asked("you", "k", "y"))
    assert records.say(added[0].id, "defect", "me").word == "defect"
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda _: records.set_threshold("m", "d", 1.0, None, "me").version, range(8)))
    assert sorted(versions) == list(range(1, 9))


def test_what_is_no_database_is_told(tmp_path):
    for wrong in ("nonsense", "mysql://localhost/x"):
        with pytest.raises(FlawmapError, match="give sqlite"):
            open_database(wrong)
    with pytest.raises(DatabaseGoneError):
        open_database(f"sqlite:///{tmp_path / 'none' / 'records.db'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(DatabaseGoneError, match="cannot be reached"):
            open_database(f"postgresql://nobody@127.0.0.1:{free.getsockname()[1]}/none")


# A process of its own


class Server:
    """`flawmap serve` as a user starts it."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "flawmap", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        first = self.process.stderr.readline()
        assert first.startswith("page http"), first + (self.process.stderr.read() if self.process.poll() else "")
        self.url = first.split()[1].rstrip("/")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(30)


def ask(url, content, key, answered):
    """Keeps asking until the server is gone; puts what was acknowledged into `answered`."""
    with httpx.Client(base_url=url, timeout=20) as client:
        for number in range(10_000):
            name = f"{key}-{number}"
            try:
                answer = client.post(INSPECT, content=content, headers={"Idempotency-Key": name})
            except httpx.TransportError:
                return
            if answer.status_code == 200:
                answered[name] = answer.json()["inspections"][0]["id"]


def test_a_killed_server_has_lost_nothing_that_it_acknowledged(model, tmp_path, good, broken):
    answered: dict[str, int] = {}
    store = tmp_path / "store"
    for round_ in range(3):
        server = Server(model, "--store", store)
        threads = [
            threading.Thread(target=ask, args=(server.url, content, f"{round_}-{who}", answered))
            for who, content in enumerate((good, broken, broken))
        ]
        for thread in threads:
            thread.start()
        before, deadline = len(answered), time.monotonic() + 30
        while len(answered) < before + 5 + round_ and time.monotonic() < deadline:
            time.sleep(0.01)
        server.kill()
        for thread in threads:
            thread.join()
    assert len(answered) > 15
    server = Server(model, "--store", store)
    with httpx.Client(base_url=server.url) as client:
        kept = [json.loads(line)["id"] for line in client.get("/v1/export.jsonl").text.splitlines()]
        assert set(answered.values()) <= set(kept)
        assert len(kept) == len(set(kept))
        # Sent again, none is kept twice.
        name, number = next(reversed(answered.items()))
        content = good if name.split("-")[1] == "0" else broken
        again = client.post(INSPECT, content=content, headers={"Idempotency-Key": name})
        assert again.json()["inspections"][0]["id"] == number
        row_ = client.get("/v1/inspections?verdict=defect&limit=1").json()["inspections"][0]
        assert client.get(row_["links"]["overlay"]).status_code == 200
    assert server.kill(signal.SIGTERM) == 0


def test_a_server_that_is_told_to_end_finishes_what_it_accepted(model, tmp_path, good):
    server = Server(model, "--store", tmp_path / "store")
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(httpx.post, server.url + INSPECT, content=good, timeout=30) for _ in range(12)]
        futures[0].result()
        server.process.send_signal(signal.SIGTERM)
        answers = []
        for future in futures:
            try:
                answers.append(future.result().status_code)
            except httpx.TransportError:  # it came after the end
                answers.append(0)
    assert server.process.wait(30) == 0
    assert set(answers) <= {200, 0, 503}
    kept = sum(Records(open_database(f"sqlite:///{tmp_path / 'store' / 'records.db'}")).counts(Filter()).values())
    assert kept == answers.count(200)
    journal = (tmp_path / "store" / "inspections.log").read_text().splitlines()
    assert len(journal) == kept
    assert json.loads(journal[0])["verdict"] == "good"


def test_a_database_that_is_cut_off_is_told_of_and_loses_nothing(postgresql_url, exported, tmp_path, good):
    head, _, tail = postgresql_url.rpartition(":")
    port, _, name = tail.partition("/")
    model = tmp_path / "cut-off.onnx"
    shutil.copyfile(exported, model)
    cut = Cut(int(port))
    try:
        server = Server(model, "--store", tmp_path / "store", "--database", f"{head}:{cut.address}/{name}")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answers = [client.post("/v1/models/cut-off/inspections", content=good)]
            cut.cut()
            away = client.post("/v1/models/cut-off/inspections", content=good)
            assert away.status_code == 503, away.text
            assert int(away.headers["retry-after"]) > 0
            assert client.get("/readyz").status_code == 503
            assert client.get("/v1/inspections").status_code == 503
            assert client.get("/healthz").status_code == 200
            cut.whole = True
            wait_for(lambda: client.get("/readyz").status_code == 200)
            answers += [client.post("/v1/models/cut-off/inspections", content=good) for _ in range(3)]
            assert {answer.status_code for answer in answers} == {200}
            kept = client.get("/v1/export.jsonl?model=cut-off").text.splitlines()
        assert server.kill(signal.SIGTERM) == 0
    finally:
        cut.close()
    acknowledged = {answer.json()["inspections"][0]["id"] for answer in answers}
    assert acknowledged <= {json.loads(line)["id"] for line in kept}


def test_other_machines_are_not_served_without_keys(flawmap, model, tmp_path):
    code, _, err = flawmap("serve", model, "--host", "0.0.0.0", "--store", tmp_path / "store")
    assert code == 2
    assert "flawmap key" in err
    assert not (tmp_path / "store").exists()


def test_a_port_in_use_and_two_models_of_one_name_are_told(flawmap, model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = flawmap("serve", model, "--port", taken.getsockname()[1], "--store", tmp_path / "store")
    assert (code, "--port" in err) == (2, True)
    code, _, err = flawmap("serve", model, model, "--port", 0, "--store", tmp_path / "store")
    assert (code, "rename one" in err) == (2, True)
