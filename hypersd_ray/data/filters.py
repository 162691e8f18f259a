"""Which image-text pairs are worth training on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from hypersd_ray.config.data import FilterConfig

# One score has many names: LAION-400M/5B, LAION-Aesthetics, COYO-700M.
AESTHETIC = ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2")
WATERMARK = ("pwatermark", "watermark_score")
NSFW = ("punsafe", "nsfw_score", "nsfw_score_opennsfw2", "nsfw_score_gantman")
SIMILARITY = ("similarity", "SIMILARITY", "clip_similarity_vitb32", "clip_similarity_vitl14")


def why_rejected(metadata: Mapping[str, Any], image: Image.Image, config: FilterConfig) -> str | None:
    """The first filter that the row fails, or None. The image is decoded only if sharpness is asked for.

    Reasons: too_small, low_aesthetic, watermark, nsfw, low_similarity, blurry, and missing_aesthetic, ... when
    `config.missing` is "reject". Raises what PIL raises on a broken image when sharpness is asked for.
    """
    if config.min_side is not None and min(image.size) < config.min_side:
        return "too_small"
    bounds = (
        ("aesthetic", AESTHETIC, config.min_aesthetic, None, "low_aesthetic"),
        ("watermark", WATERMARK, None, config.max_watermark, "watermark"),
        ("nsfw", NSFW, None, config.max_nsfw, "nsfw"),
        ("similarity", SIMILARITY, config.min_similarity, None, "low_similarity"),
    )
    for name, aliases, low, high, reason in bounds:
        if low is None and high is None:
            continue
        score = _score(metadata, aliases)
        if score is None:
            if config.missing == "reject":
                return f"missing_{name}"
        elif (low is not None and score < low) or (high is not None and score > high):
            return reason
    if config.min_sharpness is not None and sharpness(image) < config.min_sharpness:
        return "blurry"
    return None


def sharpness(image: Image.Image) -> float:
    """Variance of the grey image's Laplacian (4 neighbours, values 0..255); 0 when a side is below 3 pixels."""
    g = np.asarray(image.convert("L"), dtype=np.float32)
    if min(g.shape) < 3:
        return 0.0
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(laplacian.var())


def _score(metadata: Mapping[str, Any], aliases: tuple[str, ...]) -> float | None:
    """The first alias that holds a finite number (LAION-400M's NSFW is a word: no score)."""
    for name in aliases:
        try:
            value = float(metadata[name])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            return value
    return None
