"""Laws of a fit: the loss is what it says, ridge is ridge, the same seed learns the same, a stopped fit goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters, RetrievalError
from lorahub.index.contrast import Pairs, both_ways, contrast, reciprocal_rank
from lorahub.index.course import number
from lorahub.index.fitting import PUBLISHED_LOSS, Example, Progress, Settings, fit
from lorahub.index.modules import Manifest
from lorahub.index.ridge import Solution, chosen
from lorahub.index.weight_encoder import WeightEncoder
from making import adapter
from planting import CONCEPTS, SMALL, Words, library, planted
from torch import Tensor

QUICK = Settings(steps=6, batch=12, look=2, save_every=2, seed=3)


def recall(encoder: WeightEncoder) -> float:
    """How often a concept's words find, of adapters that were never seen, one of their own first. Chance is 1/6."""
    new = [(c, planted(c, seed)) for seed in (51, 52, 53) for c in range(CONCEPTS)]
    vectors = encoder.encode_all(some for _, some in new)
    order = (Words().encode([f"concept {c}" for c in range(CONCEPTS)]) @ vectors.T).argmax(axis=1)
    return float(np.mean([new[place][0] == c for c, place in enumerate(order)]))


def equal(one: WeightEncoder, two: WeightEncoder) -> bool:
    return one.space == two.space and all(np.array_equal(one.tensors[n], two.tensors[n]) for n in one.tensors)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def units(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- who belongs to whom, and the loss ------------------------------------------------------------------------------


def test_equal_texts_and_equal_groups_are_positives() -> None:
    pairs = Pairs.of([("a", "b"), ("b",), ("c",), ("d",), ("d", "d")], ["", "g", "g", "", ""])
    assert pairs.texts == ("a", "b", "c", "d")
    assert pairs.owned == ((0, 1), (1,), (2,), (3,), (3,))
    assert pairs.fitting.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    alike = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert pairs.alike.int().tolist() == alike


def test_without_shared_texts_the_loss_is_clips() -> None:
    texts, vectors = units(7, 5), units(7, 5, seed=1)
    scores, own = 9.0 * texts @ vectors.T, torch.arange(7)
    cross = torch.nn.functional.cross_entropy
    got = contrast(texts, vectors, torch.eye(7, dtype=torch.bool), 9.0)
    assert got == pytest.approx(float(cross(scores, own) + cross(scores.T, own)), abs=1e-5)


def test_the_published_loss_cannot_fall_far() -> None:
    """At temperature 1 and 32 pairs: 2 ln(1 + 31 e^-2) even if every wrong cosine were -1; 2 ln 32 by chance."""
    alone, best = torch.eye(32, dtype=torch.bool), 2 * math.log(1 + 31 * math.exp(-2))
    assert contrast(torch.ones(32, 1), torch.ones(32, 1), alone, 1.0) == pytest.approx(2 * math.log(32), abs=1e-5)
    assert contrast(units(32, 64), units(32, 64), alone, 1.0) > best == pytest.approx(3.296, abs=1e-3)


def test_a_positive_is_not_pushed_away() -> None:
    """Three pairs; the first two are of one group, though they have words of their own."""
    texts, vectors = torch.eye(4)[[0, 1, 2]], torch.eye(4)[[0, 3, 2]]
    fitting = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    scores = 5.0 * texts @ vectors.T
    by_text, by_adapter = scores.log_softmax(dim=1), scores.log_softmax(dim=0)
    wanted = 0.0
    for at, both in ((0, (0, 1)), (1, (0, 1)), (2, (2,))):
        wanted -= sum(float(by_text[at, other] + by_adapter[other, at]) / len(both) for other in both) / 3
    assert contrast(texts, vectors, fitting, 5.0) == pytest.approx(wanted, abs=1e-5)

    def pull(targets: Tensor) -> float:
        """How far a step takes the second adapter towards the first one's words."""
        moved = vectors.clone().requires_grad_()
        contrast(texts, moved, targets, 5.0).backward()
        return -float(moved.grad[1] @ texts[0])

    assert pull(fitting) > 0 > pull(torch.eye(3, dtype=torch.bool))


def test_reciprocal_rank_is_that_of_a_sorted_list() -> None:
    scores = torch.randn(9, 14, generator=torch.Generator().manual_seed(2))
    right = torch.rand(9, 14, generator=torch.Generator().manual_seed(3)) > 0.8
    right[4] = False
    ranks = []
    for row, own in zip(scores.tolist(), right.tolist(), strict=True):
        order = sorted(range(14), key=lambda at: -row[at])
        ranks += [1 / (1 + next(place for place, at in enumerate(order) if own[at]))] if any(own) else []
    assert reciprocal_rank(scores, right) == pytest.approx(np.mean(ranks))
    assert reciprocal_rank(torch.zeros(1, 4), torch.tensor([[True, False, False, False]])) == 0.25, "ties are no help"
    assert reciprocal_rank(scores[4:5], right[4:5]) == 0.0
    assert both_ways(units(4, 8), units(4, 8), torch.eye(4, dtype=torch.bool)) == 1.0


# --- ridge ----------------------------------------------------------------------------------------------------------


def regression(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    rows = chance.normal(size=(20, 50)) + 3
    return rows, rows[:, :4] @ chance.normal(size=(4, 3)) + chance.normal(size=(20, 3))


def test_ridge_is_scikit_learns() -> None:
    from sklearn.linear_model import RidgeCV

    rows, targets = regression()
    penalties = [0.1, 1.0, 10.0, 100.0, 1000.0]
    known = RidgeCV(penalties).fit(rows, targets)
    found = Solution.of(torch.tensor(rows @ rows.T), torch.tensor(targets), penalties)
    assert found.penalty == known.alpha_
    centred = torch.tensor(rows - rows.mean(axis=0))
    axes = centred.T @ found.left / found.values
    assert np.allclose((axes @ found.weights()).numpy(), known.coef_.T, atol=1e-8)


def test_leaving_one_out_is_leaving_one_out() -> None:
    from sklearn.linear_model import Ridge

    rows, targets = regression(1)
    found = Solution.of(torch.tensor(rows @ rows.T), torch.tensor(targets), [7.0])
    for out in range(len(rows)):
        others = [at for at in range(len(rows)) if at != out]
        told = Ridge(7.0).fit(rows[others], targets[others]).predict(rows[out : out + 1])[0] - targets.mean(axis=0)
        assert np.allclose(found.predicted()[out], told / np.linalg.norm(told), atol=1e-5)


def test_blocks_that_say_nothing_are_left_out() -> None:
    rows, targets = (torch.tensor(part) for part in regression(2))
    noise = torch.randn(20, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    grams = [rows[:, :4] @ rows[:, :4].T, noise @ noise.T, noise @ noise.T]
    assert chosen(grams, targets)[1] == (1.0, 0.0, 0.0)
    assert chosen([grams[1], grams[1], grams[0]], targets)[1][2] >= 0.5
    assert chosen([grams[0], 0 * grams[0], 0 * grams[0]], targets)[1] == (1.0, 0.0, 0.0)


# --- fits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps", "options"),
    [("ridge", 1, {}), ("autolora", 10, {}), ("autolora", 60, {"start": 0, "width": 32, "both": 0, "right": 0})],
)
def test_new_adapters_of_known_concepts_are_found_by_words(kind: str, steps: int, options: dict[str, Any]) -> None:
    """They share column spaces alone, each behind a `down` of its own."""
    settings = Settings(steps=steps, batch=24, look=10, rate=5e-3)
    encoder = fit(kind, library(), Words(), settings, options=SMALL[kind] | options)
    assert recall(encoder) >= 5 / 6
    scores = encoder.told.get("left_out") or encoder.told["held_out"]
    assert scores["reciprocal_rank"] > 0.7
    own = encoder.encode(planted(2, 60)) @ Words().encode(["concept 2"])[0]
    assert encoder.confidence(float(own)) > 0.5 > encoder.confidence(-0.5)
    assert encoder.confidence(0.95, of="adapters") > 0.5
    assert encoder.confidence(0.95, of="queries") > 0.5 > 2 * encoder.queries.chance


def test_what_is_answered_to_probes_does_not_find_them() -> None:
    """The control: a reading that is odd in the columns sees their random mixture."""
    encoder = fit("ridge", library(), Words(), options={"left": 0, "right": 0, "both": 64})
    assert encoder.told["left_out"]["reciprocal_rank"] < 0.6


@pytest.mark.parametrize("kind", ["autolora", "w2t"])
@pytest.mark.parametrize("held_out", [0.3, 0.0])
def test_a_stopped_fit_goes_on_bit_for_bit(kind: str, held_out: float, tmp_path: Path) -> None:
    settings = replace(QUICK, rate=0.01, held_out=held_out, gain=0.0, look=1, seed=7)
    options = SMALL[kind] | ({"start": 0} if kind == "autolora" else {})

    def run(changed: Settings = settings, **given: Any) -> WeightEncoder:
        return fit(kind, library(3), Words(), changed, options=options, **given)

    whole = run()
    assert whole.told["best_step"] > 0, "or else nothing of what was learned is compared"
    assert equal(whole, run())
    assert not equal(whole, run(replace(settings, seed=4)))
    for stop in (("fitting", 3), ("fitting", 5), ("refitting", 1)):
        path, again = tmp_path / f"{stop[0]}-{stop[1]}", []

        def stumble(at: Progress, stop: tuple[str, int] = stop) -> None:
            if (at.stage, at.done) == stop:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            run(checkpoint=path, progress=stumble)
        assert path.exists()
        gone_on = run(checkpoint=path, progress=again.append)
        assert equal(whole, gone_on)
        assert gone_on.told == whole.told
        assert gone_on.calibration == whole.calibration
        assert len([at for at in again if at.stage == "fitting"]) < settings.steps, "nothing is done twice"


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "course"
    fit("w2t", library(2), Words(), QUICK, options=SMALL["w2t"], checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == ["course"]
    for examples, settings, options in (
        (library(3), QUICK, SMALL["w2t"]),
        (library(2), replace(QUICK, rate=0.5), SMALL["w2t"]),
        (library(2), QUICK, {"width": 8}),
    ):
        with pytest.raises(FormatError, match="another fit"):
            fit("w2t", examples, Words(), settings, options=options, checkpoint=path)
    for damage in (path.read_bytes()[:500], b"not a checkpoint", b""):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match=r"course: is no checkpoint .*delete it") as caught:
            fit("w2t", library(2), Words(), QUICK, options=SMALL["w2t"], checkpoint=path)
        assert "\n" not in str(caught.value)


def test_a_fit_ends_where_nothing_gets_better_and_leaves_chance_alone() -> None:
    before, seen = torch.get_rng_state(), []
    settings = replace(QUICK, steps=50, look=1, patience=3, rate=1e-12, decay=0.0, refit=False)
    encoder = fit("autolora", library(2), Words(), settings, options=SMALL["autolora"], progress=seen.append)
    assert encoder.told["steps"] == 3
    assert encoder.told["best_step"] == 0
    assert torch.equal(before, torch.get_rng_state())
    assert [at.done for at in seen if at.stage == "reading"] == list(range(1, 13))
    assert all(at.loss is not None and math.isfinite(at.loss) for at in seen if at.stage == "fitting")


def test_the_published_variant_can_be_fitted() -> None:
    from lorahub.index.encoders.autolora import PUBLISHED

    settings = Settings(steps=3, look=1, **PUBLISHED_LOSS)
    encoder = fit("autolora", library(2), Words(), settings, options={**PUBLISHED, "width": 24, "heads": 3})
    assert encoder.told["temperature"] == 1.0
    assert encoder.encode(planted(0, 9)).shape == (24,)


def test_texts_and_groups_may_be_many() -> None:
    examples = [replace(e, texts=(*e.texts, f"own {k}"), group=e.texts[0]) for k, e in enumerate(library(3))]
    encoder = fit("autolora", examples, Words(), QUICK, options=SMALL["autolora"])
    assert encoder.told["texts"] == CONCEPTS + len(examples)
    assert fit("autolora", examples, Words(), replace(QUICK, held_out=0.0), options=SMALL["autolora"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:7], "7 adapters with a description"),
        (lambda found: [*found[:-1], replace(found[-1], texts=())], "5-5: nothing is said"),
        (lambda found: [*found[:-1], replace(found[-1], texts=("a", "  "))], "5-5: nothing is said"),
        (lambda found: [replace(one, texts=("x",)) for one in found], "same description"),
    ],
)
def test_too_little_is_refused(change: Callable[[list[Example]], list[Example]], message: str) -> None:
    with pytest.raises(RetrievalError, match=message):
        fit("ridge", change(library()), Words())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadOption, match="autolora, w2t, ridge"):
        fit("magic", library(), Words())
    with pytest.raises(BadOption, match="no option 'charm'"):
        fit("ridge", library(), Words(), options={"charm": 1})
    with pytest.raises(IncompatibleAdapters, match="tiny"):
        fit("ridge", [*library(), Example(adapter(), ("x",))], Words())
    manifest = Manifest.of([planted(0, 0)])
    assert fit("ridge", library(), Words(), manifest=manifest, options=SMALL["ridge"]).manifest == manifest


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"rate": -1.0}, {"held_out": 1.0}, {"absent": -0.1}, {"decay": -1.0}, {"temperature": 0.0}]
)
def test_settings_outside_their_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        Settings(**given)


def test_every_step_has_a_chance_of_its_own() -> None:
    assert len({number(seed, step) for seed in range(10) for step in range(-1, 50)}) == 510


@pytest.mark.parametrize("kind", ["autolora", "w2t"])
def test_whole_adapters_are_centred_though_parts_were_hidden_in_training(kind: str) -> None:
    """The mean that is taken from vectors is that of the adapters as they are, not of the batches with holes."""
    settings = replace(QUICK, steps=12, rate=0.01, absent=0.6, held_out=0.0)
    encoder = fit(
        kind, library(3), Words(), settings, options=SMALL[kind] | ({"start": 0} if kind == "autolora" else {})
    )
    network, seen = encoder._network, []
    with network.centre.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        encoder.encode_all(example.adapter for example in library(3))
    raw = torch.cat(seen)
    assert (raw.mean(dim=0) - network.centre.mean).norm() < 0.05 * (raw - raw.mean(dim=0)).norm(dim=1).mean()
