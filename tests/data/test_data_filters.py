"""Filters and crops as pure functions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hypersd_ray.config.data import DataConfig, FilterConfig
from hypersd_ray.data.filters import sharpness, why_rejected
from hypersd_ray.data.images import crop_square, open_image

GREY = Image.new("RGB", (20, 10), "grey")


@pytest.mark.parametrize(
    ("filters", "metadata", "reason"),
    [
        ({}, {}, None),
        ({"min_side": 11}, {}, "too_small"),
        ({"min_side": 10}, {}, None),
        ({"min_aesthetic": 5}, {"AESTHETIC_SCORE": 4.9}, "low_aesthetic"),
        ({"min_aesthetic": 5}, {"aesthetic_score_laion_v2": 5.0}, None),
        ({"max_watermark": 0.5}, {"watermark_score": "0.6"}, "watermark"),
        ({"max_nsfw": 0.1}, {"nsfw_score_opennsfw2": 0.2}, "nsfw"),
        ({"max_nsfw": 0.1, "missing": "reject"}, {"NSFW": "UNLIKELY"}, "missing_nsfw"),
        ({"min_similarity": 0.3}, {"clip_similarity_vitb32": 0.29}, "low_similarity"),
        ({"min_similarity": 0.3}, {"similarity": float("nan")}, None),
        ({"min_similarity": 0.3, "missing": "reject"}, {"similarity": None}, "missing_similarity"),
        ({"min_sharpness": 1}, {}, "blurry"),
    ],
)
def test_why_rejected(filters, metadata, reason):
    assert why_rejected(metadata, GREY, FilterConfig(**filters)) == reason


def test_sharpness_closed_form():
    # A lone pixel of value v: the Laplacian is -4v there, v at its 4 neighbours, so the mean is 0 and the variance
    # (16 + 4) v^2 / n over the n inner pixels.
    pixels = np.zeros((9, 9), np.uint8)
    pixels[4, 4] = 100
    assert sharpness(Image.fromarray(pixels)) == pytest.approx(20 * 100**2 / 49)
    assert sharpness(Image.new("L", (2, 9))) == 0


@given(width=st.integers(1, 60), height=st.integers(1, 60), resolution=st.integers(8, 32))
def test_crop_is_square_and_lies_inside(width, height, resolution):
    pixels, ids = crop_square(Image.new("RGB", (width, height), "red"), resolution)
    assert pixels.shape == (3, resolution, resolution)
    assert ids.dtype == np.float32
    assert tuple(ids[[0, 1, 4, 5]]) == (height, width, resolution, resolution)
    assert ids[2] == 0 or ids[3] == 0
    assert (pixels.transpose(1, 2, 0) == (255, 0, 0)).all()


def test_time_ids_by_hand():
    # 100 x 50 to a short side of 10: 20 x 10, so 5 columns go on the left.
    _, ids = crop_square(Image.new("RGB", (100, 50)), 10)
    assert ids.tolist() == [50, 100, 0, 5, 10, 10]


def test_centre_pixels_are_kept_exactly_without_resizing():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    got, _ = crop_square(Image.fromarray(pixels), 8)
    np.testing.assert_array_equal(got, pixels[:, 3:11].transpose(2, 0, 1))


def test_transparency_is_white_and_exif_is_turned():
    got, _ = crop_square(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8)
    assert (got == 255).all()
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(data, "JPEG", exif=exif)
    _, ids = crop_square(open_image(data.getvalue()), 8)
    assert ids[:2].tolist() == [16, 8]


def test_configs_refuse_what_cannot_work():
    for bad in ({"shards": ""}, {"shards": "x", "nope": 1}, {"shards": "x", "encoder": {"min_size": 2}}):
        with pytest.raises(ValueError, match=r"shards is empty|Extra inputs|max_size=1 is below min_size=2"):
            DataConfig(**bad)
