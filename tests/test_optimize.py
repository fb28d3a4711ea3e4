"""The search of merging weights: known optima, honest baselines, determinism; and the metric that is a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lorahub.cli.optimize import announce, command_metric, find_weights
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, IncompatibleAdapters, UnknownMethod
from lorahub.merge.optimize import Found, search
from making import adapter, delta

PLACE = "layer.0.value"
Metric = Callable[[Adapter], float]


def several(count: int) -> list[Adapter]:
    """Adapters of rank 1 of one module: 5 x 9 entries, so that up to 9 of them are independent."""
    return [adapter(PLACE, rank=1, seed=seed) for seed in range(count)]


def near(wanted: list[float], adapters: list[Adapter]) -> Metric:
    """The highest score, 0, has the merge with the weights `wanted`; it falls with their squared distance.

    A weight beyond the wanted ones does not count. Rounded, so that equal merges score the same to the last bit.
    """
    basis = torch.stack([delta(one.modules[PLACE]).flatten() for one in adapters], dim=1)

    def metric(merged: Adapter) -> float:
        weights = torch.linalg.lstsq(basis, delta(merged.modules[PLACE]).flatten()[:, None]).solution.flatten()
        distance = weights[: len(wanted)] - torch.tensor(wanted, dtype=torch.float64)
        return -round(float(distance.square().sum()), 9)

    return metric


class Counted:
    """A metric that counts how often it is asked."""

    def __init__(self, metric: Metric) -> None:
        self.metric, self.calls = metric, 0

    def __call__(self, merged: Adapter) -> float:
        self.calls += 1
        return self.metric(merged)


@pytest.mark.parametrize("wanted", [[0.7], [0.8, -0.3], [1.2, 0.1, -0.6]], ids=str)
def test_a_known_optimum_is_found_within_the_budget(wanted: list[float]) -> None:
    adapters = several(len(wanted))
    metric = Counted(near(wanted, adapters))
    most = 25 if len(wanted) == 1 else 60 * len(wanted)
    found = search(adapters, "exact", metric, evaluations=most, penalty=0.0)
    assert np.allclose(found.weights, wanted, atol=0.06 if len(wanted) > 1 else 0.002)
    assert found.score == pytest.approx(0.0, abs=4e-3)
    assert metric.calls == len(found.trace) <= most


@pytest.mark.parametrize("wanted", [[0.0, 1.0, 0.0], [1 / 3] * 3, [1.0] * 3, [-1.4, 1.4, 0.2]], ids=str)
@pytest.mark.parametrize("evaluations", [1, 2, 5, 13, 40])
def test_what_is_found_is_never_worse_than_what_was_tried_first(wanted: list[float], evaluations: int) -> None:
    adapters = several(3)
    metric = Counted(near(wanted, adapters))
    found = search(adapters, "exact", metric, evaluations=evaluations, penalty=0.5)
    first = [trial for trial in found.trace if trial.kind != "search"]
    assert metric.calls == len(found.trace) <= evaluations
    assert found.score >= max(trial.score for trial in first)
    assert found.trace[0].kind == "start"
    assert found.trace[0].weights == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert found.start_score == found.trace[0].score
    assert (found.weights, found.score) in {(trial.weights, trial.score) for trial in found.trace}
    # the single adapters take their turn only where a round of the search is left besides
    singles = [trial.weights for trial in found.trace if trial.kind.startswith("only")]
    assert singles == ([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)] if evaluations >= 13 else [])


def test_the_users_weights_are_the_start() -> None:
    adapters = several(2)
    found = search(adapters, "exact", near([0.0, 0.0], adapters), start=[0.25, -0.5], evaluations=30)
    assert found.trace[0].weights == (0.25, -0.5)
    assert [trial.kind for trial in found.trace[:5]] == [
        "start",
        "average",
        "sum",
        "only adapter-0",
        "only adapter-1",
    ]


def test_the_seed_decides_and_the_global_state_is_left_alone() -> None:
    adapters = several(3)
    metric = near([1.2, 0.1, -0.6], adapters)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, same, other = (search(adapters, "exact", metric, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one.trace != other.trace
    assert [t for t in one.trace if t.kind != "search"] == [t for t in other.trace if t.kind != "search"]
    assert bool((np.random.get_state()[1] == before).all())
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_weights_are_tried_once_and_within_the_bounds() -> None:
    adapters = several(2)
    found = search(adapters, "exact", near([3.0, -3.0], adapters), evaluations=80, bounds=(-0.5, 1.0))
    tried = [trial.weights for trial in found.trace]
    assert len(set(tried)) == len(tried)
    assert tried == [tuple(round(weight, 4) for weight in weights) for weights in tried]  # as `-w` takes them
    assert all(-0.5 <= weight <= 1.0 for weights in tried for weight in weights)
    assert found.weights == pytest.approx((1.0, -0.5), abs=0.05)
    narrow = search(adapters, "exact", near([3.0, -3.0], adapters), evaluations=20, start=[0, 0], bounds=(-0.4, 0.4))
    assert "sum" not in {trial.kind for trial in narrow.trace}  # a baseline out of bounds is none


def test_the_penalty_pulls_to_small_weights_where_the_metric_does_not_care() -> None:
    adapters = several(3)
    metric = near([0.8], adapters)  # says nothing of the second and third weight
    drawn = search(adapters, "exact", metric, evaluations=150, penalty=0.3, start=[0.5, 0.9, -0.7])
    assert drawn.weights == pytest.approx((0.8, 0.0, 0.0), abs=0.08)
    firm = max(trial.score for trial in drawn.trace if trial.kind != "search")
    assert drawn.score >= firm
    free = search(adapters, "exact", metric, evaluations=150, penalty=0.0, start=[0.5, 0.9, -0.7])
    assert sum(map(abs, free.weights[1:])) > 3 * sum(map(abs, drawn.weights[1:]))


def test_the_penalty_never_costs_more_than_the_first_trials_scored() -> None:
    """With a huge penalty no weights would be best of all; but the start scores more, and so must the result."""
    adapters = several(2)
    found = search(adapters, "exact", near([0.5, 0.5], adapters), evaluations=40, penalty=100.0)
    assert found.weights == (0.5, 0.5)


@pytest.mark.parametrize("count", [1, 3])
def test_a_flat_metric_ends_early_with_a_remark(count: int) -> None:
    found = search(several(count), "exact", lambda merged: 0.5, evaluations=200)
    assert found.note
    assert "0.5" in found.note
    assert found.weights == found.trace[0].weights
    assert len(found.trace) < 70


def test_methods_and_their_options_are_those_of_a_merge() -> None:
    adapters = several(3)
    ranks = []

    def metric(merged: Adapter) -> float:
        ranks.append(merged.modules[PLACE].rank)
        return -abs(merged.modules[PLACE].norm() - 1.0)

    search(adapters, "exact", metric, evaluations=4, given={"rank": 2})
    assert set(ranks) == {2}
    with pytest.raises(UnknownMethod):
        search(adapters, "no-such", metric)
    with pytest.raises(IncompatibleAdapters):
        search([adapter(base="gpt2"), adapter(base="roberta-base")], "exact", metric)
    search([adapter(PLACE, base="a"), adapter(PLACE, base="b")], "exact", metric, evaluations=1, base="a")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"evaluations": 0}, "evaluations"),
        ({"penalty": -1.0}, "penalty"),
        ({"step": 0.0}, "step"),
        ({"bounds": (1.0, -1.0)}, "bounds"),
        ({"start": [1.0]}, "2 adapters"),
        ({"start": [9.0, 0.0]}, "9.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(BadOption, match=word):
        search(several(2), "exact", lambda merged: 0.0, **options)
    with pytest.raises(BadOption, match="at least one"):
        search([], "exact", lambda merged: 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_a_metric_without_a_number_is_named_with_the_weights(value: object) -> None:
    with pytest.raises(BadOption, match=r"weights 0\.25, -0\.5"):
        search(several(2), "exact", lambda merged: value, start=[0.25, -0.5])  # type: ignore[arg-type,return-value]


def test_a_metric_that_raises_is_named_with_the_weights_and_its_words() -> None:
    def broken(merged: Adapter) -> float:
        raise KeyError("no such column")

    with pytest.raises(BadOption, match=r"weights 0\.25, -0\.5.*no such column") as caught:
        search(several(2), "exact", broken, start=[0.25, -0.5])
    assert isinstance(caught.value.__cause__, KeyError)


def test_progress_is_told_of_every_evaluation() -> None:
    seen: list[tuple[int, int | None]] = []
    adapters = several(2)
    search(adapters, "exact", near([0, 0], adapters), evaluations=12, progress=lambda *told: seen.append(told))
    assert seen == [(done, 12) for done in range(1, 13)]


def test_the_record_is_plain_json() -> None:
    adapters = several(2)
    found = search(adapters, "exact", near([0.5, 0.5], adapters), evaluations=8)
    told = found.record(metric="python score.py {}", seed=0)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["evaluations"] == len(told["trace"]) == 8
    assert told["weights"] == list(found.weights)
    assert isinstance(found, Found)


# --- the metric that is a command ----------------------------------------------------------------------------------

SCORE = f"""
import sys
from pathlib import Path
from safetensors.numpy import load_file
tensors = load_file(Path(sys.argv[1]) / "adapter_model.safetensors")
up = next(t for name, t in tensors.items() if "lora_B" in name)
down = next(t for name, t in tensors.items() if "lora_A" in name)
print("loaded", "{PLACE}")
print(-abs((up.astype("f8") @ down.astype("f8"))[0, 0] - 0.25))
"""


def script(folder: Path, text: str) -> str:
    file = folder / "my score.py"
    file.write_text(text, encoding="utf-8")
    return f'{sys.executable} "{file}" {{}}'


def test_a_command_scores_the_adapters_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end: the script reads the merged file with safetensors, knows nothing of us, and its wish is met."""
    adapters = several(2)
    command = script(tmp_path, SCORE)
    weights, facts = find_weights(adapters, "exact", command, evaluations=16, penalty=0.0, quiet=True)
    entry = sum(w * float(delta(one.modules[PLACE])[0, 0]) for w, one in zip(weights, adapters, strict=True))
    assert facts["score"] == pytest.approx(-abs(entry - 0.25), abs=1e-6)
    assert facts["score"] >= max(trial["score"] for trial in facts["trace"][:3])
    assert (facts["metric"], facts["seed"], facts["weights"]) == (command, 0, weights)
    assert json.loads(json.dumps(facts)) == facts
    announce(facts, [one.name for one in adapters])
    assert f"adapter-0:{weights[0]:g}" in capsys.readouterr().out


@pytest.mark.parametrize(("to", "ending"), [("peft", "adapter"), ("kohya", ".safetensors"), (None, ".safetensors")])
def test_the_command_gets_the_dialect_that_is_asked_for_or_fits(tmp_path: Path, to: str | None, ending: str) -> None:
    some = adapter(PLACE)
    unet = Adapter({"unet.mid_block.attentions.0.to_q": some.modules[PLACE]}, "sd-1")
    text = f"import sys, pathlib; p = sys.argv[1]; print(int(p.endswith({ending!r}) and pathlib.Path(p).exists()))"
    assert command_metric(script(tmp_path, text), to=to)(unet) == 1.0


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    some = adapter(PLACE)
    place = tmp_path / "seen"
    metric = command_metric(script(tmp_path, f"import sys; open({str(place)!r}, 'w').write(sys.argv[1]); print(1)"))
    assert metric(some) == 1.0
    assert not Path(place.read_text()).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; print('half\\nway', file=sys.stderr); sys.exit(3)", ["status 3", "half way"]),
        ("print('accuracy: high')", ["number", "accuracy: high"]),
        ("pass", ["number", "nothing"]),
        ("print('nan')", ["nan", "finite"]),
        ("print(0.5); print('done')", ["number", "done"]),
    ],
)
def test_a_command_that_fails_is_one_clear_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(BadOption) as caught:
        find_weights(several(2), "exact", script(tmp_path, text), start=[0.25, -0.5], quiet=True)
    for word in [*words, "0.25, -0.5"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "word"),
    [("python score.py", "path goes"), ("python 'score.py {}", "quot"), ("/no/such/program {}", "cannot be run")],
)
def test_a_command_that_cannot_work_is_refused(command: str, word: str) -> None:
    with pytest.raises(BadOption, match=word):
        find_weights(several(2), "exact", command, quiet=True)


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    metric = command_metric(script(tmp_path, "import sys; print(len(sys.argv))") + " ; echo 9 $HOME")
    assert metric(adapter(PLACE)) == 6.0
