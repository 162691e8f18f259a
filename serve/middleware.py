"""What is around every route."""

from __future__ import annotations

import asyncio
import logging

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import unforeseen

logger = logging.getLogger("ray.serve")
UNREAD_BYTES, UNREAD_S = 64 * 2**20, 5.0
"""How much of a body is thrown away before an answer that did not need it, and for how long."""


class Unforeseen:
    """Answers an exception that no route expected with the envelope, and logs it.

    Starlette's own handler for `Exception` raises it again after its answer, which Serve takes for a failed request.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            pass  # nobody is there to be told
        except Exception:
            logger.exception("unforeseen, at %s", scope.get("path"))
            if begun or scope["type"] != "http":
                raise  # half an answer cannot be mended: the connection breaks
            error = unforeseen()
            await JSONResponse(error.envelope(), error.status, error.headers)(scope, receive, send)


class HearsOut:
    """Takes in what is left of a request's body before its answer goes out.

    A refusal (no key, too large) is known before the body has come. A server that answers then closes the connection
    with bytes unread, which resets it, and most clients report a broken pipe instead of the answer.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = scope["type"] == "http" and _has_body(scope)

        async def watched() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal unread
            if unread and message["type"] == "http.response.start":
                try:
                    async with asyncio.timeout(UNREAD_S):
                        size = 0
                        while unread and size < UNREAD_BYTES:
                            size += len((await watched()).get("body", b""))
                except TimeoutError:
                    pass
                unread = False
            await send(message)

        await self.app(scope, watched, answer)


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
