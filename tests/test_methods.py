"""What every merging method keeps, whichever there are: a new file in `merge/methods` is tested by being there.

A method that breaks a law on purpose stands in BY_DESIGN with its reason; pruning by default would be one.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from lorahub.hub import plugins
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import LoraHubError
from lorahub.merge.run import METHODS, merge, methods, options
from making import BASE, DTYPES, adapter, assert_equal, carried_out, delta, deltas, merged, rounding, sizes, times

# method -> {law: why it does not hold}
BY_DESIGN: dict[str, dict[str, str]] = {
    "lego": {"cancellation": "x and -x are two units (a, b) and (a, -b), whose centroid is (a, 0) only if they meet"},
}


def law(name: str) -> pytest.MarkDecorator:
    """Run a test for every method that does not break the law `name` by design."""
    bound = [method for method in methods() if name not in BY_DESIGN.get(method, {})]
    return pytest.mark.parametrize("method", bound)


def several(dtype: torch.dtype = torch.float32) -> list[Adapter]:
    """Adapters of different ranks and scales, each without some modules of the others."""
    names = list(BASE)
    return [
        adapter(*names[:5], rank=4, seed=1, scale=0.5, dtype=dtype),
        adapter(*names[2:], rank=2, seed=2, scale=2.0, dtype=dtype),
        adapter(*names[::2], rank=7, seed=3, scale=1.0, dtype=dtype),
    ]


WEIGHTS = [0.5, 0.3, 0.2]


def test_exceptions_are_for_methods_that_exist() -> None:
    assert set(BY_DESIGN) <= set(methods())


@law("declared")
def test_a_method_is_documented_and_runs_without_options(method: str) -> None:
    function = plugins.load(METHODS, method)
    parameters = list(inspect.signature(function).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["adapters", "weights"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])
    documentation = inspect.getdoc(function) or ""
    assert documentation
    for name, option in options(method).items():
        assert option.default is not inspect.Parameter.empty, f"{name} has no default"
        assert f"{name}:" in documentation, f"{name} is not explained"
    carried_out(merge(several(), method, WEIGHTS))


@law("union")
def test_modules_are_united(method: str) -> None:
    inputs = several()
    result = merge(inputs, method, WEIGHTS).adapter
    assert list(result.modules) == sorted({name for one in inputs for name in one.modules})
    for name, module in result.modules.items():
        assert (module.up.shape[0], module.down.shape[1]) == (BASE[name].outputs, BASE[name].inputs)
        assert (module.kernel, module.embedding) == (BASE[name].kernel, BASE[name].embedding)
        assert module.shape == result.shapes[name]


@law("order")
def test_order_does_not_matter(method: str) -> None:
    forth = merged(several(), WEIGHTS, method=method)
    back = merged(several()[::-1], WEIGHTS[::-1], method=method)
    assert_equal(back, forth, rounding(several(), WEIGHTS, factor=64))


@law("identity")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_adapter_at_weight_one_is_itself(method: str, dtype: torch.dtype) -> None:
    one = adapter(scale=0.7, dtype=dtype)
    assert_equal(merged([one], [1.0], method=method), deltas(one), rounding([one], [1.0], factor=64))


@law("homogeneity")
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_weights_multiply_deltas(method: str, factor: float) -> None:
    """A common factor of all weights, and a weight against a scale, come to the same."""
    once = merged(several(), WEIGHTS, method=method)
    shares = [factor * weight for weight in WEIGHTS]
    assert_equal(merged(several(), shares, method=method), times(once, factor), rounding(several(), shares, factor=64))
    inside = [one.scaled(weight) for one, weight in zip(several(), WEIGHTS, strict=True)]
    assert_equal(merged(inside, [1.0] * 3, method=method), once, rounding(several(), WEIGHTS, factor=64))


@law("silence")
def test_an_adapter_of_weight_zero_changes_nothing(method: str) -> None:
    one, two, three = several()
    without = merged([one, three], [0.5, 0.2], method=method)
    assert_equal(
        merged([one, two, three], [0.5, 0.0, 0.2], method=method),
        without | {name: 0.0 * matrix for name, matrix in deltas(two).items() if name not in without},
        rounding(several(), WEIGHTS, factor=64),
    )


@law("alone")
def test_a_module_that_one_adapter_holds_is_passed_on(method: str) -> None:
    left, right = adapter("layer.0.query", "conv.wide", seed=1), adapter("layer.0.query", "words", seed=2)
    result = merged([left, right], [0.5, -2.0], method=method)
    wanted = {"conv.wide": 0.5 * deltas(left)["conv.wide"], "words": -2.0 * deltas(right)["words"]}
    del result["layer.0.query"]
    assert_equal(result, wanted, {name: 1e-5 * float(matrix.norm()) for name, matrix in wanted.items()})


@law("weights by module")
def test_weights_may_differ_by_module(method: str) -> None:
    inputs = [adapter(seed=seed) for seed in range(3)]
    plain, other = [0.5, 0.3, 0.2], [1.0, 0.0, -0.5]
    result = merge(inputs, method, plain, dtype=torch.float32, where={"*": [9, 9, 9], "layer.*": other, "*s": plain})
    wide, narrow = merged(inputs, [9.0] * 3, method=method), merged(inputs, other, method=method)
    words = merged(inputs, plain, method=method)
    for name, matrix in deltas(result.adapter).items():
        wanted = narrow if name.startswith("layer.") else words if name.endswith("s") else wide
        assert float((matrix - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm()) + 1e-5, name


@law("rank")
@pytest.mark.parametrize("given", [{"rank": 2}, {"energy": 0.9}, {"rank": "2", "energy": "0.9"}], ids=str)
def test_every_result_can_be_limited(method: str, given: dict[str, Any]) -> None:
    full, cut = merge(several(), method, WEIGHTS), merge(several(), method, WEIGHTS, given=given)
    assert cut.options["seed" if "seed" in cut.options else next(iter(given))] is not None
    for name, module in cut.adapter.modules.items():
        assert module.shape == cut.adapter.shapes[name]
        if "rank" in given:
            assert module.rank <= 2
        if given == {"energy": 0.9}:
            norms = float(delta(module).norm()), float(delta(full.adapter.modules[name]).norm())
            assert norms[0] ** 2 >= 0.9 * norms[1] ** 2 * (1 - 1e-6)


@law("determinism")
def test_the_same_merge_twice_is_the_same_bit_by_bit(method: str) -> None:
    first, second = (merge(several(), method, WEIGHTS).adapter.modules for _ in range(2))
    torch.manual_seed(99)
    for name, module in first.items():
        assert torch.equal(module.up, second[name].up)
        assert torch.equal(module.down, second[name].down)


@law("random state")
def test_the_global_random_state_is_left_alone(method: str) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    carried_out(merge(several(), method, WEIGHTS))
    assert torch.equal(torch.rand(3), wanted)


@law("dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_finite_and_stored_in_the_inputs_dtype(method: str, dtype: torch.dtype) -> None:
    result = carried_out(merge(several(dtype), method, WEIGHTS))
    for module in result.adapter.modules.values():
        assert module.dtype == dtype
        assert module.scale == 1.0
        assert bool(torch.isfinite(module.up).all() & torch.isfinite(module.down).all())
    assert all(math.isfinite(value) for value in vars(result.report.total).values())


OTHERWISE = {
    "core": [{"rule": rule} for rule in ("sum", "ties", "magnitude", "dare", "dare_ties", "tsv", "iso")],
    "dare": [{"space": "delta"}, {"space": "factors"}, {"unite": "total"}, {"gauge": "stored"}],
    "iso": [{"common": 0.5}],
    "knots": [{"pick": "random"}, {"unite": "sum"}],
    "lego": [{"gauge": "svd"}, {"features": "unit"}, {"features": "balanced"}, {"reweight": "l2"}, {"rank": 3}],
    "magnitude": [{"space": "delta"}, {"space": "factors"}, {"gauge": "stored"}],
    "robust": [{"gauge": "stored"}],
    "ties": [{"space": "delta"}, {"space": "factors"}, {"elect": "frequency"}, {"gauge": "stored"}],
    "tsv": [{"keep": 0.5}],
}


@law("dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_are_results_of_every_other_choice(method: str, dtype: torch.dtype) -> None:
    for given in OTHERWISE.get(method, []):
        result = carried_out(merge(several(dtype), method, WEIGHTS, given=given))
        for name, module in result.adapter.modules.items():
            assert module.dtype == dtype
            assert module.shape == result.adapter.shapes[name]
            assert bool(torch.isfinite(module.up).all() & torch.isfinite(module.down).all())


@law("inputs")
def test_inputs_are_left_alone(method: str) -> None:
    inputs = several()
    before = [deltas(one) for one in inputs]
    carried_out(merge(inputs, method, WEIGHTS))
    for one, table in zip(inputs, before, strict=True):
        assert_equal(deltas(one), table, dict.fromkeys(table, 0.0))


@law("cancellation")
def test_a_difference_with_itself_is_finite_and_small(method: str) -> None:
    one = adapter(scale=0.7)
    nothing = merged([one, one], [1.0, -1.0], method=method)
    size = sizes([one, one], [1.0, -1.0])
    for name, matrix in nothing.items():
        assert float(matrix.norm()) <= 1e-5 * size[name]


@law("refusal")
def test_different_bases_are_refused_by_every_method(method: str) -> None:
    with pytest.raises(LoraHubError, match="gpt2"):
        merge([adapter(base="gpt2"), adapter(base="roberta-base")], method)
