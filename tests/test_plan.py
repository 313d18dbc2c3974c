"""Units, nesting and the asked fraction, on the true shapes of published models."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.errors import UserError
from uniql_jax.plan import MAX_PRUNE_RATE, Plan, axis_layout, group_and_unit, make_plan, next_cut

from .published import PUBLISHED

CONFIGS = {name: model_config.from_hf(hf) for name, hf in PUBLISHED.items()}


def losses_of(config: model_config.ModelConfig, rng: np.random.Generator) -> list[dict[str, list[float]]]:
    """Random loss curves: zero when all is kept, growing as more is dropped."""
    full = elastic.sizes(config)

    def curve(count: int) -> list[float]:
        steps = np.sort(np.exp(rng.standard_normal(count)))[::-1] * np.exp(rng.standard_normal())
        return [*np.cumsum(steps[::-1])[::-1], 0.0]

    return [{axis: curve(full[axis]) for axis in elastic.layer_axes(config, kinds)} for kinds in config.pattern]


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("kind", ["losses", "influence", "uniform"])
def test_rates_hit_the_asked_fraction_of_parameters(name: str, kind: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    influence = rng.uniform(0, 0.3, len(config.pattern)).tolist() if kind == "influence" else None
    plan = make_plan(config, influence, losses=losses_of(config, rng) if kind == "losses" else None)
    for rate in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.123):
        kept = plan.keep(rate)
        full = elastic.sizes(config)
        pruned = sum((full[a] - n) * plan.costs[i][a] for i, layer in enumerate(kept) for a, n in layer.items())
        assert pruned / plan.total == pytest.approx(1 - plan.kept_fraction(rate))
        assert abs(pruned / plan.total - rate) <= 0.01


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_cut_is_a_whole_number_of_groups(name: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    plan = make_plan(config, None, losses=losses_of(config, rng))
    full = elastic.sizes(config)
    for kept in plan.keep(MAX_PRUNE_RATE):
        for axis, count in kept.items():
            group = axis_layout(config, axis).group
            inner = {"vo": config.heads, "ffn": 1, "qk": 1, "qk_pass": 1}[axis]
            assert 0 < count <= full[axis]
            assert count == full[axis] or not group or count * inner % group == 0


@given(
    rates=st.lists(st.floats(0, MAX_PRUNE_RATE), min_size=2, max_size=2).map(sorted),
    influence=st.lists(st.floats(0, 2), min_size=30, max_size=30),
)
def test_higher_rates_keep_less_of_everything(rates: list[float], influence: list[float]) -> None:
    plan = make_plan(CONFIGS["smollm2-135m"], influence)
    low, high = (plan.keep(rate) for rate in rates)
    assert all(b[axis] <= a[axis] for a, b in zip(low, high, strict=True) for axis in a)


def test_what_costs_most_per_parameter_goes_last(rng: np.random.Generator) -> None:
    config = CONFIGS["smollm2-135m"]
    losses = losses_of(config, rng)
    for axis, curve in losses[7].items():
        losses[7][axis] = [1e6 * value for value in curve]
    kept = make_plan(config, None, losses=losses).keep(MAX_PRUNE_RATE)
    assert kept[7] == {axis: elastic.sizes(config)[axis] for axis in kept[7]}
    assert any(kept[8][axis] < elastic.sizes(config)[axis] for axis in kept[8])


def test_influential_layers_are_spared() -> None:
    config = CONFIGS["smollm2-135m"]
    influence = [0.05] * 30
    influence[0] = 0.9
    kept = make_plan(config, influence).keep(0.25)
    assert kept[0]["ffn"] > kept[1]["ffn"]


def test_json_and_back(rng: np.random.Generator) -> None:
    plan = make_plan(CONFIGS["qwen2.5-0.5b"], rng.uniform(0, 1, 24).tolist())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.keep(0.3) == plan.keep(0.3)
    assert plan != make_plan(CONFIGS["qwen2.5-0.5b"], None)


@pytest.mark.parametrize("rate", [-0.1, 0.9, float("nan"), "abc"])
def test_bad_rates_are_refused(rate: object) -> None:
    plan = make_plan(CONFIGS["smollm2-135m"], None)
    with pytest.raises((UserError, TypeError), match=r"prune rate|type"):
        plan._cuts(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "inner", "group"),
    [
        *[(64, 9, 72), (128, 32, 128), (128, 28, 112), (64, 14, 112)],
        *[(count, 1, 128) for count in (14336, 11008, 18944, 4864, 1536)],
    ],
)
def test_groups_of_real_shapes(count: int, inner: int, group: int) -> None:
    found, unit = group_and_unit(count, inner, 16 if inner > 1 else 8)
    assert found == group
    assert (count * inner) % group == 0
    assert (unit * inner) % group == 0
    assert count // unit >= 8


@given(count=st.integers(4, 400), inner=st.integers(1, 40))
def test_any_shape_gets_whole_groups(count: int, inner: int) -> None:
    group, unit = group_and_unit(count, inner, 8)
    assert group % 8 == 0
    assert group % inner == 0
    assert (unit * inner) % group == 0


@given(kept=st.integers(1, 300), unit=st.integers(1, 64))
def test_cuts_go_down_to_one_unit_and_never_to_zero(kept: int, unit: int) -> None:
    after = next_cut(kept, unit)
    assert 0 < after <= kept
    assert after % unit == 0 or after == kept
    assert next_cut(min(kept, unit), unit) == min(kept, unit)
