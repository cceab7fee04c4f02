from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax.config import OptimizerConfig, Schedule
from bitnet_jax.training.schedules import learning_rate, quant_strength, weight_decay

FAQ = OptimizerConfig()  # the 700M row of Table 2: 1.5e-3 then 1e-3, 0.1 then 0, 375
STEPS = 100_000


def with_schedule(schedule: Schedule) -> OptimizerConfig:
    return replace(FAQ, schedule=schedule, second_learning_rate=2e-4)


@pytest.mark.parametrize(("update", "printed"), [(375, "1.50e-03"), (49_999, "7.68e-04"), (50_000, "5.17e-04"), (100_000, "3.00e-05")])
def test_two_stage_linear_gives_the_points_of_the_faq(update: int, printed: str) -> None:
    assert f"{float(learning_rate(FAQ, STEPS)(update)):.2e}" == printed


def test_two_stage_linear_follows_the_equation_at_every_kind_of_point() -> None:
    rate = learning_rate(FAQ, STEPS)
    for t in (1, 100, 374, 376, 20_000, 50_001, 80_000):
        peak = 1.5e-3 if t < STEPS / 2 else 1.0e-3
        expected = peak * t / 375 if t < 375 else 3e-5 + (peak - 3e-5) * (1 - (t - 375) / (STEPS - 375))
        assert float(rate(t)) == pytest.approx(expected, rel=1e-5)


def test_weight_decay_of_the_faq_is_off_from_the_middle_on() -> None:
    decay = weight_decay(FAQ, STEPS)
    assert [float(decay(t)) for t in (1, 49_999)] == [pytest.approx(0.1)] * 2
    assert [float(decay(t)) for t in (50_000, STEPS)] == [0.0, 0.0]


def test_weight_decay_of_trilm_is_off_from_two_thirds_on_while_the_rate_drops_at_one_half() -> None:
    trilm = replace(FAQ, weight_decay_switch=2 / 3)
    decay, rate = weight_decay(trilm, 300), learning_rate(replace(trilm, warmup_steps=10), 300)
    assert float(decay(199)) == pytest.approx(0.1)
    assert float(decay(200)) == 0.0
    assert float(rate(149)) - float(rate(150)) > 2 * (float(rate(148)) - float(rate(149)))


def test_two_stage_cosine_falls_abruptly_to_the_second_peak_and_ends_at_the_final_rate() -> None:
    rate = learning_rate(with_schedule(Schedule.TWO_STAGE_COSINE), 10_000)
    assert float(rate(375)) == pytest.approx(1.5e-3, rel=1e-5)
    assert float(rate(4_999)) > 3 * float(rate(5_000))
    assert float(rate(5_000)) == pytest.approx(2e-4, rel=1e-5)
    assert float(rate(7_500)) == pytest.approx((2e-4 + 3e-5) / 2, rel=1e-4)


def test_weight_decay_of_two_stage_cosine_peaks_in_stage_one_and_is_zero_in_stage_two() -> None:
    decay = weight_decay(with_schedule(Schedule.TWO_STAGE_COSINE), 10_000)
    assert float(decay(1)) == pytest.approx(0.1, rel=1e-4)
    assert float(decay(2_500)) == pytest.approx(0.05, rel=1e-4)
    assert [float(decay(t)) for t in (5_000, 10_000)] == [0.0, 0.0]


@pytest.mark.parametrize("schedule", [Schedule.LINEAR, Schedule.COSINE])
def test_single_stage_passes_half_way_between_peak_and_final_rate_in_the_middle(schedule: Schedule) -> None:
    rate = learning_rate(replace(with_schedule(schedule), warmup_steps=0), 1_000)
    assert float(rate(500)) == pytest.approx((1.5e-3 + 3e-5) / 2, rel=1e-4)


def test_cosine_is_flatter_than_linear_at_the_beginning() -> None:
    linear, cosine = (learning_rate(with_schedule(schedule), 10_000)(1_000) for schedule in (Schedule.LINEAR, Schedule.COSINE))
    assert float(cosine) > float(linear)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_schedule_warms_up_from_its_first_update_to_its_peak(schedule: Schedule) -> None:
    rate = learning_rate(with_schedule(schedule), 10_000)
    assert float(rate(1)) == pytest.approx(1.5e-3 / 375, rel=1e-5)
    assert float(rate(375)) == pytest.approx(1.5e-3, rel=1e-5)
    assert float(rate(374)) < float(rate(375))


@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_schedule_without_warm_up_is_finite_and_not_above_its_peak(schedule: Schedule) -> None:
    config = replace(with_schedule(schedule), warmup_steps=0)
    rates = [float(learning_rate(config, 7)(t)) for t in range(1, 8)]
    assert all(0 < rate <= 1.5e-3 + 1e-9 for rate in rates)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_schedule_but_constant_ends_at_the_final_rate(schedule: Schedule) -> None:
    last = float(learning_rate(with_schedule(schedule), 10_000)(10_000))
    assert last == pytest.approx(1.5e-3 if schedule is Schedule.CONSTANT else 3e-5, rel=1e-4)


@pytest.mark.parametrize("schedule", [Schedule.LINEAR, Schedule.COSINE, Schedule.CONSTANT])
def test_single_stage_keeps_its_weight_decay(schedule: Schedule) -> None:
    decay = weight_decay(with_schedule(schedule), 100)
    assert {float(decay(t)) for t in (1, 50, 100)} == {float(jnp.float32(0.1))}


@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedules_trace_to_the_same_float32_numbers(schedule: Schedule) -> None:
    for rate in (learning_rate(with_schedule(schedule), 1_000), weight_decay(with_schedule(schedule), 1_000)):
        for t in (1, 374, 499, 500, 1_000):
            traced = jax.jit(rate)(jnp.int32(t))
            assert traced.dtype == rate(t).dtype == jnp.float32
            assert float(traced) == pytest.approx(float(rate(t)), rel=1e-6, abs=1e-8)


def test_quantisation_is_warmed_up_linearly_and_is_full_from_its_last_step_on() -> None:
    strength = quant_strength(replace(FAQ, quant_warmup_steps=4))
    assert [float(strength(jnp.int32(t))) for t in (1, 2, 3, 4, 5, 1000)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
