"""What our server wrote into a picture's file, as another program reads it."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from serve.pictures import PNG_KEY

USER_COMMENT, EXIF_IFD = 0x9286, 0x8769


def read_parameters(data: bytes) -> dict[str, Any]:
    """The parameters in a PNG's text, or in Exif's UserComment.

    Raises:
        ValueError: there is nothing of ours in it.
    """
    image = Image.open(io.BytesIO(data))
    text = image.info.get(PNG_KEY)
    if text is None:
        comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        text = comment[8:].decode() if comment else ""
    if not text:
        raise ValueError("the image has no generation parameters of ours")
    return json.loads(text)
