"""Mask2Former behind the protocol: a small one of the same class."""

import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from hypersd_ray.config.rewards import PerceptionConfig
from hypersd_ray.models.perception.protocol import Instances, no_instances
from hypersd_ray.models.perception.registry import load_perception


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=3,
        train_num_points=64,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return load_perception(PerceptionConfig(name="mask2former", checkpoint=str(folder)))


def target(label: int) -> Instances:
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 10:40, 20:50] = True
    return Instances(masks, torch.tensor([label]))


def test_loss_is_per_sample_pure_and_differentiable(model):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    targets = [target(0), no_instances(64, 64), target(2)]
    x = images.clone().requires_grad_(True)
    state = torch.random.get_rng_state()
    losses = model.loss(x, targets)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert losses.shape == (3,) and losses[1] == 0 and (losses[[0, 2]] > 0).all()
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any() and torch.isfinite(gradient).all()
    again = model.loss(images[2:], targets[2:])
    torch.testing.assert_close(again[0], losses[2].detach(), rtol=1e-4, atol=1e-4)


def test_predictions(model):
    model.score_threshold = 0.0
    found = model.predict(torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(0)))
    assert len(found) == 2
    for one in found:
        assert one.masks.shape[-2:] == (50, 40)
        assert (one.scores.diff() <= 0).all() and (one.labels < 3).all()
