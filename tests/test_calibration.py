"""Laws of calibration: a cosine is as sure as it was right, on what was not learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lorahub.hub.errors import FormatError
from lorahub.index.calibration import Calibration, calibrate
from lorahub.index.fitting import fit
from planting import CONCEPTS, SMALL, Words, library, planted


def test_a_calibration_is_how_often_it_was_right() -> None:
    chance = np.random.default_rng(0)
    cosines = chance.uniform(0, 1, 4000)
    curve = calibrate(cosines, chance.uniform(size=4000) < cosines**2)
    for cosine in (0.2, 0.5, 0.8):
        assert curve(cosine) == pytest.approx(cosine**2, abs=0.08)
    values = [curve(cosine) for cosine in np.linspace(-1, 1, 50)]
    assert values == sorted(values)
    assert curve.cases == 4000
    assert curve.chance == pytest.approx(1 / 3, abs=0.03)


def test_a_calibration_never_makes_certain() -> None:
    always = calibrate([0.3, 0.4, 0.5], [True, True, True])
    assert always(0.5) == always(1.0) == pytest.approx(0.75)
    assert always(-1.0) == always(0.0) == 0.0
    assert always(0.15) < 0.5, "nothing was seen down there"
    assert calibrate([], [])(0.9) == 0.0
    assert Calibration.from_json(always.as_json()) == always


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"cosines": "x"},
        {"cosines": [0, 1], "shares": [1, 0], "cases": 2, "chance": 0},
        {"cosines": [0.0], "shares": [2.0], "cases": 1, "chance": 0},
        {"cosines": [0.0], "shares": [1.0], "cases": 1, "chance": -1},
    ],
)
def test_another_table_is_no_calibration(data: Any) -> None:
    with pytest.raises(FormatError, match="calibration"):
        Calibration.from_json(data)


class Worded(Words):
    """Texts that begin with the same word are near to one another."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = super().encode([text.split()[0] for text in texts]) + 0.8 * super().encode(texts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_ridge_foretells_how_often_other_words_find_the_right_adapter() -> None:
    """What it says of a cosine holds for words and adapters of which it learned neither."""
    examples = [replace(one, texts=tuple(f"{one.texts[0][8:]} {n}" for n in "abc")) for one in library()]
    encoder = fit("ridge", examples, Worded(), options=SMALL["ridge"])
    queries = Worded().encode([f"{concept} {n}" for concept in range(CONCEPTS) for n in "xyz"])
    vectors = encoder.encode_all(planted(concept, seed) for concept in range(CONCEPTS) for seed in (51, 52, 53))
    cosines, scores = (queries @ vectors.T).ravel(), encoder.scores(queries, vectors).ravel()
    right = np.kron(np.eye(CONCEPTS, dtype=bool), np.ones((3, 3), bool)).ravel()
    told = np.array([encoder.confidence(float(score), of="queries") for score in scores])
    assert told[right].mean() > 3 * told[~right].mean()
    assert told.mean() == pytest.approx(right.mean(), abs=0.06)
    # of words that it learned it is surer, and of other words that would be wrong
    sure = np.array([encoder.confidence(float(cosine)) for cosine in cosines])
    likely = (told > 0.05) & (told < 0.95)
    assert abs(told[likely].mean() - right[likely].mean()) < abs(sure[likely].mean() - right[likely].mean())
