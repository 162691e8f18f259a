"""What goes wrong, in OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


class ErrorBody(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = {},
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers)
        self.body = ErrorBody(message=message, type=error_type(status), param=param, code=code)

    def envelope(self) -> dict[str, Any]:
        """The JSON to send."""
        return ErrorEnvelope(error=self.body).model_dump()


def error_type(status: int) -> str:
    """OpenAI's name of the kind of error."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def bad_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 for one field."""
    return ApiError(400, f"{param}: {message}", param, code)


def busy(retry_after: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        f"the queue is full; try again in {retry_after} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def lost(retry_after: int) -> ApiError:
    """503: the replica that had the request is gone."""
    return ApiError(
        503,
        "the replica that worked on this request was lost; the same request can be sent again",
        code="replica_lost",
        headers={"Retry-After": str(retry_after)},
    )


NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's client tries again after every 5xx that does not say this."""


def too_late(seconds: float) -> ApiError:
    """504: longer than a request may take. The same request would take as long again."""
    return ApiError(
        504,
        f"not done within {seconds:g} s (limits.seconds); ask for fewer images or steps",
        code="timeout",
        headers=NO_RETRY,
    )


def failed(what: str) -> ApiError:
    """500: the model or the checker raised, and would again."""
    message = f"the {what.replace('_', ' ')} failed; the server's log has the reason, under this answer's x-request-id"
    return ApiError(500, message, code=f"{what}_failed", headers=NO_RETRY)


def unforeseen() -> ApiError:
    """500: a fault of the application's own."""
    return ApiError(
        500,
        "something went wrong here; the server's log has the reason, under this answer's x-request-id",
        code="internal",
    )


def from_validation(error: ValidationError, known_elsewhere: Mapping[str, str]) -> ApiError:
    """Pydantic's first complaint, with the field's name.

    `known_elsewhere`: fields of OpenAI's API that this server has not, and why.
    """
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "extra_forbidden":
        why = known_elsewhere.get(param, "there is no such field")
        return bad_field(param, f"not supported: {why}", "unsupported_parameter")
    if first["type"] == "missing":
        return bad_field(param, "required", "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    given = repr(first.get("input"))
    return bad_field(param, f"{message} (given: {given[:60]}{'...' if len(given) > 60 else ''})")
