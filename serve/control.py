"""The ControlNet's input image: from a field of a request to pixels."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from serve.errors import bad_field

MAX_PIXELS = 4096 * 4096
"""A larger image is refused before it is unpacked."""


def read_control(
    image: str | None, name: str | None, scale: float | None, known: tuple[str, ...], width: int, height: int
) -> tuple[str | None, np.ndarray | None]:
    """The ControlNet's name and its input (height, width, 3) uint8; (None, None) for a request without.

    Raises:
        ApiError: 400, naming the field.
    """
    given = [
        field
        for field, value in (("control_image", image), ("control", name), ("control_scale", scale))
        if value is not None
    ]
    if not given:
        return None, None
    if not known:
        raise bad_field(
            given[0], "not supported: no ControlNet is configured (model.controlnets)", "unsupported_parameter"
        )
    if image is None:
        raise bad_field(given[0], "needs control_image")
    if name is None:
        if len(known) > 1:
            raise bad_field("control", f"say which: {', '.join(known)}")
        name = known[0]
    if name not in known:
        raise bad_field("control", f"{name[:64]!r} is not one of {', '.join(known)}")
    return name, _pixels(image, width, height)


def _pixels(image: str, width: int, height: int) -> np.ndarray:
    if image.startswith("data:"):
        image = image.partition(",")[2]
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=("PNG", "JPEG", "WEBP"))
        if opened.width * opened.height > MAX_PIXELS:
            raise bad_field("control_image", f"{opened.width}x{opened.height} is above {MAX_PIXELS} pixels")
        resized = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except binascii.Error as error:
        raise bad_field("control_image", f"not base64: {error}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise bad_field("control_image", f"not a PNG, JPEG or WebP image: {str(error)[:80]}") from None
    return np.asarray(resized)
