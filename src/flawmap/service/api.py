"""REST: images in, verdicts out, and what is kept of them."""

from __future__ import annotations

import asyncio
import csv
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from io import StringIO
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from flawmap.errors import FlawmapError, ImageError, TooManyPixelsError
from flawmap.service.answers import (
    Health,
    Inspection,
    Inspections,
    Listed,
    Model,
    Models,
    Problem,
    Said,
    Threshold,
    ThresholdGiven,
    Thresholds,
    Verdict,
    Word,
    WordGiven,
)
from flawmap.service.batching import ClosingError, QueueFullError, Upload
from flawmap.service.database import DatabaseFullError, DatabaseGoneError
from flawmap.service.guard import Guard
from flawmap.service.hosting import Host
from flawmap.service.journal import inspection_json
from flawmap.service.keys import ANYONE, Caller, Role
from flawmap.service.pictures import PicturesFullError
from flawmap.service.receiving import read_images
from flawmap.service.records import Filter
from flawmap.service.service import RepeatedDifferentlyError, Service, UnknownModelError
from flawmap.service.tables import InspectionRow

_LOG = logging.getLogger("flawmap.service")
_LATER = 2  # seconds, of Retry-After
_DECODED = 4  # requests whose images are decoded at the same time: each may be large

_STATUS: dict[type[FlawmapError], int] = {
    TooManyPixelsError: 413,
    ImageError: 422,
    QueueFullError: 429,
    ClosingError: 503,
    DatabaseFullError: 507,
    PicturesFullError: 507,
    DatabaseGoneError: 503,
    UnknownModelError: 404,
    RepeatedDifferentlyError: 409,
    FlawmapError: 422,
}
"""The first that an error is, in the order of its classes."""

_TOLD = {
    400: "The request is broken",
    401: "There is no key, or it is wrong",
    403: "The key may not do this, or a page of another site asked",
    404: "There is no such thing",
    408: "The images did not come in time",
    409: "The Idempotency-Key was used for other images",
    413: "There are too many bytes or pixels",
    422: "It is no image, or not what is asked for",
    429: "Too much waits already, or too many wrong keys were tried: see Retry-After",
    503: "The database cannot be reached, or the service ends: see Retry-After",
    507: "A disk is full",
}

Number = Annotated[int, Path(ge=1, le=2**63 - 1, description="The inspection's id.")]
Cursor = Annotated[int | None, Query(ge=1, le=2**63 - 1, description="`next` of the answer before.")]
Name = Annotated[str, Path(description="The model's name.")]


def create_app(service: Service, *, local: bool = False) -> FastAPI:
    """The service's routes; what it has is let go of when the app ends.

    Args:
        service: models and records.
        local: whether only this machine's own names are answered to, as without keys.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(service.close)

    app = FastAPI(
        title="flawmap",
        summary="Says of each image whether the part is good, how sure, and where the flaw is.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # both fetch their pages from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Guard, local=local)
    _add_failures(app, service)
    _add_inspections(app, service)
    _add_words_and_thresholds(app, service)
    _add_health(app, service)
    return app


# What fails


def _add_failures(app: FastAPI, service: Service) -> None:
    def refused(status: int, told: str, headers: dict[str, str] | None = None) -> JSONResponse:
        service.counters.refused(status)
        headers = dict(headers or {})
        if status in (429, 503):
            headers.setdefault("Retry-After", str(_LATER))
        return JSONResponse({"detail": " ".join(told.split())}, status, headers)

    @app.exception_handler(FlawmapError)
    async def on_failure(request: Request, error: FlawmapError) -> JSONResponse:
        status = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
        return refused(status, str(error))

    @app.exception_handler(HTTPException)
    async def on_refusal(request: Request, error: HTTPException) -> JSONResponse:
        return refused(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
        told = str(first["msg"]).removeprefix("Value error, ")
        return refused(422, f"{place}: {told}" if place else told)

    @app.exception_handler(Exception)
    async def on_surprise(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refused(500, "this should not have happened: see the service's log")


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of refusals; any request may be refused for its key."""
    return {status: {"model": Problem, "description": _TOLD[status]} for status in (401, 403, 429, *statuses)}


# Who asks


def caller_of(service: Service, key: str | None, address: str) -> Caller:
    """Whose key it is.

    Raises:
        HTTPException: 401 for a wrong key, or none; 429 after too many wrong ones.
    """
    keys = service.options.keys
    if keys is None:
        return ANYONE
    if wait := service.failed_keys.wait(address):
        raise HTTPException(429, "too many wrong keys were tried: wait", {"Retry-After": str(wait)})
    found = None if key is None else keys.caller(key)
    if found is None:
        if key is not None:
            service.failed_keys.failed(address)
        raise HTTPException(401, "give a key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
    return found


def _asking(service: Service, role: Role) -> Callable[[Request], Caller]:
    """A dependency: the caller, who has a role."""

    def asking(request: Request) -> Caller:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        address = request.client.host if request.client else ""
        caller = caller_of(service, key.strip() if scheme.lower() == "bearer" and key.strip() else None, address)
        if not caller.may(role):
            raise HTTPException(403, f"this needs a key that may {role}; {caller.name} may {caller.role}")
        return caller

    return asking


# Inspections


def _add_inspections(app: FastAPI, service: Service) -> None:
    inspecting = Depends(_asking(service, "inspect"))
    decoding = asyncio.Semaphore(_DECODED)

    @app.get("/v1/models", responses=_problems())
    async def list_models(caller: Caller = inspecting) -> Models:
        """The models that are served."""
        return Models(models=[Model.of(host) for host in service.hosts.by_name.values()])

    @app.get("/v1/models/{name}", responses=_problems(404))
    async def get_model(name: Name, caller: Caller = inspecting) -> Model:
        """One of them."""
        return Model.of(service.host(name))

    @app.post(
        "/v1/models/{name}/inspections",
        responses=_problems(400, 404, 408, 409, 413, 422, 503, 507),
        openapi_extra=_IMAGES,
    )
    async def inspect(name: Name, request: Request, caller: Caller = inspecting) -> Inspections:
        """Judges one image, sent as it is, or those of a form. All of them are kept when this answers, or none.

        An `Idempotency-Key` makes it safe to send the same again: the answer is the same, and they are kept once. An
        image sent as it is may be called something by `X-Image-Name`.
        """
        host = service.host(name)
        key = _idempotency_key(request)
        if service.batcher.waiting >= service.options.queue:  # before anything is read
            raise QueueFullError(f"{service.batcher.waiting} images wait already: ask again in a while")
        images = await read_images(request, service.options.max_bytes)
        async with decoding:
            uploads = await run_in_threadpool(_decoded, service, images)
        del images
        future = await run_in_threadpool(
            partial(service.submit, host, uploads, owner=caller.name, source="api", key=key)
        )
        return Inspections.of(await asyncio.wrap_future(future))

    filtered = Depends(_filter)

    @app.get("/v1/inspections", responses=_problems(422, 503))
    def list_inspections(
        caller: Caller = inspecting,
        which: Filter = filtered,
        cursor: Cursor = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Listed:
        """Those that were kept, newest first."""
        rows = service.records.latest(replace(which, before=cursor), limit)
        following = rows[-1].id if len(rows) == limit else None
        return Listed(inspections=[Inspection.of(row) for row in rows], next=following)

    @app.get(
        "/v1/export.csv", response_class=Response, responses={200: {"content": {"text/csv": {}}}, **_problems(422, 503)}
    )
    def export_csv(caller: Caller = inspecting, which: Filter = filtered) -> StreamingResponse:
        """All of them as a table, oldest first."""
        return _download(_csv(_started(service.records.each(which))), "text/csv; charset=utf-8", "inspections.csv")

    @app.get(
        "/v1/export.jsonl",
        response_class=Response,
        responses={200: {"content": {"application/x-ndjson": {}}}, **_problems(422, 503)},
    )
    def export_jsonl(caller: Caller = inspecting, which: Filter = filtered) -> StreamingResponse:
        """All of them, a JSON object a line, oldest first."""
        rows = _started(service.records.each(which))
        lines = (json.dumps(inspection_json(row), ensure_ascii=False) + "\n" for row in rows)
        return _download(lines, "application/x-ndjson", "inspections.jsonl")

    @app.get("/v1/inspections/{number}", responses=_problems(404, 422, 503))
    def get_inspection(number: Number, caller: Caller = inspecting) -> Inspection:
        """One of them."""
        return Inspection.of(_row(service, number))

    for kind, content, draw, said in (
        ("picture", "image/jpeg", service.picture, "The picture that was judged."),
        ("overlay", "image/png", service.overlay, "The picture with its heat and its regions."),
        ("map", "image/png", service.map, "The map, 16 bits of grey: 65535 is twice the scale's end."),
    ):
        _add_picture(app, service, kind, content, draw, said)


def _add_picture(
    app: FastAPI, service: Service, kind: str, content: str, draw: Callable[[InspectionRow], bytes | None], said: str
) -> None:
    inspecting = Depends(_asking(service, "inspect"))

    @app.get(
        f"/v1/inspections/{{number}}/{kind}",
        operation_id=f"get_{kind}",
        description=said,
        response_class=Response,
        responses={200: {"content": {content: {}}}, **_problems(404, 422, 503)},
    )
    def get_picture(number: Number, caller: Caller = inspecting) -> Response:
        found = draw(_row(service, number))
        if found is None:
            raise HTTPException(404, f"no {kind} of inspection {number} is kept")
        return Response(found, media_type=content)


def _decoded(service: Service, images: list[tuple[bytes, str]]) -> list[Upload]:
    return [service.upload(content, name) for content, name in images]


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 200 and key.isascii() and key.isprintable()):
        raise HTTPException(422, "Idempotency-Key: give up to 200 printable letters")
    return key


def _row(service: Service, number: int) -> InspectionRow:
    row = service.records.get(number)
    if row is None:
        raise HTTPException(404, f"there is no inspection {number}")
    return row


def _filter(
    model: Annotated[str | None, Query(max_length=100)] = None,
    verdict: Verdict | None = None,
    word: Word | None = None,
    worded: Annotated[bool | None, Query(description="Whether an operator has given a word.")] = None,
    since: Annotated[datetime | None, Query(description="Inclusive; UTC where no zone is given.")] = None,
    until: Annotated[datetime | None, Query(description="Exclusive.")] = None,
) -> Filter:
    if model is not None and "\0" in model:
        raise HTTPException(422, "model: is no name")
    return Filter(model, verdict, word, worded, _milliseconds(since), _milliseconds(until))


def _milliseconds(at: datetime | None) -> int | None:
    if at is None:
        return None
    zoned = at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)
    try:
        return round(zoned.timestamp() * 1000)
    except (OverflowError, ValueError) as error:
        raise HTTPException(422, "since, until: give a time of these centuries") from error


def _started(rows: Iterator[InspectionRow]) -> Iterator[InspectionRow]:
    """The same, the first of them read: a database that is gone is told before an answer begins."""
    first = next(rows, None)

    def all_of_them() -> Iterator[InspectionRow]:
        if first is not None:
            yield first
            yield from rows

    return all_of_them()


def _csv(rows: Iterator[InspectionRow]) -> Iterator[str]:
    from flawmap.text import cell

    out = StringIO()
    writer = csv.writer(out)
    writer.writerow(_COLUMNS)
    for row in rows:
        values = inspection_json(row)
        values["regions"] = json.dumps(values["regions"])
        writer.writerow([cell(value) if isinstance(value, str) else value for value in map(values.get, _COLUMNS)])
        if out.tell() > 1 << 16:
            yield out.getvalue()
            out.seek(0)
            out.truncate()
    yield out.getvalue()


def _download(content: Iterator[str], kind: str, name: str) -> StreamingResponse:
    return StreamingResponse(
        content, media_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


_COLUMNS = tuple(name for name in Inspection.model_fields if name != "links")

_IMAGES: dict[str, Any] = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[\\x20-\\x7e]+$"},
        },
        {"name": "X-Image-Name", "in": "header", "required": False, "schema": {"type": "string"}},
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["image"],
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


# Words and thresholds


def _add_words_and_thresholds(app: FastAPI, service: Service) -> None:
    inspecting = Depends(_asking(service, "inspect"))
    operating = Depends(_asking(service, "operate"))
    administering = Depends(_asking(service, "administer"))

    @app.put("/v1/inspections/{number}/word", responses=_problems(404, 422, 503, 507))
    def put_word(number: Number, given: WordGiven, caller: Caller = operating) -> Inspection:
        """What an operator says of it. Those said before are kept."""
        row = service.records.say(number, given.word, caller.name)
        if row is None:
            raise HTTPException(404, f"there is no inspection {number}")
        return Inspection.of(row)

    @app.get("/v1/inspections/{number}/words", responses=_problems(404, 422, 503))
    def get_words(number: Number, caller: Caller = inspecting) -> list[Said]:
        """All that was said of it, oldest first."""
        _row(service, number)
        return [Said.of(row) for row in service.records.words(number)]

    @app.get("/v1/models/{name}/threshold", responses=_problems(404, 503))
    def get_threshold(name: Name, caller: Caller = inspecting) -> Threshold:
        """The threshold in use."""
        host = service.host(name)
        return Threshold.of(host, _set(service, host))

    @app.put("/v1/models/{name}/threshold", responses=_problems(404, 422, 503, 507))
    def put_threshold(name: Name, given: ThresholdGiven, caller: Caller = administering) -> Threshold:
        """Sets it, as a new version: each inspection says under which it was judged."""
        host = service.host(name)
        host.set_threshold(rate=given.rate, value=given.value, by=caller.name)
        return Threshold.of(host, _set(service, host))

    @app.get("/v1/models/{name}/thresholds", responses=_problems(404, 503))
    def list_thresholds(name: Name, caller: Caller = inspecting) -> Thresholds:
        """All versions that were set."""
        host = service.host(name)
        return Thresholds(thresholds=[Threshold.of(host, row) for row in service.records.thresholds(name)])


def _set(service: Service, host: Host) -> Any:
    """The row of the threshold in use, if it was set."""
    version = host.serving.version
    return next((row for row in service.records.thresholds(host.name) if row.version == version), None)


# Health


def _add_health(app: FastAPI, service: Service) -> None:
    inspecting = Depends(_asking(service, "inspect"))

    @app.get("/healthz", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def alive() -> Response:
        """Answers while the process lives."""
        return Response("alive\n", media_type="text/plain")

    @app.get("/readyz", responses={503: {"model": Health, "description": "Nothing can be judged or kept now."}})
    def ready(response: Response) -> Health:
        """Whether images can be judged and kept; a newer model file that is not in use is told, and stops nothing."""
        trouble = []
        try:
            service.records.ping()
        except DatabaseGoneError as error:
            trouble.append(str(error))
        works = not trouble
        trouble += [f"{host.name}: {host.trouble}" for host in service.hosts.by_name.values() if host.trouble]
        response.status_code = 200 if works else 503
        return Health(ready=works, trouble=trouble)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_problems()})
    async def metrics(caller: Caller = inspecting) -> Response:
        """For Prometheus."""
        return Response(service.counters.text(), media_type="text/plain; version=0.0.4")
