"""The configuration: ranges, schedules, round trip."""

import pytest

from balora import BALoraConfig
from balora.config import rank_of


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("temperature", 0, ValueError),
        ("temperature", -1.0, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", "2", TypeError),
        ("lambda_consistency", -0.1, ValueError),
        ("lambda_svd", float("inf"), ValueError),
        ("lambda_diversity", True, TypeError),
        ("entropy_top_k", 0, ValueError),
        ("entropy_top_k", 2.0, TypeError),
        ("svd_rank", -3, ValueError),
        ("svd_rank", True, TypeError),
        ("svd_norm", "l1", ValueError),
        ("svd_rank", 1.5, ValueError),
        ("svd_rank", 0.0, ValueError),
        ("svd_rank", "3", TypeError),
        ("svd_variance", float("nan"), ValueError),
        ("svd_variance", -1.0, ValueError),
        ("consistency", "mse", ValueError),
        ("diversity", "all", ValueError),
        ("task", "vision", ValueError),
        ("consistency_schedule", "linear", ValueError),
        ("focus_schedule", "cosine", ValueError),
        ("focus_warmup", 1.5, ValueError),
        ("focus_ramp", -0.1, ValueError),
    ],
)
def test_a_bad_field_is_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: .*{value!r}"):
        BALoraConfig(**{field: value})


def test_round_trip_and_unknown_fields():
    config = BALoraConfig(lambda_svd=0.5, svd_rank=3)
    assert BALoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no field 'lamda_svd'; its fields: task, lambda_consistency"):
        BALoraConfig.from_dict({"lamda_svd": 1})


def test_the_defaults_are_the_published_preset():
    config = BALoraConfig.preset("nlg_2025")
    assert config == BALoraConfig()
    assert (config.lambda_consistency, config.lambda_diversity, config.lambda_svd) == (0.025, 0.005, 0.005)
    assert (config.temperature, config.entropy_top_k, config.svd_rank) == (2.0, 20, 10)
    with pytest.raises(ValueError, match="preset: expected 'nlg_2025' or 'nlu_2025' or .*, found 'nlg_1999'"):
        BALoraConfig.preset("nlg_1999")


def test_the_other_presets():
    weights = lambda c: (c.lambda_consistency, c.lambda_diversity, c.lambda_svd)  # noqa: E731
    losses = lambda c: (c.task, c.consistency, c.diversity, c.svd_norm, c.svd_rank, c.svd_variance)  # noqa: E731
    nlu, nlg_2024, nlu_2024 = (BALoraConfig.preset(n) for n in ("nlu_2025", "nlg_2024", "nlu_2024"))
    assert weights(nlu) == weights(nlu_2024) == (1e-4, 4e-4, 1e-4)
    assert weights(nlg_2024) == (1e-4, 3e-4, 1e-4)
    assert losses(nlu) == ("nlu", "kl", "covariance", "nuclear", 0.3, 0.0)
    assert losses(nlu_2024) == ("nlu", "normalized_mse", "covariance", "nuclear", 0.3, 0.0)
    assert losses(nlg_2024) == ("nlg", "kl", "full", "nuclear", 0.3, 0.0)
    assert (nlu.temperature, nlg_2024.temperature) == (2.0, 1.0)
    for config in (nlu, nlg_2024, nlu_2024):
        assert config.lambdas(0, 10) == config.lambdas(9, 10) == weights(config)
        assert BALoraConfig.from_dict(config.to_dict()) == config


def test_a_rank_is_a_number_of_singular_values_or_a_fraction_of_them():
    assert [rank_of(k, 10) for k in (1, 10, 11, 0.3, 0.31, 1.0, 1e-9)] == [1, 10, 10, 3, 4, 10, 1]
    assert rank_of(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001


def test_schedules_by_hand():
    config = BALoraConfig(lambda_consistency=1.0, lambda_diversity=2.0, lambda_svd=4.0)
    assert config.lambdas(0, 100) == pytest.approx((1.0, 0.0, 0.0))
    assert config.lambdas(19, 100)[1:] == (0.0, 0.0)
    assert config.lambdas(50, 100) == pytest.approx((0.55, 2.0, 4.0))
    assert config.lambdas(100, 100) == pytest.approx((0.1, 2.0, 4.0))
    assert config.lambdas(45, 200)[1:] == pytest.approx((1.0, 2.0))  # 22.5 %: half way up the ramp
    assert config.lambdas(999, 100) == pytest.approx((0.1, 2.0, 4.0))  # a run that goes on past its end


def test_constant_schedules_and_a_step_without_a_ramp():
    config = BALoraConfig(consistency_schedule="constant", focus_schedule="constant")
    assert config.lambdas(0, 10) == config.lambdas(10, 10) == (0.025, 0.005, 0.005)
    sudden = BALoraConfig(focus_ramp=0.0)
    assert sudden.lambdas(1, 10)[1] == 0
    assert sudden.lambdas(2, 10)[1] == 0.005
