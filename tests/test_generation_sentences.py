"""The sentences of the generation benchmark: domains that are held out whole, and what no task may learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_cells
import torch
from learning import reader
from lorahub.generate.sentences import unit_means
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# --- words and splits ---------------------------------------------------------------------------------------------


def test_every_task_has_words_of_its_own_and_queries_are_no_descriptions() -> None:
    from generation_sentences import every_task

    small_cells.words_are_apart(every_task(), 51)


def test_whole_domains_of_sentences_are_held_out() -> None:
    from generation_sentences import HELD, every_task, split

    tasks, outs = every_task(), []
    for number in range(3):
        found = split(tasks, number)
        assert sorted(found.taught + found.held) == list(range(len(tasks)))
        assert len(found.held) >= 10
        out = {tasks[place].domain for place in found.held}
        left = {tasks[place].domain for place in found.taught}
        assert not out & left
        kinds = [next(one.kind for one in tasks if one.domain == domain) for domain in out]
        assert {kind: kinds.count(kind) for kind in kinds} == HELD
        assert {one.kind for one in tasks} == {tasks[place].kind for place in found.taught}
        outs.append(out)
    assert not any(one & other for one, other in combinations(outs, 2))
    assert split(tasks, 0) == split(tasks, 0)


def test_a_brief_run_has_all_parts() -> None:
    from generation import settings
    from generation_sentences import BRIEF, every_task, split

    tasks = [one for one in every_task() if one.domain in BRIEF.only]
    assert {one.domain for one in tasks} == set(BRIEF.only)
    found = split(tasks, 0)
    assert len(found.held) >= 2
    assert len(found.taught) * (BRIEF.folds - 1) // BRIEF.folds >= 3  # that a fold's similarity is fitted to
    every = settings(3, 1, quick=False, world="sentences")
    assert [one.start for one in every] == ["shared"] * 3 + ["independent"]


# --- data ---------------------------------------------------------------------------------------------------------


def _task(name: str, source: str, labels: tuple[str, ...] = ()) -> Any:
    from generation_sentences import Sentences

    return Sentences(name, "request", name, source, "", labels, (f"told {name}",), (f"asked {name}",))


def test_no_task_learns_from_what_any_task_is_tested_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import generation_sentences

    def reads(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Any:
        return "", lambda folder, part, labels: (train, test)

    monkeypatch.setattr(
        generation_sentences,
        "READERS",
        {
            "one": reads([("a good film .", "x"), ("kept", "x"), ("of no label", "z"), ("w " * 31, "y")], [("t", "x")]),
            "other": reads([("own", "x"), ("t", "y"), ("shown", "y")], [("A good film.", "x"), ("u", "y")]),
        },
    )
    found = generation_sentences.read(Path(), [_task("a", "one", ("x", "y")), _task("b", "other")])
    assert found["a"].train == [("kept", "x")]
    assert sorted(found["b"].train) == [("own", "x"), ("shown", "y")]
    assert found["b"].labels == ("x", "y")


def test_moods_are_those_that_are_clear(tmp_path: Path) -> None:
    from generation_sentences import HELD_OUT, rated

    lines = [f"{n}\t{score}\tsentence {n}" for n, score in enumerate([2.5, -1.0, 0.9, -0.4, 1.0] * 100)]
    (tmp_path / "some.txt").write_text("\r\n".join(lines) + "\n", encoding="utf-8")
    train, test = rated(tmp_path, "some.txt", ("bad", "good"))
    assert len(test) == HELD_OUT
    assert len(train) + len(test) == 300
    assert all((label == "bad") == (int(said.split()[1]) % 5 == 1) for said, label in train + test)


def test_hits_are_counted_one_text_at_a_time() -> None:
    from lorahub.generate.experts import generator
    from lorahub.generate.lessons import label_hits

    one = reader()
    batches = [one.draw(0, generator(seed, "any")) for seed in range(8)]

    def alone(batch: Any) -> float:
        texts = [ids[:length][None] for ids, length in zip(batch.ids, batch.lengths, strict=True)]
        vectors = torch.cat([one.model(input_ids=text).last_hidden_state.mean(dim=1) for text in texts])
        cosines = nn.functional.cosine_similarity(vectors[:3, None], vectors[None, 3:], dim=-1)
        return float((cosines.argmax(dim=1) == batch.targets).float().mean())

    one.model.eval()
    assert label_hits(one.model, batches).tolist() == pytest.approx([alone(batch) for batch in batches])


# --- cells that are hardly trained --------------------------------------------------------------------------------


def _tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    words = ["", "yes", "no", *"abcdefgh"]
    rows = [torch.tensor([words.index(word) for word in said.replace(",", " ").split()]) for said in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (ids > 0).long()


@torch.no_grad()
def _embedded(encoder: Any, texts: Sequence[str]) -> Tensor:
    ids, mask = _tokens(texts)
    return unit_means(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cell of ten tasks with two labels, on a small encoder with random weights."""
    import generation_rehearsal
    import generation_sentences

    tasks = tuple(
        replace(_task(f"{kind} {number}", kind, ("yes", "no")), kind=kind, domain=f"{kind} {number // 2}")
        for kind, count in (("request", 4), ("desk", 4), ("alone", 2))
        for number in range(count)
    )
    pairs = [(f"{label} {word}", label) for word in "abcdefgh" for label in ("yes", "no")]
    read = ("", lambda folder, part, labels: (pairs[:12], pairs[12:]))
    encoder = reader().model.eval().requires_grad_(False)
    model = SimpleNamespace(encoder=encoder, tokens=_tokens, embed=partial(_embedded, encoder))
    monkeypatch.setattr(generation_sentences, "every_task", lambda: tasks)
    monkeypatch.setattr(generation_sentences, "READERS", dict.fromkeys(("request", "desk", "alone"), read))
    monkeypatch.setattr(generation_sentences, "SentenceModel", lambda: model)
    monkeypatch.setattr(generation_sentences, "_meanings", lambda: {"yes": "a b, yes h", "no": "c d, no h"})
    monkeypatch.setattr(generation_rehearsal, "text", lambda: small_cells.Words("text", 8))
    return small_cells.hardly_trained("sentences", tmp_path, monkeypatch)


def test_only_rows_that_peek_look_at_test_samples(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cells.only_rows_that_peek_look_at_test_samples(small, monkeypatch)


def test_sentences_to_learn_from_and_to_be_tested_on_are_apart(small: Any) -> None:
    world = small.world
    drawn = [world.learning(0, 5)(step, torch.Generator().manual_seed(step)) for step in range(20)]
    ids = {tuple(row.tolist()) for one in drawn for row in one.ids[:5]}
    assert len(ids) == 12
    assert not ids & {tuple(row.tolist()) for row in world.tests(0, 4).ids[:4]}
    assert {tuple(row.tolist()) for row in world.probes(0, 4).ids[:4]} <= ids


def test_rehearsal_leaves_out_what_a_task_is_tested_on(small: Any) -> None:
    lesson = small.world.lesson(0)
    texts = {tuple(row[row > 0].tolist()) for row in lesson.ids[:-2]}
    said, _ = _tokens(["a b", "c d"])
    assert {tuple(row.tolist()) for row in said} <= texts
    assert not texts & {tuple(row[row > 0].tolist()) for row in _tokens(["yes h", "no h"])[0]}  # test sentences


def test_what_the_base_is_told_is_measured_as_by_hand(small: Any) -> None:
    world = small.world
    labels, pairs = ("yes", "no"), world._data(0).test[:4]
    names, meant = world._model.embed(labels), world._model.embed(["a b, yes h", "c d, no h"])
    centres = nn.functional.normalize(names + meant, dim=1)
    found = [labels[int((world._model.embed([said]) @ centres.T).argmax())] == label for said, label in pairs]
    assert world.without_adapter(0, 4) == pytest.approx(sum(found) / 4)


def test_a_cell_is_measured_once_and_packed(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = small_cells.measured_once_and_packed(small, monkeypatch)
    assert all(0 <= score <= 1 for row in found["rows"].values() for some in row["scores"] for score in some)


def test_libraries_of_one_start_begin_alike(small: Any) -> None:
    small_cells.libraries_of_one_start_begin_alike(small)


# --- choices, whatever the world ----------------------------------------------------------------------------------


def test_the_threshold_is_the_best_of_all_by_leave_one_out() -> None:
    from generation_methods import Sight, threshold

    chance = torch.Generator().manual_seed(3)
    keys = nn.functional.normalize(torch.randn(6, 4, generator=chance), dim=1)
    seen = [nn.functional.normalize(torch.randn(3, 4, generator=chance), dim=1).numpy() for _ in range(6)]
    transfer = torch.randn(6, 6, generator=chance)
    sight = Sight(keys, seen, [], [], [(tuple(range(6)), keys, seen)])
    least, gain = threshold(SimpleNamespace(transfer=transfer), sight)  # type: ignore[arg-type]

    def gained(limit: float) -> float:
        total = 0.0
        for place, some in enumerate(seen):
            for query in torch.from_numpy(some):
                others = [row for row in range(6) if row != place]
                best = max(others, key=lambda row: float(keys[row] @ query))
                total += float(transfer[best, place]) if float(keys[best] @ query) >= limit else 0.0
        return total / 18

    assert gained(least) == pytest.approx(gain)
    assert gain >= max(gained(limit) for limit in np.linspace(-1, 1, 200)) - 1e-6
    assert threshold(SimpleNamespace(transfer=-torch.ones(6, 6)), sight)[0] == float("inf")  # type: ignore[arg-type]


def test_ridge_is_ridge() -> None:
    from generation_methods import ridge
    from lorahub.generate.layout import Statistics

    chance = np.random.default_rng(0)
    vectors = [chance.standard_normal((3, 5)).astype(np.float32) for _ in range(8)]
    weights = [torch.from_numpy(chance.standard_normal((2, 7)).astype(np.float32)) for _ in range(8)]
    school: Any = SimpleNamespace(vectors=vectors, weights=weights, experts=range(8))
    queries = chance.standard_normal((4, 5)).astype(np.float32)
    last = torch.stack([some[-1] for some in weights])
    known = Statistics.of(last)
    texts, goals = np.concatenate(vectors).astype(float), known.standardise(last).double().numpy().repeat(3, axis=0)
    apart, mean = texts - texts.mean(0), goals.mean(0)
    fits = []
    for strength in (0.01, 0.1, 1.0, 10.0):
        gram = apart.T @ apart
        gram += strength * np.diag(gram).mean() * np.eye(5)
        made = (queries - texts.mean(0)) @ np.linalg.solve(gram, apart.T @ (goals - mean)) + mean
        fits.append(known.restore(torch.from_numpy(made).float()))
    assert any(torch.allclose(ridge(school)(queries), fit, atol=1e-4) for fit in fits)
