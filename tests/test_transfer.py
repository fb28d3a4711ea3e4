"""The similarity that is learned from transfer, and the token states that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lorahub.hub.errors import BadOption, FormatError, RetrievalError, TargetExists
from lorahub.index.encoders.text import text
from lorahub.index.transfer import (
    Reader,
    Similarity,
    fit_similarity,
    folded,
    load,
    parted,
    ranked,
    shortened,
)
from lorahub.index.wording import matching, token_states, token_width

WIDTH, PLACES = 12, 4
SPACE = f"words:tokens-1x{WIDTH}"


def word(name: str) -> np.ndarray:
    seed = int.from_bytes(name.encode()[:6], "little")
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


def vectors(texts: Sequence[str], width: int = PLACES) -> np.ndarray:
    """A token for every word, zeros after the last one, unit norm: as `wording.TokenStates` encodes."""
    made = np.zeros((len(texts), width, WIDTH), np.float32)
    for row, said in enumerate(texts):
        for place, name in enumerate(said.split()):
            made[row, place] = word(name)
    flat = made.reshape(len(texts), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


# sixteen tasks: a colour and a shape; an expert serves tasks of its colour, and a little those of its shape
TASKS = [(colour, shape) for colour in ("red", "blue", "green", "gold") for shape in ("disc", "cube", "cone", "ring")]
TEXTS = [[f"{manner} {colour} {shape}" for manner in ("please", "kindly", "ahem")] for colour, shape in TASKS]
DESCRIBED = [vectors(some) for some in TEXTS]
TRANSFER = np.array([[1.0 * (a == c) + 0.2 * (b == d) for c, d in TASKS] for a, b in TASKS], np.float32)


@pytest.fixture(scope="module")
def learned() -> Similarity:
    return fit_similarity(DESCRIBED, TRANSFER, space=SPACE, width=WIDTH, dim=8, heads=4, channels=8, steps=120)


# --- token states -------------------------------------------------------------------------------------------------


def test_the_mean_of_the_last_layers_states_is_the_sentences_vector() -> None:
    texts = ["a tilted picture of a digit", "upside down"]
    states = token_states(layers=6, places=12)
    found = parted(states.encode(texts), text().dim)
    for row, wanted in zip(found, text().encode(texts), strict=True):
        mean = row[row.abs().sum(dim=1) > 0].mean(dim=0)
        assert torch.allclose(mean / mean.norm(), torch.from_numpy(wanted), atol=1e-5)


def test_token_states_are_unit_vectors_and_say_their_width() -> None:
    states = token_states(layers=2, places=5)
    found = states.encode(["one", "many more words than there are places in all"])
    assert found.shape == (2, states.dim)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert token_width(states.space, states.dim) == text().dim
    assert token_width(text().space, text().dim) == text().dim
    assert (parted(found, text().dim)[0].abs().sum(dim=1) > 0).tolist() == [True] * 3 + [False] * 2


def test_token_states_need_an_encoder_that_has_them() -> None:
    class Plain:
        space, dim = "plain", 3

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            return np.zeros((len(texts), 3), np.float32)

    with pytest.raises(RetrievalError, match="'plain' gives no token states"):
        token_states(Plain())
    with pytest.raises(BadOption, match="layers is 7"):
        token_states(layers=7)


def test_a_spaces_name_finds_its_encoder() -> None:
    plain = text()
    assert matching(plain.space, plain) is plain
    assert matching(token_states(layers=2).space, plain).space == token_states(layers=2).space
    with pytest.raises(RetrievalError, match="'text' makes no vectors of the space 'other:tokens-2x384'"):
        matching("other:tokens-2x384", plain)


# --- the reader ---------------------------------------------------------------------------------------------------


def test_empty_places_say_nothing() -> None:
    reader = Reader(WIDTH, 5, heads=2, channels=3).eval()
    few, many = (parted(vectors(["red disc", "gold cone here"], width), WIDTH) for width in (3, 9))
    reader.settle(few)
    assert torch.allclose(reader(few), reader(many), atol=1e-6)


def test_a_reader_of_one_place_is_linear_in_the_direction() -> None:
    reader = Reader(WIDTH, 5).eval()
    one, other = torch.randn(2, 1, 1, WIDTH)
    sides = [part / part.norm() * WIDTH**0.5 for part in (one, other)]
    middle = (sides[0] + sides[1]) / 2
    whole = reader(middle * WIDTH**0.5 / middle.norm()) - reader(0 * one)
    assert torch.isfinite(whole).all()
    length = middle.norm() / WIDTH**0.5
    parts = [(reader(side) - reader(0 * one)) / 2 for side in sides]
    assert torch.allclose(whole * length, parts[0] + parts[1], atol=1e-5)


def test_vectors_that_do_not_divide_into_tokens() -> None:
    with pytest.raises(RetrievalError, match=r"shape \(2, 13\); expected a multiple of 12"):
        parted(np.zeros((2, 13), np.float32), 12)


def test_strange_tokens_stand_behind_the_descriptions_own() -> None:
    reader, states = Reader(WIDTH, 5), parted(vectors(["red disc", "gold cone here"]), WIDTH)
    reader.settle(states)
    found = reader.among_strange(states)
    assert torch.equal(found[:, :PLACES], states)
    lengths = found[:, PLACES:].norm(dim=2)
    assert {round(float(length), 4) for length in lengths.flatten()} == {0.0, 1.0}
    sentences = torch.randn(3, 1, WIDTH)
    assert reader.among_strange(sentences) is sentences


def test_without_the_places_that_no_text_uses_the_same_is_read() -> None:
    reader, states = (
        Reader(WIDTH, 5).eval(),
        [parted(vectors([said], 9), WIDTH) for said in ("red disc", "gold cone here")],
    )
    reader.settle(torch.cat(states))
    short = shortened(states)
    assert [one.shape for one in short] == [(1, 3, WIDTH)] * 2
    assert torch.allclose(reader(torch.cat(short)), reader(torch.cat(states)), atol=1e-6)


# --- learning -----------------------------------------------------------------------------------------------------


def test_tasks_that_were_left_out_find_an_expert_that_serves_them() -> None:
    """Half of the experts share no word but the manner: the plain cosine falls for those that share the shape too."""
    given = {"width": WIDTH, "dim": 8, "heads": 4, "channels": 8, "steps": 120}
    parts = folded(DESCRIBED, TRANSFER, folds=4, **given)
    assert sorted(place for out, _ in parts for place in out) == list(range(16))
    found = ranked(DESCRIBED, TRANSFER, parts)
    assert found.better
    assert found.learned > 0.9 * found.best
    assert found.mean < found.plain < found.best


def test_the_learned_order_is_the_measured_one(learned: Similarity) -> None:
    keys = np.stack([learned.project(some).mean(axis=0) for some in DESCRIBED])
    asked = learned.project(vectors(["well red ring"]))[0]
    order = np.argsort(-(keys @ asked))
    assert {TASKS[place][0] for place in order[:4]} == {"red"}
    assert TASKS[order[0]] == ("red", "ring")


def test_equal_seeds_give_equal_bytes_and_touch_no_global_chance(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    files = []
    for name in ("one", "two"):
        made = fit_similarity(DESCRIBED, TRANSFER, width=WIDTH, dim=4, heads=2, channels=4, steps=3, seed=2)
        files.append(made.save(tmp_path / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1]
    assert torch.equal(torch.rand(3), wanted)


def test_saved_and_read(learned: Similarity, tmp_path: Path) -> None:
    path = learned.save(tmp_path / "similarity.safetensors")
    again = load(path)
    assert (again.space, again.width, again.sizes, again.ranking) == (SPACE, WIDTH, (8, 4, 8), None)
    assert np.array_equal(again.project(DESCRIBED[3]), learned.project(DESCRIBED[3]))
    with pytest.raises(TargetExists):
        learned.save(path)


def test_the_validation_is_kept(tmp_path: Path) -> None:
    given = {"width": WIDTH, "dim": 4, "heads": 2, "channels": 4, "steps": 5, "folds": 2}
    made = fit_similarity(DESCRIBED, TRANSFER, **given)
    assert made.ranking is not None
    assert load(made.save(tmp_path / "a.safetensors")).ranking == made.ranking


@pytest.mark.parametrize("damage", ["cut", "other", "rewritten"])
def test_a_damaged_file_is_told_in_one_line(learned: Similarity, tmp_path: Path, damage: str) -> None:
    path = learned.save(tmp_path / "similarity.safetensors")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(whole.replace(b"[8, 4, 8]", b"[8, 4, 9]"))
    with pytest.raises(FormatError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "similarity.safetensors" in str(caught.value)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadOption, match=r"shape \(16, 15\) for 16 tasks"):
        fit_similarity(DESCRIBED, TRANSFER[:, :15], width=WIDTH)
    with pytest.raises(BadOption, match="steps 0"):
        fit_similarity(DESCRIBED, TRANSFER, width=WIDTH, steps=0)
    with pytest.raises(BadOption, match="9 folds of 16"):
        folded(DESCRIBED, TRANSFER, folds=9, width=WIDTH)
