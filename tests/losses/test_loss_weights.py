"""The weights over the stages: adversarial up, MSE down, as Sec. 3.1 has it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd_ray.losses.schedule import LossWeights, loss_weights

weight = st.floats(0, 10)


@given(st.integers(1, 8), weight, weight, weight, weight, st.floats(0.1, 5))
def test_monotone_between_the_two_ends(stages, a, b, c, d, shape):
    knobs = {"mse_start": max(a, b), "mse_end": min(a, b), "adv_start": min(c, d), "adv_end": max(c, d), "shape": shape}
    weights = [loss_weights(i, stages, **knobs) for i in range(stages)]
    for earlier, later in zip(weights, weights[1:], strict=False):
        assert later.mse <= earlier.mse + 1e-12 and later.adversarial >= earlier.adversarial - 1e-12
    assert weights[-1] == LossWeights(mse=knobs["mse_end"], adversarial=knobs["adv_end"])
    if stages > 1:
        assert weights[0] == LossWeights(mse=knobs["mse_start"], adversarial=knobs["adv_start"])


def test_values_of_four_stages():
    # k = 8, 4, 2, 1: fractions 0, 1/3, 2/3, 1; squared 0, 1/9, 4/9, 1; mse = 1 - 0.9 f, adversarial = 0.18 f
    weights = [loss_weights(i, 4, mse_start=1.0, mse_end=0.1, adv_start=0.0, adv_end=0.18, shape=2) for i in range(4)]
    assert [w.mse for w in weights] == pytest.approx([1.0, 0.9, 0.6, 0.1])
    assert [w.adversarial for w in weights] == pytest.approx([0.0, 0.02, 0.08, 0.18])


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"mse_start": 0.1, "mse_end": 1.0}, "mse_end=1.0"),
        ({"adv_start": 0.2, "adv_end": 0.1}, "adv_end=0.1"),
        ({"shape": -1}, "shape=-1"),
        ({"mse_end": -0.1}, "mse_end=-0.1"),
        ({"adv_start": -0.1}, "adv_start=-0.1"),
    ],
)
def test_weights_that_go_the_wrong_way_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(1, 4, **knobs)


@pytest.mark.parametrize("stage", [-1, 4])
def test_stages_that_are_not_there(stage):
    with pytest.raises(ValueError, match=f"stage_index={stage}"):
        loss_weights(stage, 4)


def test_a_constant_is_allowed():
    assert loss_weights(2, 4, mse_start=1.0, mse_end=1.0, adv_start=0.0, adv_end=0.0) == LossWeights(1.0, 0.0)


def test_shape_zero_is_the_end_at_once():
    weights = [loss_weights(i, 4, mse_start=1.0, mse_end=0.0, adv_start=0.0, adv_end=1.0, shape=0) for i in range(4)]
    assert weights == [LossWeights(1.0, 0.0), *[LossWeights(0.0, 1.0)] * 3]
    assert loss_weights(0, 1, adv_end=0.3, shape=0).adversarial == 0.3
