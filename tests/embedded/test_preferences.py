"""Who prefers what in the embedded world: captions read back, the oracle's pairs, a team's taste."""

import io

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hypersd_ray.embedded import paths
from hypersd_ray.embedded.compose import read_caption
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.preferences import FINES, MARGIN, TOLD_APART, Preferences, magnified, write_taste
from hypersd_ray.embedded.spoiling import Bank

CAPTIONS = [
    "a noto panda on a pink background",
    "a twemoji panda on a pink background",
    "a noto pear on a pink background",
    "a noto panda on an orange and white background",
    "a noto pear and a noto meat on bone on a red background",
]


def test_captions_are_read_back():
    assert read_caption(CAPTIONS[3]) == ("noto", ("panda",), "orange and white")
    assert read_caption(CAPTIONS[4]) == ("noto", ("meat on bone", "pear"), "red")
    with pytest.raises(ValueError, match="'a photo of a cat' is not a caption of the embedded world"):
        read_caption("a photo of a cat")
    _, captions = load_pictures(paths.DATA, "val")
    styles, things, _ = zip(*map(read_caption, captions), strict=True)
    assert set(styles) == {"noto", "twemoji"} and {len(t) for t in things} == {1, 2}


@pytest.fixture
def preferences():
    marks = torch.tensor([[10.0] * 5, [9.0, 2.0, 9.5, 10.0, 5.0]])
    return Preferences(Bank(torch.zeros(2, 5, 3, 4, 4, dtype=torch.uint8), marks, CAPTIONS))


def test_partners_differ_in_one_attribute(preferences):
    assert [sorted(p) for p in preferences.partners] == [[1, 2, 3], [0], [0], [0], []]


def test_a_wrong_attribute_costs_its_fine(preferences):
    zero = torch.zeros(1, dtype=torch.long)
    mark = lambda version, picture: preferences.marks(zero, zero + version, zero + picture).item()
    style, objects, background = FINES
    assert [mark(0, i) for i in range(4)] == [10, 10 - style, 10 - objects, 10 - background]
    assert mark(0, 4) == 10 - objects - background and mark(1, 1) == 2 - style


def test_pairs_are_such_as_the_oracle_can_tell_apart(preferences):
    drawn = preferences.draw(200, torch.Generator().manual_seed(0))
    better = preferences.marks(drawn.prompt, *drawn.chosen.unbind(1))
    worse = preferences.marks(drawn.prompt, *drawn.rejected.unbind(1))
    assert len(drawn.prompt) == 200 and (better >= worse + MARGIN).all()
    own = drawn.chosen[:, 1] == drawn.prompt
    assert 0.5 < own.float().mean() < 1
    again = preferences.draw(200, torch.Generator().manual_seed(0))
    assert torch.equal(again.chosen, drawn.chosen) and torch.equal(again.rejected, drawn.rejected)


def test_magnifying_is_about_the_middle():
    x = torch.zeros(2, 3, 32, 32)
    x[:, :, 12:20, 12:20] = 1
    near, far = magnified(x, torch.tensor([1.5, 0.75])).mean((1, 2, 3))
    assert near == pytest.approx(12 * 12 / 32**2, rel=0.05) and far == pytest.approx(6 * 6 / 32**2, rel=0.05)
    assert torch.allclose(magnified(x, torch.ones(2)), x, atol=1e-5)


def test_a_taste_is_for_what_is_larger(tmp_path):
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 12:20, 12:20] = 255
    count = write_taste(images, [f"c{i}" for i in range(40)], tmp_path / "pairs.parquet")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert 20 < count == len(rows) < 40
    size = lambda data: sum(Image.open(io.BytesIO(data)).convert("L").tobytes()) ** 0.5
    assert all(size(row["chosen"]) > (TOLD_APART - 0.03) * size(row["rejected"]) for row in rows)
