"""flawmap watch"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import click

from flawmap.cli.options import DATABASE, KEEP, KEEP_GB, RATE, SCORE, STORE, Finite
from flawmap.cli.say import say
from flawmap.cli.verdict_lines import VerdictLines
from flawmap.errors import service_is_missing

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from flawmap.judging.inspection import Inspection
    from flawmap.service.deliveries import Deliveries
    from flawmap.service.records import Records
    from flawmap.service.sinks import Sink
    from flawmap.service.sources import Source
    from flawmap.service.watching import Watch

_WIDTH = 40  # of the column of names: which will come is not known


@click.command("watch")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@DATABASE
@STORE
@KEEP
@KEEP_GB
@click.option("--move", type=click.Path(path_type=Path, file_okay=False), help="Move judged files to DIR/<verdict>/.")
@click.option("--webhook", "webhooks", multiple=True, metavar="URL", help="Post each inspection, signed; repeatable.")
@click.option(
    "--webhook-secret", type=click.Path(path_type=Path, dir_okay=False), help="File with what it is signed by."
)
@click.option("--webhook-tries", type=click.IntRange(1, 1000), default=16, show_default=True, help="Then it is dead.")
@click.option("--retry-dead", is_flag=True, help="Post dead deliveries again; without a MODEL just mark them so.")
@click.option("--mqtt", metavar="URL", help="Publish to mqtt://USER:PASSWORD@HOST:PORT/TOPIC, or mqtts.")
@click.option("--opcua", metavar="ENDPOINT", help="Serve OPC UA at opc.tcp://HOST:PORT.")
@click.option("--every", type=Finite(0), metavar="N", help="Of cameras and videos, judge a frame each N seconds.")
@click.option("--trigger-port", type=click.IntRange(1, 65535), help="A POST to this port of 127.0.0.1 takes a picture.")
@click.option("--patience", type=Finite(0), default=10.0, show_default=True, help="Seconds to wait for a damaged file.")
@click.option("--once", is_flag=True, help="Judge what is there, and end.")
@click.option("--format", "form", type=click.Choice(["table", "jsonl"]), default="table", show_default=True)
@click.option("--max-false-reject", type=RATE, help="Another false-reject rate than the model was trained for.")
@click.option("--threshold", type=SCORE, help="A threshold on the raw score.")
@click.option("--engine", default="auto", show_default=True, help="auto, openvino, onnxruntime or torch.")
def watch_command(
    model: Path | None,
    sources: tuple[str, ...],
    database: str | None,
    store: Path,
    keep: Literal["defects", "all", "none"],
    keep_gb: float,
    move: Path | None,
    webhooks: tuple[str, ...],
    webhook_secret: Path | None,
    webhook_tries: int,
    retry_dead: bool,
    mqtt: str | None,
    opcua: str | None,
    every: float | None,
    trigger_port: int | None,
    patience: float,
    once: bool,
    form: str,
    max_false_reject: float | None,
    threshold: float | None,
    engine: str,
) -> int:
    """Judge what comes with a trained MODEL, and keep it in records, until interrupted.

    A SOURCE is a folder, a video file, the URL of an RTSP or HTTP stream, or a USB camera, `usb:0`. Each file is judged
    once, also after a restart. Without --every cameras take a picture at the key Enter, a POST to --trigger-port, or
    the OPC UA method.
    """
    if max_false_reject is not None and threshold is not None:
        raise click.UsageError("give --max-false-reject or --threshold, not both")
    webhooks = tuple(dict.fromkeys(webhooks))
    if model is None and not retry_dead:
        raise click.UsageError("name a MODEL, and at least one SOURCE to watch")
    if model is not None and not sources:
        raise click.UsageError("name at least one SOURCE to watch: a folder, a video, a stream or usb:0")

    from flawmap.cli.progress import quiet_libraries

    quiet_libraries()
    try:
        from flawmap.service.database import open_database
        from flawmap.service.deliveries import Deliveries
        from flawmap.service.hosting import Host, model_name
        from flawmap.service.pictures import Pictures
        from flawmap.service.recording import Recorder
        from flawmap.service.records import Records
        from flawmap.service.sources.triggers import on_enter, on_http
        from flawmap.service.watching import Watch, until_it_can
    except ModuleNotFoundError as error:
        raise service_is_missing("watch", error) from error
    from flawmap.report.drawings import make_folder

    make_folder(store)
    url = f"sqlite:///{store / 'records.db'}" if database is None else database

    def opened() -> Engine:
        return open_database(url)

    if model is None:
        _retry(Deliveries(opened()))
        return 0

    from flawmap.line import Inspector

    path = model
    name = model_name(path)
    inspector = Inspector.load(path, engine=engine)  # before a database is asked for
    watches: list[Watch] = []
    ended: list[bool] = []

    def end() -> None:
        ended.append(True)
        for watch in watches:
            watch.end()

    with _ended_by(end), ExitStack() as held:
        records = until_it_can(lambda: Records(opened()), lambda: bool(ended), once=once)
        if records is None:
            return 0
        held.callback(records.engine.dispose)
        deliveries = Deliveries(records.engine)
        if retry_dead:
            _retry(deliveries)
        first = [inspector]

        def load(path: Path) -> Inspector:
            return first.pop() if first else Inspector.load(path, engine=engine)

        def hosted() -> Host:
            host = Host(name, path, records, load)
            if max_false_reject is not None or threshold is not None:
                host.keep_threshold(rate=max_false_reject, value=threshold, by="watch")
            return host

        host = until_it_can(hosted, lambda: bool(ended), once=once)
        if host is None:
            return 0
        say(host.serving.inspector.judge.describe(), err=True)

        def wake() -> None:
            for watch in watches:
                watch.wake()

        opened_sources = []
        for source in sources:
            one = _source(source, name, records, store, move, every, patience, once, wake)
            held.callback(one.close)
            opened_sources.append(one)

        def trigger() -> None:
            from flawmap.service.sources.cameras import Camera

            for one in opened_sources:
                if isinstance(one, Camera):
                    one.trigger()

        sinks = _sinks(name, deliveries, webhooks, webhook_secret, webhook_tries, mqtt, opcua, trigger, held)
        if trigger_port is not None:
            server = on_http(trigger_port, trigger)
            held.callback(server.server_close)
            held.callback(server.shutdown)
        if every is None and not once and any(_is_live(source) for source in sources):
            on_enter(0, trigger)
        recorder = Recorder(records, Pictures(store / "pictures", records, int(keep_gb * 1e9)), keep)
        lines = VerdictLines(form, _WIDTH, inspector.digest)

        def write(inspection: Inspection) -> None:
            lines(inspection)
            if inspection.error is not None:
                say(f"flawmap: {inspection.error}", err=True)

        watch = Watch(host, recorder, opened_sources, sinks=sinks, deliveries=webhooks, write=write, once=once)
        watches.append(watch)
        if not ended:
            watch.run()
        unmoved = sum(getattr(one, "unmoved", 0) for one in opened_sources)
    counts = watch.counts
    say(f"{counts['good']} good, {counts['defect']} defect, {counts['error']} not judged", err=True)
    judged = sum(counts.values())
    if ended or not judged:
        return 0
    from flawmap.cli.inspect import exit_code

    return exit_code(judged, counts["defect"], counts["unsure"], counts["error"], unmoved, fail_on_defect=False)


def _is_live(source: str) -> bool:
    from flawmap.service.sources.cameras import is_live

    return is_live(source)


def _source(
    source: str,
    model: str,
    records: Records,
    store: Path,
    move: Path | None,
    every: float | None,
    patience: float,
    once: bool,
    wake: Callable[[], None],
) -> Source:
    from flawmap.service.sources.cameras import Camera, VideoFile, is_live, is_video
    from flawmap.service.sources.folders import WatchedFolder

    if is_live(source):
        return Camera(source, every=every, once=once, wake=wake)
    path = Path(source)
    if is_video(source) and not path.is_dir():
        return VideoFile(path, model, records, 1.0 if every is None else every)
    return WatchedFolder(path, model, records, move=move, without=[store], patience=patience, once=once)


def _sinks(
    model: str,
    deliveries: Deliveries,
    webhooks: tuple[str, ...],
    secret_file: Path | None,
    tries: int,
    mqtt: str | None,
    opcua: str | None,
    trigger: Callable[[], None],
    held: ExitStack,
) -> list[Sink]:
    """Whoever is told, closed when `held` is."""
    sinks: list[Sink] = []
    if webhooks:
        from flawmap.service.sinks.webhook import Webhook, check_url, read_secret

        secret = read_secret(secret_file)
        for url in webhooks:
            check_url(url)
        for url in webhooks:
            sinks.append(Webhook(url, secret, deliveries, tries=tries))
            held.callback(sinks[-1].close)
    if mqtt is not None:
        from flawmap.service.sinks.mqtt import Mqtt

        sinks.append(Mqtt(mqtt, model))
        held.callback(sinks[-1].close)
    if opcua is not None:
        from flawmap.service.sinks.opcua import OpcUa

        sinks.append(OpcUa(opcua, model, trigger))
        held.callback(sinks[-1].close)
    return sinks


def _retry(deliveries: Deliveries) -> None:
    rows = deliveries.retry_dead()
    for row in rows:
        say(f"inspection {row.inspection} to {row.url}: {row.error}", err=True)
    say(f"{len(rows)} dead deliveries are tried again", err=True)


@contextmanager
def _ended_by(end: Callable[[], None]) -> Iterator[None]:
    """Calls `end` at SIGINT or SIGTERM; whoever asks twice is not made to wait."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        end()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
