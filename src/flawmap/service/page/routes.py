"""What the page's pictures and drops ask for, under /page-files/: with the browser's cookie instead of a key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from fastapi import HTTPException, Request
from fastapi.responses import FileResponse, Response
from nicegui import app as pages
from starlette.concurrency import run_in_threadpool

from flawmap.errors import FlawmapError
from flawmap.service.batching import ClosingError, QueueFullError
from flawmap.service.database import DatabaseGoneError
from flawmap.service.keys import Caller, Role
from flawmap.service.page.access import caller
from flawmap.service.page.quality import csv_of
from flawmap.service.pictures import jpeg_of
from flawmap.service.service import Service, UnknownModelError
from flawmap.service.tables import InspectionRow
from flawmap.service.training import Trainings, thumbnail

_THUMB = 112
_PRIVATE = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}


def add_routes(service: Service, trainings: Trainings | None) -> None:
    """Adds them to NiceGUI's application, whose cookie they ask for."""

    @pages.get("/page-files/inspections/{number}/{what}", include_in_schema=False)
    def picture(number: int, what: str) -> Response:
        _who(service, "inspect")
        row = service.records.get(number)
        content, kind = (None, "") if row is None else _drawn(service, row, what)
        if content is None:
            raise HTTPException(404, "this picture is not kept")
        return Response(content, media_type=kind, headers=_PRIVATE)

    @pages.post("/page-files/inspections", include_in_schema=False)
    async def inspect(request: Request, model: str, name: str = "") -> dict[str, int]:
        who = _sender(service, request, "operate")
        content = BytesIO()
        await _received(request, content, service.options.max_bytes)
        return {"id": await run_in_threadpool(_judged, service, who, model, content.getvalue(), name)}

    @pages.get("/page-files/quality.csv", include_in_schema=False)
    def quality(days: int = 30) -> Response:
        _who(service, "inspect")
        names = {"Content-Disposition": 'attachment; filename="quality.csv"'}
        return Response(csv_of(service, days), media_type="text/csv; charset=utf-8", headers=names)

    if trainings is None:
        return
    jobs = trainings

    @pages.post("/page-files/collections/{collection}", include_in_schema=False)
    async def collect(request: Request, collection: str, name: str = "") -> dict[str, int | list[str]]:
        _sender(service, request, "administer")
        try:
            part = jobs.collections.part(collection)
            try:
                with part.open("wb") as file:
                    await _received(request, file, jobs.collections.max_bytes)
                added, refused = await run_in_threadpool(jobs.collections.add, collection, part, name)
            finally:
                part.unlink(missing_ok=True)
        except FlawmapError as error:
            raise HTTPException(422, str(error)) from error
        except OSError as error:
            raise HTTPException(507, "it cannot be kept: check the disk of the records") from error
        return {"added": added, "refused": refused[:5]}

    @pages.get("/page-files/trainings/{number}/report", include_in_schema=False)
    def report(number: int) -> Response:
        _who(service, "administer")
        path = jobs.report(number)
        if path is None:
            raise HTTPException(404, "there is no such report")
        # A page of its own, which may do nothing to this one.
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": "sandbox allow-scripts"})

    @pages.get("/page-files/trainings/{number}/unusual/{place}", include_in_schema=False)
    def unusual(number: int, place: int) -> Response:
        _who(service, "administer")
        found = jobs.unusual(number)
        content = thumbnail(Path(found[place].path), 160) if 0 <= place < len(found) else None
        if content is None:
            raise HTTPException(404, "this image is not there")
        return Response(content, media_type="image/jpeg", headers=_PRIVATE)


def _who(service: Service, role: Role) -> Caller:
    found = caller(service)
    if found is None:
        raise HTTPException(401, "sign in first")
    if not found.may(role):
        raise HTTPException(403, "your key may not do this")
    return found


def _sender(service: Service, request: Request, role: Role) -> Caller:
    if request.headers.get("x-flawmap") != "page":  # no form of another site can send it
        raise HTTPException(403, "this is sent by the page alone")
    return _who(service, role)


async def _received(request: Request, file: BinaryIO, limit: int) -> None:
    """Writes what is sent, and refuses more than the limit before it is read."""
    stream: AsyncIterator[bytes] = request.stream()
    taken = 0
    async for chunk in stream:
        taken += len(chunk)
        if taken > limit:
            raise HTTPException(413, f"this is more than {limit / 1e6:.0f} MB: send less")
        file.write(chunk)


def _judged(service: Service, who: Caller, model: str, content: bytes, name: str) -> int:
    try:
        upload = service.upload(content, name)
        answer = service.submit(service.host(model), [upload], owner=who.name, source="page").result()
    except UnknownModelError as error:
        raise HTTPException(404, str(error)) from error
    except QueueFullError as error:
        raise HTTPException(429, str(error)) from error
    except (ClosingError, DatabaseGoneError) as error:
        raise HTTPException(503, str(error)) from error
    except FlawmapError as error:
        raise HTTPException(422, str(error)) from error
    return answer.rows[0].id


def _drawn(service: Service, row: InspectionRow, what: str) -> tuple[bytes | None, str]:
    if what == "picture":
        return service.picture(row), "image/jpeg"
    if what == "thumb":
        return _thumb(service, row), "image/jpeg"
    if what in ("heat", "outlines"):
        return service.layer(row, heat=what == "heat", outlines=what == "outlines"), "image/png"
    return None, ""


def _thumb(service: Service, row: InspectionRow) -> bytes | None:
    pixels = service.pixels(row)
    return None if pixels is None else jpeg_of(pixels, quality=82, side=_THUMB)
