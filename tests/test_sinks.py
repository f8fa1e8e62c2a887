"""Whoever is told of inspections, for real: an HTTP receiver, an MQTT broker, an OPC UA client."""

import asyncio
import hashlib
import hmac
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from debian_packages import brought_by, find_program
from flawmap import FlawmapError
from flawmap.service.database import open_database
from flawmap.service.deliveries import Deliveries
from flawmap.service.records import Records
from flawmap.service.sinks import told
from flawmap.service.sinks.mqtt import Mqtt
from flawmap.service.sinks.opcua import NAMESPACE, OpcUa
from flawmap.service.sinks.webhook import Webhook, check_url, read_secret
from flawmap.service.tables import DeliveryRow
from watching_processes import Process, free_port, wait_for

SECRET = b"a secret of the tests"


@pytest.fixture
def records(tmp_path):
    return Records(open_database(f"sqlite:///{tmp_path / 'records.db'}"))


def a_row(name, verdict="good", **more):
    texts = dict.fromkeys(("model_digest", "source", "owner", "image_digest"), "")
    numbers = dict.fromkeys(("at", "threshold_version", "milliseconds", "stored"), 0)
    return {**texts, **numbers, "model": "m", "name": name, "verdict": verdict, "regions": [], **more}


class Receiver:
    """An HTTP server that answers as it is told to, and keeps what it got."""

    def __init__(self, *answers, seconds=0.0):
        self.got, self.answers = [], list(answers)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((dict(self.headers), body))
                time.sleep(seconds)
                status = receiver.answers.pop(0) if receiver.answers else 204
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{receiver.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):  # whoever follows a redirect takes this for success
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def ids(self):
        return [json.loads(body)["id"] for _, body in self.got]

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.server.shutdown()
        self.server.server_close()


def states(records):
    with Session(records.engine) as session:
        return [(row.state, row.tries) for row in session.scalars(select(DeliveryRow).order_by(DeliveryRow.id))]


# Webhooks


def test_a_webhook_is_told_again_until_it_accepts_and_every_request_is_signed(records):
    with Receiver(500, 301, 404) as receiver:
        (row,) = records.add([a_row("a.png", "defect", score=3.5, p_value=0.01)], deliveries=[receiver.url])
        sink = Webhook(receiver.url, SECRET, Deliveries(records.engine), first_wait=20)
        wait_for(lambda: states(records) == [("done", 4)])
        sink.close()
        (late,) = records.add([a_row("b.png")], deliveries=[receiver.url, "http://127.0.0.1:1/of-another"])
        sink = Webhook(receiver.url, SECRET, Deliveries(records.engine))
        wait_for(lambda: len(receiver.got) == 5)
        sink.close()
    assert receiver.ids() == [row.id] * 4 + [late.id]
    assert states(records) == [("done", 4), ("done", 1), ("waiting", 0)]
    for headers, body in receiver.got:
        stamp = headers["X-Flawmap-Timestamp"]
        expected = hmac.new(SECRET, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
        assert headers["X-Flawmap-Signature"] == f"sha256={expected}"
        assert abs(int(stamp) - time.time()) < 60
        assert headers["Content-Type"] == "application/json"
    assert json.loads(receiver.got[0][1]) == told(row)
    assert told(row)["at"] == "1970-01-01T00:00:00.000+00:00"
    assert (told(row)["model"], told(row)["verdict"], told(row)["score"]) == ("m", "defect", 3.5)


def test_what_nobody_takes_is_kept_as_dead_and_can_be_tried_again(records, flawmap, tmp_path, caplog):
    with Receiver(*[503] * 3) as receiver:
        (row,) = records.add([a_row("a.png")], deliveries=[receiver.url])
        sink = Webhook(receiver.url, SECRET, Deliveries(records.engine), tries=3, first_wait=10)
        wait_for(lambda: states(records) == [("dead", 3)])
        time.sleep(0.1)
        assert len(receiver.got) == 3
        (dead,) = Deliveries(records.engine).dead()
        assert (dead.inspection, dead.url, dead.error) == (row.id, receiver.url, "status 503")
        database = f"sqlite:///{tmp_path / 'records.db'}"
        code, out, err = flawmap("watch", "--retry-dead", "--database", database, "--store", tmp_path)
        assert (code, out) == (0, "")
        assert "1 dead deliver" in err
        assert f"inspection {row.id} to {receiver.url}: status 503" in err
        sink.tell({})
        wait_for(lambda: states(records) == [("done", 1)])
        sink.close()
    assert Deliveries(records.engine).retry_dead() == []
    assert sum("given up" in message for message in caplog.messages) == 1
    assert sum("is tried again" in message for message in caplog.messages) == 1


def test_a_slow_receiver_holds_up_nobody_and_one_that_never_answers_is_left(records):
    with Receiver(seconds=1.0) as receiver:
        sink = Webhook(receiver.url, SECRET, Deliveries(records.engine), timeout=0.2, tries=1)
        start = time.perf_counter()
        for number in range(20):
            (row,) = records.add([a_row(f"{number}.png")], deliveries=[receiver.url])
            sink.tell(told(row))
        assert time.perf_counter() - start < 1.0
        wait_for(lambda: ("dead", 1) in states(records))
        assert "timed out" in Deliveries(records.engine).dead()[0].error
        sink.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_that_deliver_share_the_work(request, tmp_path, kind):
    url = request.getfixturevalue("postgresql_url") if kind == "postgresql" else f"sqlite:///{tmp_path / 'r.db'}"
    records = Records(open_database(url))
    with Receiver() as receiver:
        rows = records.add([a_row(f"{number}.png") for number in range(40)], deliveries=[receiver.url])
        sinks = [Webhook(receiver.url, SECRET, Deliveries(open_database(url))) for _ in range(2)]
        wait_for(lambda: len(receiver.got) >= 40)
        for sink in sinks:
            sink.close()
    assert Counter(receiver.ids()) == Counter(row.id for row in rows)


def test_a_delivery_whose_process_was_killed_is_due_again(records):
    records.add([a_row("a.png")], deliveries=["http://a/"])
    deliveries = Deliveries(records.engine)
    assert deliveries.claim(["http://b/"], 100) is None
    assert deliveries.claim(["http://a/"], 100).tries == 1
    assert deliveries.claim(["http://a/"], 100) is None
    time.sleep(0.15)
    assert deliveries.claim(["http://a/"], 100).tries == 2


def test_a_killed_watch_tells_the_webhook_after_it_is_started_again(line_model, drawn, tmp_path):
    folder = tmp_path / "incoming"
    folder.mkdir()
    shutil.copy(drawn / "test" / "good" / "000.png", folder / "a.png")
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET + b"\n")
    with Receiver(*[500] * 100) as receiver:
        twice = ("--webhook", receiver.url, "--webhook", receiver.url)
        options = ("--store", tmp_path / "store", *twice, "--webhook-secret", secret)
        with Process(line_model, folder, *options) as watch:
            watch.until(lambda it: any("does not take" in line for line in it.err))
            watch.process.kill()
        assert len(receiver.got) >= 1
        receiver.answers.clear()
        with Process(line_model, folder, *options) as watch:
            records = Records(open_database(f"sqlite:///{tmp_path / 'store' / 'records.db'}"))
            wait_for(lambda: [state for state, _ in states(records)] == ["done"])
            assert watch.end(signal.SIGTERM) == 0
        assert len(watch.out) == 1
    assert set(receiver.ids()) == {1}
    headers, body = receiver.got[-1]
    expected = hmac.new(SECRET, headers["X-Flawmap-Timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["X-Flawmap-Signature"] == f"sha256={expected}"
    assert json.loads(body)["path"] == "a.png"


@pytest.mark.parametrize(
    "url",
    ["ftp://host/", "host", "http://", "http://host:99999/", "http://user:word@host/", "http://host/\n", "file:///a"],
)
def test_addresses_that_are_no_webhook_are_refused_without_repeating_them(url):
    with pytest.raises(FlawmapError, match="--webhook") as caught:
        check_url(url)
    assert "word@" not in str(caught.value)


def test_the_secret_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, records):
    monkeypatch.setenv("FLAWMAP_WEBHOOK_SECRET", "of the environment")
    assert read_secret(None) == b"of the environment"
    (tmp_path / "secret").write_bytes(b"of a file\r\n")
    assert read_secret(tmp_path / "secret") == b"of a file"
    (tmp_path / "empty").touch()
    with pytest.raises(FlawmapError, match="is empty"):
        read_secret(tmp_path / "empty")
    with pytest.raises(FlawmapError, match="needs a secret"):
        Webhook("http://host/", b"", Deliveries(records.engine))


# MQTT


class Broker:
    """Mosquitto with a user and a password."""

    def __init__(self, folder):
        program = brought_by("mosquitto", lambda: find_program("mosquitto"))
        make = brought_by("mosquitto", lambda: find_program("mosquitto_passwd"))
        self.port = free_port()
        passwords, self._settings = folder / "passwords", folder / "mosquitto.conf"
        subprocess.run([make, "-b", "-c", passwords, "joe", "s3cr3t/word"], check=True, capture_output=True)
        folder.chmod(0o755)
        passwords.chmod(0o644)
        self._settings.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\nuser root\n"
        )
        self._program, self.process = program, None
        self.start()

    def start(self):
        self.process = subprocess.Popen([self._program, "-c", self._settings], stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def _answers(self):
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
            return True
        return False

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def broker(tmp_path):
    (tmp_path / "broker").mkdir()
    started = Broker(tmp_path / "broker")
    yield started
    started.stop()


class Subscriber:
    """What comes on all topics, with whether it was retained."""

    def __init__(self, port):
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.got, self._client = [], Client(CallbackAPIVersion.VERSION2)
        self._client.username_pw_set("joe", "s3cr3t/word")
        self._client.on_connect = lambda client, *more: client.subscribe("#", qos=1)
        self._client.on_message = lambda client, data, message: self.got.append(
            (message.topic, message.payload.decode(), bool(message.retain), message.qos)
        )
        self._client.connect_async("127.0.0.1", port)
        self._client.loop_start()

    def last(self, topic):
        return next((payload for name, payload, *_ in reversed(self.got) if name == topic), None)

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


def test_mqtt_keeps_the_last_verdict_and_says_when_the_watch_is_gone(broker, line_model, drawn, tmp_path):
    folder = tmp_path / "incoming"
    folder.mkdir()
    for number in range(2):
        shutil.copy(drawn / "test" / "good" / f"{number:03}.png", folder / f"{number}.png")
    url = f"mqtt://joe:s3cr3t%2Fword@127.0.0.1:{broker.port}"
    early = Subscriber(broker.port)
    with Process(line_model, folder, "--store", tmp_path / "store", "--mqtt", url) as watch:
        watch.until(lambda it: len(it.out) == 3)
        wait_for(lambda: sum(topic == "flawmap/screws/verdict" for topic, *_ in early.got) == 2)
        late = Subscriber(broker.port)
        wait_for(lambda: len(late.got) == 2)
        watch.process.kill()
        wait_for(lambda: early.last("flawmap/screws/state") == "offline")  # the broker's doing
    early.close()
    late.close()
    kept = {topic: (payload, retained, quality) for topic, payload, retained, quality in late.got[:2]}
    assert kept["flawmap/screws/state"] == ("online", True, 1)
    payload, retained, quality = kept["flawmap/screws/verdict"]
    assert (retained, quality) == (True, 1)
    assert json.loads(payload)["model"] == "screws"
    assert json.loads(payload)["id"] == 2
    printed = "\n".join(watch.out + watch.err)
    assert "s3cr3t" not in printed


def test_mqtt_waits_for_a_broker_that_is_not_there_or_goes_and_says_so_once(broker, caplog):
    broker.stop()
    sink = Mqtt(f"mqtt://joe:s3cr3t%2Fword@127.0.0.1:{broker.port}/hall 3/line", "m")
    subscriber = Subscriber(broker.port)
    try:
        sink.tell({"id": 1})
        wait_for(lambda: caplog.messages)
        time.sleep(2.5)  # it has tried again
        broker.start()
        wait_for(lambda: subscriber.last("hall 3/line/verdict") == '{"id": 1}')
        broker.stop()
        wait_for(lambda: len(caplog.messages) == 3)
        sink.tell({"id": 2})
        broker.start()
        wait_for(lambda: subscriber.last("hall 3/line/verdict") == '{"id": 2}')
        wait_for(lambda: subscriber.last("hall 3/line/state") == "online")
        sink.close()
        wait_for(lambda: subscriber.last("hall 3/line/state") == "offline")
    finally:
        subscriber.close()
    assert ["cannot be used" in message for message in caplog.messages] == [True, False, True, False]
    assert "s3cr3t" not in caplog.text


def test_a_broker_that_refuses_the_password_is_told_without_it(broker, caplog):
    sink = Mqtt(f"mqtt://joe:wr0ng@127.0.0.1:{broker.port}", "m")
    wait_for(lambda: caplog.messages)
    time.sleep(1.5)  # it has tried again
    sink.close()
    assert len(caplog.messages) == 1
    assert "ot authorized" in caplog.messages[0]
    assert "wr0ng" not in caplog.text


@pytest.mark.parametrize("url", ["http://host", "mqtt://", "mqtt://host:port/", "mqtt://u:word@host/a/%23"])
def test_addresses_that_are_no_broker_are_refused_without_repeating_them(url):
    with pytest.raises(FlawmapError, match="--mqtt") as caught:
        Mqtt(url, "m")
    assert "word" not in str(caught.value)


# OPC UA


def test_opc_ua_says_the_last_verdict_counts_and_triggers():
    from asyncua import Client

    triggered = []
    port = free_port()
    endpoint = f"opc.tcp://127.0.0.1:{port}"
    sink = OpcUa(endpoint, "screws", lambda: triggered.append(1))
    with pytest.raises(FlawmapError, match="--opcua cannot listen"):
        OpcUa(endpoint, "other", lambda: None)

    async def ask():
        async with Client(endpoint) as client:
            space = await client.get_namespace_index(NAMESPACE)
            model = await client.nodes.objects.get_child([f"{space}:flawmap", f"{space}:screws"])

            async def values():
                names = ("Verdict", "Score", "PValue", "Id", "Name", "Time", "Good", "Defect", "Unsure", "Error")
                return {name: await (await model.get_child(f"{space}:{name}")).read_value() for name in names}

            before = await values()
            for number, verdict in enumerate(("good", "defect", "defect", "error"), start=1):
                scored = {} if verdict == "error" else {"score": 2.5, "p_value": 0.25}
                row = a_row(f"{number}.png", verdict, at=1_700_000_000_123, **scored)
                sink.tell({**told_of(row), "id": number})
                if number == 3:
                    third = await until(values, 3)
            last = await until(values, 4)
            await model.call_method(f"{space}:Trigger")
            return before, third, last

    async def until(values, number):
        while (now := await values())["Id"] != number or now["Verdict"] == "":
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        return await values()

    before, third, last = asyncio.run(asyncio.wait_for(ask(), 60))
    sink.close()
    assert (before["Verdict"], before["Good"]) == ("", 0)
    assert (third["Verdict"], third["Score"], third["PValue"], third["Name"]) == ("defect", 2.5, 0.25, "3.png")
    assert third["Time"].timestamp() == pytest.approx(1_700_000_000.123) or third["Time"].isoformat() == (
        "2023-11-14T22:13:20.123000"
    )
    assert (last["Verdict"], last["Good"], last["Defect"], last["Unsure"], last["Error"]) == ("error", 1, 2, 0, 1)
    assert last["Score"] != last["Score"]
    assert triggered == [1]
    socket.create_server(("127.0.0.1", port)).close()  # which is free again


def told_of(row):
    from flawmap.service.tables import InspectionRow

    return told(InspectionRow(id=0, **row))


@pytest.mark.parametrize("endpoint", ["http://host:1", "opc.tcp://", "opc.tcp://host", "opc.tcp://host:port"])
def test_addresses_where_no_opc_ua_can_be_served_are_refused(endpoint):
    with pytest.raises(FlawmapError, match="--opcua"):
        OpcUa(endpoint, "m", lambda: None)


def test_a_sink_that_fails_takes_no_inspection_away(flawmap, line_model, drawn, tmp_path, monkeypatch):
    def fail(self, inspection):
        raise RuntimeError("no")

    monkeypatch.setattr(Mqtt, "tell", fail)
    address = f"mqtt://127.0.0.1:{free_port()}"
    options = ("--once", "--engine", "onnxruntime", "--store", tmp_path, "--mqtt", address)
    code, out, err = flawmap("watch", line_model, drawn / "test" / "good", *options)
    assert code == 0, err
    assert len(out.splitlines()) == 5
