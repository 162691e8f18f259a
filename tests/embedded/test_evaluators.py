"""The embedded evaluators' trainings: a few steps, resuming, and what they are taught."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.embedded import paths, pretrain_aesthetic, pretrain_clip, pretrain_preference, pretrain_solo
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.preferences import Preferences
from hypersd_ray.embedded.spoiling import Spoiler, quality, spoil_all
from hypersd_ray.embedded.training import Cycles, train
from hypersd_ray.models.evaluators import load_evaluator
from hypersd_ray.models.rewards.registry import load_reward
from hypersd_ray.recipes.feedback import embedded_rewards


@pytest.fixture(scope="module")
def held_out():
    images, captions = load_pictures(paths.DATA, "val")
    return images[:32], captions[:32]


def line(out, steps, stop=None):
    """Fit y = 2x; `stop` raises in the middle."""
    torch.manual_seed(0)
    module = nn.Linear(1, 1)
    count = 0

    def loss(generator):
        nonlocal count
        count += 1
        if stop is not None and count > stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 1, generator=generator)
        weights = F.dropout(torch.ones_like(x), 0.2)  # from the global generator, as a head's dropout
        return (weights * (module(x) - 2 * x).square()).mean()

    return train("line", module, loss, steps, 0.05, out)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight = line(tmp_path / "a", 200)
    with pytest.raises(KeyboardInterrupt):
        line(tmp_path / "b", 200, stop=130)
    resumed = line(tmp_path / "b", 200)
    assert torch.equal(straight.weight, resumed.weight)
    assert straight.weight.item() == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match=r"of cycles of \[200\] steps, these have \[300\]; use another --out"):
        line(tmp_path / "b", 300)


def test_a_cycle_that_is_added_later_is_as_one_that_was_planned(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight = line(tmp_path / "a", (120, 130))
    line(tmp_path / "b", 120)
    with pytest.raises(KeyboardInterrupt):
        line(tmp_path / "b", (120, 130), stop=110)
    assert torch.equal(straight.weight, line(tmp_path / "b", (120, 130)).weight)


def test_each_cycle_rises_to_the_peak_and_falls():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    cycles, rates = Cycles(optimizer, (20, 40), 0.1), []
    for _ in range(60):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycles.step()
    peaks = [i for i in range(1, 59) if rates[i - 1] < rates[i] > rates[i + 1]]
    assert peaks == [1, 23] and rates[1] == pytest.approx(0.1) == pytest.approx(rates[23])
    assert rates[19] < 1e-5 > rates[59] and rates[20] == pytest.approx(0.004)


def test_contrastive_loss_in_numbers():
    """Orthogonal pairs at scale 2: log(1 + e^-2); the same caption twice shares its target: log 2."""
    eye, scale = torch.eye(2), torch.tensor(2.0)
    loss = pretrain_clip.contrastive_loss(eye, eye, torch.tensor([[1, 2], [1, 3]]), scale)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = pretrain_clip.contrastive_loss(same, same, torch.tensor([[1, 2], [1, 2]]), scale)
    assert loss.item() == pytest.approx(math.log(2))


def test_quality_is_10_for_the_picture_itself():
    x = torch.full((3, 3, 4, 4), 0.5)
    spoilt = x + torch.tensor([0.0, 0.125, 0.5]).view(-1, 1, 1, 1)
    assert quality(spoilt, x).tolist() == pytest.approx([10.0, 5.5, 1.0])


def test_spoiling_spoils_most_but_not_all(held_out):
    clean = held_out[0].float() / 255
    spoil = Spoiler(paths.TEACHER)
    spoilt = spoil(clean, held_out[1], torch.Generator().manual_seed(0))
    marks = quality(spoilt, clean)
    assert spoilt.min() >= 0 and spoilt.max() <= 1
    assert (marks == 10).any() and (marks < 8).any() and marks.std() > 0.5
    again = spoil(clean, held_out[1], torch.Generator().manual_seed(0))
    assert torch.equal(spoilt, again)


def test_spoilt_pictures_are_called_bad():
    images, captions = load_pictures(paths.DATA, "val")
    images, captions = images[:48], captions[:48]
    more, told = pretrain_clip.with_spoilt(images, captions, paths.TEACHER, 32)
    assert more.dtype == torch.uint8 and torch.equal(more[:48], images) and told[:48] == captions
    assert len(more) == len(told) == 80
    for picture, clean, said, caption in zip(more[48:], images, told[48:], captions, strict=False):
        mark = float(quality(picture[None].float() / 255, clean[None].float() / 255))
        if abs(mark - 5.5) > 0.1:  # rounded to bytes meanwhile
            assert said == ("bad " if mark < 5.5 else "") + caption
    assert 0 < sum(t.startswith("bad ") for t in told) < 32


@pytest.fixture(scope="module")
def bank(held_out):
    return spoil_all(*held_out, paths.TEACHER, 2)


def test_a_bank_has_the_pictures_and_spoilt_ones_with_their_marks(held_out, bank):
    assert bank.pictures.shape == (3, 32, 3, 32, 32) and torch.equal(bank.pictures[0], held_out[0])
    assert (bank.marks[0] == 10).all() and bank.marks[1:].min() < 6 and not torch.equal(bank.marks[1], bank.marks[2])
    version, index = torch.tensor([0, 2]), torch.tensor([5, 7])
    taken = bank.take(version, index)
    clean = bank.pictures[0][index].float() / 255
    assert quality(taken, clean).tolist() == pytest.approx(bank.marks[version, index].tolist(), abs=0.1)


def test_the_trainings_make_models_of_the_published_classes(held_out, bank, tmp_path):
    """Twelve steps each; what they write is loaded by the same loaders as the published checkpoints."""
    images, captions = held_out
    more, told = pretrain_clip.with_spoilt(images, captions, paths.TEACHER, 16)
    tower = pretrain_clip.train_clip(more, told, paths.TEACHER, tmp_path, tmp_path / "clip", 12, batch=16, spoilt=16)
    found = pretrain_clip.retrieval(tower, images, captions)
    assert found["right"] > found["wrong"]
    model = pretrain_aesthetic.train_aesthetic(
        bank, paths.TEACHER, tmp_path, tmp_path / "large", tmp_path / "aesthetic.safetensors", 12, batch=16
    )
    assert set(pretrain_aesthetic.rating_error(model, bank)) == {"correlation", "rmse"}
    preferences = Preferences(bank)
    pretrain_preference.train_image_reward(preferences, paths.TEACHER, tmp_path, tmp_path / "image_reward", 12, batch=8)
    pretrain_preference.train_hps(preferences, tmp_path / "clip", tmp_path, tmp_path / "hps", 12, batch=8)
    targets = pretrain_solo.read_annotations(paths.DATA, "val", 640)[:32]
    pretrain_solo.train_solo(images, targets, 20, tmp_path, tmp_path / "solo", 12, batch=8)
    x = (images[:2].float() / 255).requires_grad_(True)
    for config, told in (
        (RewardConfig(name="clip_score", checkpoint=str(tmp_path / "clip")), captions[:2]),
        (RewardConfig(name="aesthetic_v2", checkpoint=str(tmp_path / "aesthetic.safetensors"),
                      tower=str(tmp_path / "large")), captions[:2]),
        (RewardConfig(name="image_reward", checkpoint=str(tmp_path / "image_reward")), captions[:2]),
        (RewardConfig(name="hps_v21", checkpoint=str(tmp_path / "hps")), captions[:2]),
        (PerceptionConfig(checkpoint=str(tmp_path / "solo")), targets[:2]),
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(load_evaluator(config)(x, told).sum(), x)
        assert torch.isfinite(gradient).all() and (gradient.abs().amax((1, 2, 3)) > 0).all()
    sizes = [p.stat().st_size for p in tmp_path.rglob("*.safetensors")]
    assert len(sizes) == 6 and max(sizes) < 6_000_000


def test_the_embedded_judges_know_what_the_oracle_does():
    """On 64 held-out pictures, spoilt anew; the committed report is of all 640."""
    images, captions = load_pictures(paths.DATA, "val")
    bank = spoil_all(images[-64:], captions[-64:], paths.TEACHER, 2, seed=5)
    aesthetic, image_reward, _, hps = (load_reward(config) for config in embedded_rewards())
    assert pretrain_aesthetic.rating_error(aesthetic, bank)["correlation"] > 0.85
    preferences = Preferences(bank)
    for judge in (image_reward, hps):
        assert pretrain_preference.agreement(judge, preferences, 256)["accuracy"] > 0.78


def test_annotations_and_pictures_must_be_of_one_build():
    with pytest.raises(ValueError, match=r"5 pictures in val-\*.tar, 640 annotated"):
        pretrain_solo.read_annotations(paths.DATA, "val", 5)
