"""Who may ask: an API key from the environment, compared by its digest in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence

from hypersd_ray.config.base import ConfigError
from serve.errors import ApiError
from serve.settings import IngressSettings


def digest(key: str) -> bytes:
    """What is kept of a key: deployments' arguments can be read in the cluster's state."""
    return hashlib.sha256(key.encode()).digest()


def key_digests(settings: IngressSettings) -> tuple[bytes, ...]:
    """Digests of the keys in the environment.

    Raises:
        ConfigError: a key is required and there is none.
    """
    keys = [key.strip() for key in os.environ.get(settings.api_key_env, "").split(",") if key.strip()]
    if settings.require_api_key and not keys:
        raise ConfigError(
            f"ingress.require_api_key: the environment variable {settings.api_key_env} is empty or not set"
        )
    return tuple(digest(key) for key in keys)


def check_key(authorization: str | None, digests: Sequence[bytes]) -> None:
    """Raises ApiError 401 unless the header is `Bearer KEY` with a known key, or there are no keys."""
    if not digests:
        return
    scheme, _, key = (authorization or "").partition(" ")
    given = digest(key.strip())
    # no early exit: the time must not tell which key was near
    known = sum(hmac.compare_digest(given, one) for one in digests)
    if scheme.lower() != "bearer" or not known:
        raise ApiError(
            401,
            "wrong API key" if authorization else "an API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
