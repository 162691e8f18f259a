"""The benchmark's two steps are the same maths, and its files say what was measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from evaluation import speed
from evaluation.speed import GRID, LCMScript, StepSettings, VariantSettings
from hypersd_ray.diffusion.segments import sample_times
from hypersd_ray.models.roles import STUDENT
from hypersd_ray.training.randomness import generator_of

SETTINGS = StepSettings(batch=6, rank=8)


def distiller_and_script(inputs):
    """Both sides on the same base, with the same random LoRA."""
    config = speed.our_config(SETTINGS, t_end="segment_start", target="student")
    ours = speed.our_distiller(SETTINGS, config, inputs.null)
    script = LCMScript(SETTINGS, speed.make_base(SETTINGS), speed.make_base(SETTINGS))
    generator, theirs = torch.Generator().manual_seed(5), dict(script.student.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.roles.named_tensors(STUDENT).items():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
            theirs[peft_name(name)].copy_(tensor)
    return ours, script, theirs


def peft_name(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def draws(seed: int, batch: int, shape: torch.Size):
    """What `Distiller.step` draws at its first step: times, then noise, then guidance."""
    generator = generator_of(seed, 0, 0, 0, 0)
    times = sample_times(batch, 1000, GRID, 1, "segment_start", generator, "cpu")
    noise = torch.randn(shape, generator=generator)
    low, high = speed.W_RANGE
    return times, noise, low + (high - low) * torch.rand(batch, generator=generator)


def test_both_steps_compute_one_loss_and_one_gradient():
    inputs = speed.make_inputs(SETTINGS)
    ours, script, theirs = distiller_and_script(inputs)
    times, noise, w = draws(ours.config.run.seed, SETTINGS.batch, inputs.batch.x0.shape)
    # The script's solver stops at network index 0, our t = 1, where ours goes on to 0; every other step is the same.
    assert times.t_prev.min() > 0
    index = times.t_n // (1000 // GRID) - 1
    null = inputs.null.prompt_embeds.expand(SETTINGS.batch, -1, -1)
    loss = script.loss(inputs.batch.x0, inputs.batch.cond.prompt_embeds, null, index, noise, w)
    loss.backward()
    gradients = {}
    for name, tensor in ours.roles.named_tensors(STUDENT).items():
        tensor.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    metrics = ours.step(inputs.batch)
    assert loss.item() > 1e-3
    # The script's boundary scaling is not quite a jump to x0: c_skip is at most 0.25 / (39 * 10)^2 = 1.6e-6.
    assert metrics["consistency"].item() == pytest.approx(loss.item(), rel=1e-3)
    for name, gradient in gradients.items():
        expected = theirs[peft_name(name)].grad
        assert (gradient - expected).norm() <= 2e-3 * expected.norm() + 1e-7, name


def test_the_script_moves_its_lora_and_nothing_else():
    inputs = speed.make_inputs(SETTINGS)
    script = LCMScript(SETTINGS, speed.make_base(SETTINGS), speed.make_base(SETTINGS), lr=1e-3)
    before = {name: p.detach().clone() for name, p in script.student.named_parameters()}
    script.step(inputs.batch, inputs.null, torch.Generator().manual_seed(0))
    moved = {name for name, p in script.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert all(p.grad is None for p in script.teacher.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["baseline", "ours"])
def test_a_variant_measures_itself(variant, dtype, monkeypatch):
    monkeypatch.setattr(speed, "WARMUP", 0)
    result = speed.measure(VariantSettings(batch=2, rank=8, steps=1, variant=variant, dtype=dtype))
    assert result["variant"] == variant
    assert len(result["seconds"]) == 1
    parameters = sum(p.numel() for p in speed.make_base(SETTINGS).parameters())
    weights = parameters * (2 if dtype == "bf16" and variant == "ours" else 4) * (2 if variant == "baseline" else 1)
    assert weights < result["peak_bytes"] < weights + 200e6
    assert torch.tensor(result["loss"]).isfinite()


def test_a_variant_in_a_process_of_its_own():
    result = speed.run_variant(StepSettings(batch=1, rank=4, steps=1, threads=1), "ours")
    assert result["variant"] == "ours"
    assert result["peak_bytes"] > 1e6
    assert result["resident_bytes"] > 1e6


def test_a_variant_that_fails_says_its_last_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback ...\nRuntimeError: no such device\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"^ours at --shape tiny --batch 1 failed: RuntimeError: no such device$"):
        speed.run_variant(StepSettings(batch=1), "ours")


def test_command_writes_rounds_and_ratios(monkeypatch, tmp_path, capsys):
    calls = []

    def fake(settings, variant):
        calls.append(variant)
        factor = 0.5 if variant == "ours" else 1.0
        noise = 1 + 0.1 * (len(calls) > 2)
        return {
            "variant": variant,
            "seconds": [factor * noise] * 3,
            "peak_bytes": 4e8 * factor,
            "resident_bytes": 5e8,
            "loss": 0.0,
        }

    monkeypatch.setattr(speed, "run_variant", fake)
    out = tmp_path / "deep" / "speed.json"
    monkeypatch.setattr(sys, "argv", ["speed.py", "step", "--batch", "4", "--repeats", "2", "--out", str(out)])
    speed.main()
    assert calls == ["baseline", "ours", "ours", "baseline"]
    written = json.loads(out.read_text())
    assert written["settings"]["batch"] == 4
    assert written["aims"] == {"seconds": 0.8, "peak_bytes": 0.6}
    assert len(written["rounds"]) == 2
    assert written["seconds"]["ratio"] == pytest.approx(0.5)
    assert written["machine"]["threads"] >= 1
    printed = capsys.readouterr().out
    assert "| step, ms | 1050 | 525 | 0.50 [0.50, 0.50] | 0.8 |" in printed
    assert "| peak memory, MB | 400 | 200 | 0.50 [0.50, 0.50] | 0.6 |" in printed
    assert "| resident, MB | 500 | 500 | 1.00 [1.00, 1.00] |  |" in printed
