"""Single steps against real pictures: the distance in closed form, its interval, and a LoRA against itself."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation import onestep
from evaluation.quality import QualityConfig, Subject
from hypersd_ray.config.base import ConfigError
from hypersd_ray.models.export import save_diffusers_lora
from hypersd_ray.models.lora_file import read_lora
from tests.actors.conftest import clip_folder, models, pictures
from tests.helpers.pipelines import CAPTIONS

__all__ = ["clip_folder", "models", "pictures"]
COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture
def folder(tmp_path):
    """A shard with one-coloured pictures of the first captions; the second comes twice."""
    with tarfile.open(tmp_path / "val-00000.tar", "w") as tar:
        for i, caption in enumerate([*CAPTIONS[:4], CAPTIONS[1]]):
            png = io.BytesIO()
            Image.new("RGB", (40, 32), (COLOURS * 2)[i]).save(png, "PNG")
            for suffix, data in (("png", png.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path


def test_frechet_of_gaussians_that_are_known():
    """Diagonal ones: sum of (m_a - m_b)^2 + (s_a - s_b)^2; and a rotation of both changes nothing."""
    mean, deviation = torch.tensor([1.0, 0.0]).double(), torch.tensor([2.0, 3.0]).double()
    zero, one = torch.zeros(2).double(), torch.eye(2).double()
    assert onestep.frechet(mean, torch.diag(deviation**2), zero, one).item() == pytest.approx(1 + 1 + 4)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = onestep.frechet(turn @ mean, turn @ torch.diag(deviation**2) @ turn.T, zero, one)
    assert turned.item() == pytest.approx(6)


def test_weights_count_rows():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.tensor([[2.0, 0, 1, 0, 2]]).double()
    mean, covariance = onestep.gaussian(features, weights)
    rows = features[[0, 0, 2, 4, 4]]
    torch.testing.assert_close(mean[0], rows.mean(0))
    torch.testing.assert_close(covariance[0], rows.T.cov())


def test_the_interval_is_around_the_distance_and_narrows():
    g = torch.Generator().manual_seed(2)
    real, far = torch.randn(400, 4, generator=g), torch.randn(400, 4, generator=g) + torch.tensor([1.0, 0, 0, 0])
    widths = []
    for n in (50, 400):
        found, draws = onestep.frechet_samples(far[:n], real[:n], 200, seed=0)
        interval = onestep.interval_of(found, draws)
        assert interval.low < interval.mean < interval.high
        widths.append(interval.high - interval.low)
    assert abs(interval.mean - 1000) < 400 and widths[1] < widths[0] / 1.8  # |m|^2 = 1, times 1000
    same, none = onestep.frechet_samples(real, real, 100, seed=0)
    assert same.item() == pytest.approx(0, abs=1e-6) and none.abs().max() < 1e-6


def test_each_prompt_has_its_first_picture(folder):
    found = onestep.real_pictures(folder, CAPTIONS[:4], 16)
    assert found.shape == (4, 3, 16, 16)
    assert found[1, :, 5, 5].tolist() == pytest.approx([0, 128 / 255, 0], abs=1e-6)
    with pytest.raises(ConfigError, match=r"no val-\*.tar has a PNG with the caption"):
        onestep.real_pictures(folder, [*CAPTIONS[:4], "a thing that is not there"], 16)


def named(lora, timesteps: str, folder):
    """A copy of the file that says it was made for these inputs."""
    tensors, metadata = read_lora(lora)
    return save_diffusers_lora(
        tensors, folder / f"t{timesteps[:3]}.safetensors", replace(metadata, extra={"timestep": timesteps})
    )


def test_a_lora_against_itself_and_from_its_own_input(folders, folder, make_lora, models, monkeypatch):
    monkeypatch.setattr(onestep, "read_prompts", lambda sampling: CAPTIONS[:4])
    lora = make_lora(size=0.05)
    copy, dedicated = folder / "copy.safetensors", named(lora, "800", folder)
    copy.write_bytes(lora.read_bytes())
    config = onestep.SingleStepConfig(
        baselines=(lora,), loras=(copy, dedicated), clip=models[1], pictures=folder, resamples=100,
        sampling=QualityConfig(teacher=folders["sd"], steps=(1, 2), batch=3, reference_steps=2),
    )  # fmt: skip
    report = onestep.evaluate(config)
    assert [(row.model, row.steps, row.inputs) for row in report.rows] == [
        ("teacher", 2, ()), ("sd-0.05", 1, ()), ("sd-0.05", 2, ()), ("copy", 1, ()), ("copy", 2, ()), ("t800", 1, (800,)),
    ]  # fmt: skip
    for row in report.rows[3:5]:
        assert row.baseline == "sd-0.05"
        assert all(i.mean == pytest.approx(0, abs=1e-4) for i in row.versus.values())
    other = report.rows[5]
    assert other.frechet.mean != report.rows[1].frechet.mean and other.versus["clip_score"].mean != 0
    assert "| t800 from 800 | 1 |" in onestep.table(report)


def test_both_starts_of_a_single_step_are_ours_and_diffusers(folders, make_lora, tmp_path):
    """From 800 told so by the file, and from any by hand: diffusers' LCM scheduler ends where our own step does."""
    config = QualityConfig(teacher=folders["sd"], steps=(1,), batch=2)
    subject = Subject(config, CAPTIONS[:2])
    lora = make_lora(size=0.05)
    subject.load_lora(lora)
    unified = subject.student(1, "edges")
    assert subject.inputs(1) == () and subject.can(2)
    subject.load_lora(named(lora, "800", tmp_path))
    assert subject.inputs(1) == (800,) and not subject.can(2)
    ours = subject.student(1, "edges")
    assert (ours - unified).square().mean() > 1e-4
    torch.testing.assert_close(subject.student(1, "tcd"), ours, rtol=1e-3, atol=1e-3)
    subject.config = config.model_copy(update={"start": 999})
    torch.testing.assert_close(subject.student(1, "tcd"), unified, rtol=1e-3, atol=1e-3)
    subject.config = config
    subject.load_lora(named(lora, "999, 499", tmp_path))
    assert not subject.can(1) and subject.inputs(2) == (999, 499)
    assert torch.isfinite(subject.student(2, "tcd")).all()


def test_a_whole_unet_samples_as_the_lora_that_it_was_merged_with(folders, make_lora, tmp_path):
    config = QualityConfig(teacher=folders["sd"], steps=(1,), batch=2)
    lora, merging, subject = make_lora(size=0.05), Subject(config, CAPTIONS[:2]), Subject(config, CAPTIONS[:2])
    merging.load_lora(lora)
    merging.pipe.fuse_lora()
    merging.pipe.unload_lora_weights()
    merging.pipe.unet.save_pretrained(tmp_path / "unet")
    subject.load_lora(lora)
    with_lora = subject.student(1, "edges")
    subject.load_unet(tmp_path / "unet")
    assert subject.inputs(1) == () and subject.can(2)
    torch.testing.assert_close(subject.student(1, "edges"), with_lora, rtol=1e-4, atol=1e-4)
    (tmp_path / "unet/sampling.json").write_text('{"scheduler": "LCMScheduler", "timesteps": [800]}')
    subject.load_unet(tmp_path / "unet")
    assert subject.inputs(1) == (800,) and not subject.can(2)
    subject.load_lora(lora)
    torch.testing.assert_close(subject.student(1, "edges"), with_lora)
    with pytest.raises(ValueError, match="does not fit"):
        subject.load_unet(Path(folders["sdxl"]) / "unet")
