"""RoleLoRA is PEFT's LoRA, and roles do not touch one another."""

import copy

import pytest
import torch
from peft import LoraConfig

from hypersd_ray.models.lora import LCM_TARGETS, Adapters
from tests.helpers.pipelines import call, random_inputs, randomize, tiny_unet

RANK, ALPHA = 4, 6.0  # unequal, so that a lost alpha shows


def peft_unet(unet, tensors):
    """A copy of `unet` with PEFT's own LoRA layers holding `tensors`; and PEFT's parameters by our names."""
    theirs = copy.deepcopy(unet)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LCM_TARGETS)), "default")
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    assert named.keys() == tensors.keys()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[name])
    return theirs, named


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_outputs_and_gradients_are_those_of_peft(family):
    # In float64, since both sum in different orders: through some hundred layers float32's 6e-8 grows to 1e-5, and how
    # far depends on the CPU. What our layer does in float32 it does in float64; bfloat16 has a test of its own.
    ours = tiny_unet(family).double()
    x_t, t, cond = random_inputs(family)
    x_t, cond = x_t.double(), cond.cast(torch.float64)
    bare = call(ours, x_t, t, cond).detach()
    untouched = copy.deepcopy(ours)
    adapters = Adapters(ours, RANK, ALPHA)
    adapters.add("student", trainable=True)
    tensors = randomize(adapters, "student")
    ours.double()
    theirs, named = peft_unet(untouched, tensors)
    theirs.double()
    with adapters.playing("student"):
        output = call(ours, x_t, t, cond)
    expected = call(theirs, x_t, t, cond)
    assert (expected - bare).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    output.square().mean().backward()
    expected.square().mean().backward()
    for name, p in adapters.named_tensors("student").items():
        difference = (p.grad - named[name].grad).norm() / named[name].grad.norm()
        assert difference < 1e-10, f"{name}: {difference:.1e}"
    assert all(p.grad is None for layer in adapters.layers.values() for p in layer.base.parameters())


def test_bfloat16_path_is_that_of_peft():
    ours = tiny_unet("sd").to(torch.bfloat16)
    x_t, t, cond = random_inputs("sd")
    x_t, cond = x_t.bfloat16(), cond.cast(torch.bfloat16)
    bare = call(ours, x_t, t, cond).detach()
    untouched = copy.deepcopy(ours)
    adapters = Adapters(ours, RANK, ALPHA)
    adapters.add("student", trainable=True)
    tensors = randomize(adapters, "student")
    assert {p.dtype for p in adapters.named_tensors("student").values()} == {torch.float32}
    theirs, _ = peft_unet(untouched, tensors)
    with adapters.playing("student"):
        output = call(ours, x_t, t, cond)
    expected = call(theirs.to(torch.bfloat16), x_t, t, cond)
    assert output.dtype == torch.bfloat16
    # 2^-8 relative at each of some hundred layers; the adapter's own effect is what it is measured against
    effect = (expected - bare).float().square().mean().sqrt()
    assert (output - expected).float().square().mean().sqrt() < 0.05 * effect


def test_a_fresh_role_is_the_base_bit_for_bit():
    unet = tiny_unet("sd")
    x_t, t, cond = random_inputs("sd")
    bare = call(unet, x_t, t, cond)
    adapters = Adapters(unet, RANK, ALPHA)
    adapters.add("student", trainable=True, seed=3)
    assert torch.equal(call(unet, x_t, t, cond), bare)
    with adapters.playing("student"):
        assert torch.equal(call(unet, x_t, t, cond), bare)  # B = 0: W + 0 is W
    assert all(p.abs().max() > 0 for n, p in adapters.named_tensors("student").items() if "lora_A" in n)


def test_first_tensors_are_a_function_of_the_seed_alone():
    drawn = []
    for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(global_seed)
        adapters = Adapters(tiny_unet("sd"), RANK, ALPHA)
        adapters.add("student", trainable=True, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in adapters.named_tensors("student").values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_switching_within_an_open_graph_and_nesting():
    unet = tiny_unet("sd")
    x_t, t, cond = random_inputs("sd")
    adapters = Adapters(unet, RANK, ALPHA)
    adapters.add("student", trainable=True)
    adapters.add("ema", trainable=False)
    randomize(adapters, "student", seed=1)
    randomize(adapters, "ema", seed=2)
    named = adapters.named_tensors("student")

    def gradients(disturb):
        for p in named.values():
            p.grad = None
        with adapters.playing("student"):
            output = call(unet, x_t, t, cond)
            if disturb:
                with adapters.playing(None), torch.no_grad():
                    call(unet, x_t, t, cond)
                assert adapters.switch.role == "student"
                with adapters.playing("ema"):
                    call(unet, x_t, t, cond)
                assert adapters.switch.role == "student"
        if disturb:
            with adapters.playing("ema"):
                output.square().sum().backward()
        else:
            output.square().sum().backward()
        assert adapters.switch.role is None
        return [p.grad.clone() for p in named.values()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))
    assert all(p.grad is None for p in adapters.named_tensors("ema").values())


def test_playing_is_restored_after_an_error_and_refuses_unknown_roles():
    adapters = Adapters(tiny_unet("sd"), RANK, ALPHA)
    adapters.add("student", trainable=True)
    with pytest.raises(KeyError), adapters.playing("student"):
        raise KeyError
    assert adapters.switch.role is None
    with pytest.raises(AssertionError, match="studnet"), adapters.playing("studnet"):
        pass


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"lora\.targets"):
        Adapters(tiny_unet("sd"), RANK, ALPHA, targets=("nothing",))
    adapters = Adapters(tiny_unet("sd"), RANK, ALPHA)
    adapters.add("student", trainable=True)
    tensors = {n: p.detach().clone() for n, p in adapters.named_tensors("student").items()}
    other = Adapters(tiny_unet("sd"), 8, ALPHA)
    other.add("student", trainable=True)
    with pytest.raises(ValueError, match=r"set lora\.rank to 4") as error:
        other.load("student", tensors)
    assert "\n" not in str(error.value)
    first = next(iter(tensors))
    with pytest.raises(ValueError, match="1 missing") as error:
        adapters.load("student", {n: v for n, v in tensors.items() if n != first})
    assert first in str(error.value)
    last = list(tensors)[-1]
    wrong = tensors | {first: torch.ones_like(tensors[first]), last: torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"base model|lora\.rank"):
        adapters.load("student", wrong)
    assert torch.equal(adapters.named_tensors("student")[first], tensors[first])  # nothing was half loaded
