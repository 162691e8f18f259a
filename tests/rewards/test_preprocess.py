"""The tensor form against PIL, and against the references' own transforms."""

import open_clip
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from hypersd_ray.models.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def photos(pictures):
    """(3, 3, 256, 384): real edges and smooth shades at a usual size, on the grid of bytes."""
    big = torch.nn.functional.interpolate(pictures[:3], size=(256, 384), mode="bilinear")
    return (big * 255).round() / 255


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [224, 64, 300])
def test_tensor_form_is_pils_to_one_grey_level(photos, fit, size):
    preprocess = Preprocess(size, fit)
    ours = preprocess.place(photos)
    theirs = torch.stack([preprocess.pil(to_pil(p)) for p in photos])
    assert ours.shape == (3, 3, size, size)
    # PIL rounds to bytes between its two passes and after them
    difference = ((ours * 255).round() - (theirs * 255).round()).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.2


def test_without_antialias_it_would_be_far_off(photos):
    """Why `antialias=True` stands there."""
    plain = torch.nn.functional.interpolate(photos[..., 64:320], size=(64, 64), mode="bicubic")
    theirs = torch.stack([Preprocess(64).pil(to_pil(p[..., 64:320])) for p in photos])
    assert (plain - theirs).abs().max() * 255 > 5


@pytest.mark.parametrize("shape", [(48, 32), (33, 71), (300, 224)])
def test_crop_is_the_references_transform(pictures, shape):
    image = to_pil(torch.nn.functional.interpolate(pictures[:1], size=shape, mode="bilinear")[0])
    reference = T.Compose(
        [
            T.Resize(32, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(32),
            T.ToTensor(),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    preprocess = Preprocess(32)
    torch.testing.assert_close(preprocess.normalise(preprocess.pil(image)[None])[0], reference(image))


@pytest.mark.parametrize("shape", [(48, 31), (33, 72)])
def test_pad_is_open_clips_resize_of_the_longest_side(pictures, shape):
    image = to_pil(torch.nn.functional.interpolate(pictures[:1], size=shape, mode="bilinear")[0])
    reference = open_clip.transform.image_transform(
        32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode="longest", fill_color=0
    )
    preprocess = Preprocess(32, "pad")
    torch.testing.assert_close(preprocess.normalise(preprocess.pil(image)[None])[0], reference(image))


def test_the_gradient_reaches_every_pixel_that_is_kept(photos):
    x = photos[:1].clone().requires_grad_(True)
    # a random projection: a plain sum of normalised pixels has one constant gradient
    (Preprocess(64)(x) * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).sum().backward()
    kept = x.grad[..., 80:304]
    assert torch.isfinite(x.grad).all()
    assert (kept != 0).float().mean() > 0.9
    assert (x.grad[..., :50] == 0).all()  # cropped away
