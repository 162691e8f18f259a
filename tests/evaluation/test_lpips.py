"""LPIPS between seeds: the published formula on a random AlexNet, what is kept and not measured again, and mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision

from evaluation.harness.lpips import file_of, load_lpips, pairs_of
from evaluation.harness.plan import plan
from evaluation.harness.prompts import read_rows
from evaluation.harness.run import evaluate
from evaluation.harness.store import Store, shard_name, shards_of
from evaluation.harness.subjects import find_subject
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """torchvision's network with random weights, as its file: features, and a classifier that LPIPS does not use."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    features = {name: t for name, t in network.state_dict().items() if name.startswith("features.")}
    torch.save(features | {"classifier.6.bias": torch.zeros(1000)}, path)
    return network, path


def test_it_is_the_published_formula(alexnet):
    """Zhang et al. 2018, Eq. 1: over layers, the mean over positions of w (unit features' difference)^2."""
    network, path = alexnet
    ours = load_lpips(path)
    a, b = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    def layers(x):
        x, found = (x - shift) / scale, []
        for i, layer in enumerate(network.features):
            x = layer(x)
            if i in (1, 4, 7, 9, 11):  # the ReLUs
                found.append(F.normalize(x, dim=1, eps=1e-10))
        return found

    with torch.no_grad():
        expected = sum(
            (lin.model[-1](((p - q) ** 2))).mean((1, 2, 3))
            for p, q, lin in zip(layers(a), layers(b), ours.lins, strict=True)
        )
        torch.testing.assert_close(ours(a, b).flatten(), expected, rtol=1e-4, atol=1e-6)
        assert ours(a, a).abs().max() == 0 < ours(a, b).min()


@pytest.fixture
def config(folders, prompts_file, alexnet, tmp_path):
    return EvaluateConfig(
        base=str(folders["sd"]), prompts="file", prompts_file=str(prompts_file), steps=(1, 2), reference_steps=0,
        judges=JudgesConfig(lpips=str(alexnet[1])), per_shard=4, latency_repeats=0, where="local", images_per_prompt=3,
        out=str(tmp_path / "out"), generators=ActorPool(batch_size=3), resamples=200,
    )  # fmt: skip


def test_a_column_of_it_and_what_is_there_stays(config, alexnet, make_lora, monkeypatch):
    rows = read_rows(config)
    what = plan(config, rows, [find_subject(f"lora={make_lora()}", config)])
    [one, _] = evaluate(what)["rows"]
    cells = what.groups["lora", 1]
    assert len(cells) == 3 and list(map(len, pairs_of(cells).values())) == [3]
    store, network = Store(config.out), load_lpips(alexnet[1])
    pictures = [torch.from_numpy(store.read_pictures(c.key, rows[:4])).float() / 127.5 - 1 for c in cells]
    expected = sum(network(pictures[i], pictures[j]).flatten() for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    values, _ = store.read_values(cells[0].key, rows[:4], file_of(what.between, cells))
    torch.testing.assert_close(torch.from_numpy(values), expected)
    parts = [store.read_values(cells[0].key, p, file_of(what.between, cells))[0] for p in shards_of(rows, 4)]
    mean = sum(part.sum() for part in parts) / len(rows)
    assert one["measures"]["lpips"]["mean"] == pytest.approx(float(mean)) and one["cases"]["lpips"]["best"]

    gone = f"{shard_name(rows[:4])}.{file_of(what.between, cells)}.npz"
    store.fs.rm(f"{store.folder(cells[0].key)}/{gone}")
    asked = []
    monkeypatch.setattr(
        Store, "read_pictures", lambda self, *a, read=Store.read_pictures: asked.append(a) or read(self, *a)
    )
    [again, _] = evaluate(plan(config, rows, [find_subject(f"lora={make_lora()}", config)]))["rows"]
    assert again["measures"] == one["measures"] and [key for key, _ in asked] == [c.key for c in cells]


def test_mistakes_are_one_line(config, tmp_path):
    single = config.model_copy(update={"images_per_prompt": 1})
    with pytest.raises(ConfigError, match=r"--judges\.lpips compares pictures of one prompt: --images-per-prompt 2"):
        plan(single, [], [])
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not fit .* 9 missing \(features\.0\.bias"):
        load_lpips(tmp_path / "other.pth")
    missing = config.judges.model_copy(update={"lpips": str(tmp_path / "none.pth")})
    with pytest.raises(ConfigError, match=r"--judges\.lpips: .*none\.pth does not exist"):
        plan(config.model_copy(update={"judges": missing}), [], [])
