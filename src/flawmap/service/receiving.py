"""Bodies of requests: read within a bound and within time, and taken apart into images."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

_IDLE = 20.0  # seconds without a byte
IMAGES = 256
"""Images in one request."""


async def read_images(request: Request, most: int) -> list[tuple[bytes, str]]:
    """The images of a request, multipart or one as it is, each with what the sender calls it.

    Raises:
        HTTPException: 413 for more than `most` bytes, 408 where none came for a while, 422 where there is no image,
            400 for a body that was broken off or is no multipart.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise HTTPException(413, f"the request has {declared} bytes, over the limit of {most}: send smaller images")
    body = await _read(request, most)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        if not body:
            raise HTTPException(422, "the request has no image: send its bytes, or a form of files")
        return [(body, request.headers.get("x-image-name", "image"))]
    return await _files(request, body)


async def _read(request: Request, most: int) -> bytes:
    blocks: list[bytes] = []
    size = 0
    stream = request.stream()
    while True:
        try:
            block = await asyncio.wait_for(anext(stream), _IDLE)
        except StopAsyncIteration:
            return b"".join(blocks)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"nothing came for {_IDLE:g} seconds: send it again") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the request was broken off") from error
        size += len(block)
        if size > most:
            raise HTTPException(413, f"the request has more than {most} bytes: send smaller images")
        blocks.append(block)


async def _files(request: Request, body: bytes) -> list[tuple[bytes, str]]:
    async def once() -> Any:
        yield body

    try:
        form = await MultiPartParser(
            request.headers, once(), max_files=IMAGES, max_fields=IMAGES, max_part_size=len(body) + 1
        ).parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        told = getattr(error, "message", None) or "it has no boundary, or is broken off"
        raise HTTPException(400, f"the form cannot be read: {told}") from error
    try:
        images = [
            (await part.read(), part.filename or "image")
            for _, part in form.multi_items()
            if isinstance(part, UploadFile)
        ]
    finally:
        await form.close()
    if not images:
        raise HTTPException(422, "the form has no files: send each image as a file of it")
    return images
