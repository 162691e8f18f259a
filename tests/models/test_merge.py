"""Merging LoRAs: the sum of the updates, exactly and in fewer dimensions."""

import pytest
import torch

from hypersd_ray.models.export import merge_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.merge import Part, compress_lora, concatenate_loras
from tests.helpers.pipelines import call, random_inputs, randomize, tiny_unet


def lora(rank, alpha, seed):
    """A random LoRA of the tiny SD UNet."""
    adapters = Adapters(tiny_unet("sd"), rank, alpha)
    adapters.add("student", trainable=False)
    return randomize(adapters, "student", seed=seed, size=0.05)


def delta(tensors, alpha, module):
    a, b = (tensors[f"{module}.lora_{x}.weight"].double().flatten(1) for x in "AB")
    return alpha / len(a) * b @ a


def modules(tensors):
    return [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]


@pytest.fixture(scope="module")
def parts():
    return [Part(lora(4, 8.0, 0), 8.0, 1.0, "tscd"), Part(lora(6, 3.0, 1), 3.0, -0.7, "feedback")]


def test_concatenation_is_the_exact_sum(parts):
    merged = concatenate_loras(parts)
    assert merged.rank == 10 and merged.alpha == 10 and merged.worst[1] == 0
    for module in modules(merged.tensors):
        expected = sum(p.weight * delta(p.tensors, p.alpha, module) for p in parts)
        torch.testing.assert_close(delta(merged.tensors, 10, module), expected, rtol=1e-5, atol=1e-7)


def test_the_merged_lora_acts_as_both(parts):
    """One after another merged into a UNet, or their concatenation: the same pictures."""
    inputs = random_inputs("sd")
    both, one = tiny_unet("sd"), tiny_unet("sd")
    for part in parts:
        merge_lora(both, part.tensors, part.alpha * part.weight)
    merged = concatenate_loras(parts)
    merge_lora(one, merged.tensors, merged.alpha)
    with torch.no_grad():
        bare, expected, ours = (call(u, *inputs) for u in (tiny_unet("sd"), both, one))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert (expected - bare).abs().max() > 0.05


def test_a_module_that_one_lacks_is_zeros_there(parts):
    first = modules(parts[0].tensors)[0]
    without = {k: v for k, v in parts[0].tensors.items() if not k.startswith(f"{first}.")}
    merged = concatenate_loras([Part(without, 8.0), parts[1]])
    torch.testing.assert_close(
        delta(merged.tensors, 10, first), -0.7 * delta(parts[1].tensors, 3.0, first), rtol=1e-5, atol=1e-7
    )


def test_compression_is_the_best_of_its_rank(parts):
    """The error is what numpy's SVD of the full update leaves, and what the result really misses."""
    merged = concatenate_loras(parts)
    small = compress_lora(merged.tensors, merged.alpha, 6)
    assert small.rank == 6 and small.alpha == 6
    for module in modules(merged.tensors)[::7]:
        exact, ours = delta(merged.tensors, 10, module), delta(small.tensors, 6, module)
        s = torch.linalg.svdvals(exact)
        best = (s[6:].square().sum() / s.square().sum()).sqrt()
        assert small.errors[module] == pytest.approx(best.item(), rel=1e-6)
        assert ((exact - ours).norm() / exact.norm()).item() == pytest.approx(best.item(), rel=1e-3)
    assert 0.05 < small.worst[1] < 1
    assert {k: v.ndim for k, v in small.tensors.items()} == {k: v.ndim for k, v in merged.tensors.items()}


def test_compression_to_the_true_rank_loses_nothing(parts):
    """A LoRA merged with itself has twice the rank and half of it is empty."""
    part = parts[0]
    twice = concatenate_loras([part, part])
    small = compress_lora(twice.tensors, twice.alpha, 4)
    assert small.worst[1] < 1e-6
    module = modules(part.tensors)[3]
    torch.testing.assert_close(
        delta(small.tensors, 4, module), 2 * delta(part.tensors, 8.0, module), rtol=1e-4, atol=1e-6
    )


def test_what_cannot_be_merged(parts):
    with pytest.raises(ValueError, match="nothing to merge"):
        concatenate_loras([])
    with pytest.raises(ValueError, match=r"rank=11 must be within 1..10"):
        compress_lora(concatenate_loras(parts).tensors, 10.0, 11)
    name = f"{modules(parts[0].tensors)[0]}.lora_B.weight"
    other = dict(parts[1].tensors)
    other[name] = torch.cat([other[name], other[name]])
    with pytest.raises(ValueError, match="are they of the same base model"):
        concatenate_loras([parts[0], Part(other, 3.0, 1.0, "other")])
