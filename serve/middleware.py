"""What is around every route."""

from __future__ import annotations

import logging

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import unforeseen

logger = logging.getLogger("ray.serve")


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
