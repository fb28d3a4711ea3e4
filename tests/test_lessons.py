"""What pupils learn from: batches that follow from the generator, losses that follow from the batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import painter, reader
from lorahub.generate.experts import generator
from lorahub.generate.lessons import cuts, flow_matching, label_names, noising, sorting
from lorahub.hub.errors import BadOption
from torch import Tensor, nn


@pytest.mark.parametrize("cost", [0.0, 3.0, 12.5, 1e9])
def test_cuts_take_the_least_work(cost: float) -> None:
    lengths = [17, 16, 9, 9, 8, 3, 2, 2]

    def work(parts: Sequence[tuple[int, int]]) -> float:
        return sum(lengths[first] * (last - first) + cost for first, last in parts)

    every = []
    for chosen in product([False, True], repeat=len(lengths) - 1):
        edges = [0, *(place + 1 for place, cut in enumerate(chosen) if cut), len(lengths)]
        every.append(list(pairwise(edges)))
    assert work(cuts(lengths, cost)) == min(map(work, every))
    assert cuts([4, 4, 4], cost) == [(0, 3)]
    assert cuts(lengths, cost) in every


def test_padding_does_not_show() -> None:
    one = reader()
    batches = [one.draw(0, generator(seed, "any")) for seed in range(6)]
    wanted = torch.stack([one.alone(one.model.eval(), batch) for batch in batches])
    torch.testing.assert_close(label_names(one.model, batches), wanted, rtol=1e-5, atol=1e-5)
    wider = [replace(batch, ids=nn.functional.pad(batch.ids, (0, 5), value=7)) for batch in batches]
    torch.testing.assert_close(label_names(one.model, wider), wanted, rtol=1e-5, atol=1e-5)
    softer = functools.partial(label_names, sharpness=1e-4)(one.model, batches[:1])
    assert float(softer) == pytest.approx(float(torch.tensor(len(batches[0].ids) - 3).log()), rel=1e-3)


def test_sentences_are_drawn_evenly_over_labels() -> None:
    texts = {"a": 1, "bb": 2, "ccc": 3, "label one": 9, "label two": 9}

    def tokens(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.full((texts[text],), number + 1) for number, text in enumerate(sentences)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids, (ids > 0).long()

    model: Any = SimpleNamespace(tokens=tokens)
    draw = sorting(model, ["a", "bb", "ccc"], [0, 1, 1], ["label one", "label two"], size=400)
    batch = draw(0, generator(1, "x"))
    assert torch.equal(batch.ids, draw(0, generator(1, "x")).ids)
    assert batch.ids[-2:, 0].tolist() == [4, 5]
    assert torch.equal(batch.targets, (batch.ids[:-2, 0] > 1).long())
    shares = [(batch.ids[:-2, 0] == number).float().mean().item() for number in (1, 2, 3)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.07)
    assert batch.lengths.tolist() == (batch.ids > 0).sum(dim=1).tolist()
    for sentences, targets in ((["a"], [0, 1]), (["a", "bb"], [0, 0]), (["a", "bb"], [0, 2])):
        with pytest.raises(BadOption, match="a sentence for every label"):
            sorting(model, sentences, targets, ["label one", "label two"])


def test_noise_is_the_formula() -> None:
    pictures, words = torch.randn(5, 3, 2, 2), {"words": torch.arange(1.0, 6.0)[:, None]}
    draw = noising(pictures, words, size=2000, empty={"words": torch.zeros(1, 1)}, dropout=0.25)
    batch = draw(0, generator(0, "x"))
    time = batch.time[:, None, None, None]
    chosen = batch.conditions["words"].flatten()
    kept = chosen > 0
    picture = batch.value - time * batch.aim  # (1 - t) x + t n - t (n - x)
    torch.testing.assert_close(picture[kept], pictures[chosen[kept].long() - 1], atol=1e-5, rtol=1e-5)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.04)
    assert float((batch.aim + picture).std()) == pytest.approx(1.0, abs=0.03)
    assert float(batch.time.logit().std()) == pytest.approx(1.0, abs=0.1)
    even = noising(pictures, words, size=2000, times="uniform")(0, generator(0, "x")).time
    assert float(even.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_noising_and_flow_matching_check_what_they_get() -> None:
    pictures = torch.zeros(2, 3, 8, 8)
    for words, given, message in (
        ({"words": torch.zeros(3, 1)}, {}, "2 pictures and 3 of words"),
        ({"words": torch.zeros(2, 1)}, {"dropout": 0.1}, "nothing to put in place of words"),
        ({"words": torch.zeros(2, 1)}, {"times": "never"}, "expected logit-normal or uniform"),
    ):
        with pytest.raises(BadOption, match=message):
            noising(pictures, words, **given)
    uneven = [noising(pictures, {}, size=size)(0, torch.Generator()) for size in (1, 2)]
    with pytest.raises(BadOption, match="the same for every adapter"):
        flow_matching(painter().model, uneven)
