"""Crowding: what is near to known words is found for them, and does not hide what other words mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from lorahub.index.crowding import MOST, NEIGHBOURS, WEIGHT, crowding, landmarks
from lorahub.index.weight_encoder import WeightEncoder
from numpy.typing import NDArray

Array = NDArray[np.float32]
DIM = 24


def units(*shape: int, seed: int = 0) -> Array:
    found = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def test_crowding_is_half_the_mean_of_the_nearest_cosines() -> None:
    """Against plain sorting."""
    vectors, places = units(7, DIM), units(40, DIM, seed=1).astype(np.float16)
    exact = np.sort(vectors.astype(np.float64) @ places.T.astype(np.float64), axis=1)[:, -NEIGHBOURS:]
    np.testing.assert_allclose(crowding(vectors, places), WEIGHT * exact.mean(axis=1), atol=1e-6)


def test_the_order_is_that_of_csls() -> None:
    """For every query 2 cos - r(query) - r(adapter), with as many neighbours, orders adapters alike."""
    queries, vectors, places = units(5, DIM), units(30, DIM, seed=1), units(50, DIM, seed=2).astype(np.float16)
    cosines, wide = queries @ vectors.T, places.astype(np.float32)
    near = np.sort(vectors @ wide.T, axis=1)[:, -NEIGHBOURS:].mean(axis=1)
    far = np.sort(cosines, axis=1)[:, -NEIGHBOURS:].mean(axis=1)
    csls = 2 * cosines - far[:, None] - near
    ours = cosines - crowding(vectors, places)
    np.testing.assert_array_equal(np.argsort(-ours, axis=1), np.argsort(-csls, axis=1))


@pytest.mark.parametrize("count", [0, 1, NEIGHBOURS])
def test_few_landmarks(count: int) -> None:
    vectors, places = units(3, DIM), units(max(count, 1), DIM, seed=1)[:count]
    wanted = WEIGHT * (vectors @ places.T).mean(axis=1) if count else np.zeros(3)
    np.testing.assert_allclose(crowding(vectors, places), wanted, atol=1e-6)
    assert crowding(vectors[:0], places).shape == (0,)


def test_landmarks_are_distinct_and_not_too_many() -> None:
    some = units(9, DIM)
    found = landmarks(np.concatenate([some, some[:4]]))
    assert found.shape == (9, DIM)
    assert {row.tobytes() for row in found} == {row.tobytes() for row in some.astype(np.float16)}
    many = landmarks(units(MOST + 100, DIM))
    assert many.shape == (MOST, DIM) == np.unique(many, axis=0).shape


def test_a_hub_gives_way_to_what_the_words_mean() -> None:
    """A hub is near to its own words and, a little more than the right one, to words that nobody knew."""
    own, asked = np.eye(DIM, dtype=np.float32)[:2]
    hub = 0.8 * own + 0.6 * asked
    meant = 0.55 * asked + np.sqrt(1 - 0.55**2) * np.eye(DIM, dtype=np.float32)[2]
    vectors, queries = np.stack([hub, meant]), np.stack([own, asked])
    encoder = plain(landmarks(own[None]))
    assert (queries @ vectors.T).argmax(axis=1).tolist() == [0, 0]
    assert encoder.scores(queries, vectors).argmax(axis=1).tolist() == [0, 1]
    bare = replace(encoder, landmarks=np.empty((0, DIM), np.float16))
    np.testing.assert_allclose(bare.scores(queries, vectors), queries @ vectors.T)
    assert bare.space == encoder.space  # landmarks change no vector


def plain(places: NDArray[np.float16]) -> WeightEncoder:
    from lorahub.index.modules import Manifest

    return WeightEncoder("ridge", Manifest("base", ()), DIM, "words", {}, landmarks=places)
