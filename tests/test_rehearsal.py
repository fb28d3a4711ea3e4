"""Rehearsal: the steps are Adam's on each adapter's own loss, and labels that say nothing come to mean their words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import typed
from learning import squares
from lorahub.generate.experts import cosine
from lorahub.generate.hypernet import Trial
from lorahub.generate.layout import Layout
from lorahub.generate.rehearsal import Label, checked, label_file, lesson, read_label, rehearse, rehearsed, texts
from lorahub.generate.sentences import SentenceModel, SentenceTask
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters, LoraHubError
from lorahub.hub.lowrank import LowRank
from lorahub.hub.reading import read
from torch import Tensor, nn

LABELS = [
    Label("first pile", "is about the weather, rain and sunshine"),
    Label("second pile", "is about football, goals and players"),
    Label("third pile", "is about cooking, meals and recipes"),
]
SENTENCES = (
    "it will pour all afternoon", "clouds clear up by noon", "a storm is coming from the west", "how hot does it get",
    "the striker scored twice", "our keeper saved the penalty", "they lost the final", "the referee blew the whistle",
    "fry the onions first", "how long do I boil pasta", "a pinch of salt is missing", "bake it in the oven",
)  # fmt: skip
TASK = SentenceTask(
    "piles", "Sorts into piles.", tuple(label.name for label in LABELS), SENTENCES,
    tuple(row for row in range(3) for _ in range(4)), "made up", "CC0",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SentenceModel:
    return SentenceModel()


def fresh(name: str = "encoder.layer.{}.attention.self.value", layers: Sequence[int] = range(6)) -> Adapter:
    chance = torch.Generator().manual_seed(0)
    modules = {
        name.format(at): LowRank(torch.randn(4, 384, generator=chance) / 20, torch.zeros(384, 4)) for at in layers
    }
    return Adapter(modules, meta={"name": "fresh"})


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_label_is_read_at_its_first_colon() -> None:
    assert read_label(" billing : asks about: an invoice ") == Label("billing", "asks about: an invoice")
    for said in ("billing", "billing:", ": asks", ""):
        with pytest.raises(BadOption, match="expected NAME: MEANING"):
            read_label(said)


def test_a_file_of_labels_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("# piles\n\none: of them\n  two :of: these\n", encoding="utf-8")
    assert label_file(path) == [Label("one", "of them"), Label("two", "of: these")]
    path.write_text("one: of them\nnothing\n", encoding="utf-8")
    with pytest.raises(BadOption, match=r"labels\.txt, line 2: label 'nothing': expected NAME: MEANING"):
        label_file(path)
    path.write_bytes(b"one: \xff\n")
    for bad in (path, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FormatError, match=rf"{bad}: cannot be read \(.*expected lines NAME: MEANING"):
            label_file(bad)


def test_a_meaning_is_rehearsed_whole_in_parts_and_without_the_first_words() -> None:
    assert texts("asks for the bill, how much is owed; money") == [
        "asks for the bill, how much is owed; money", "asks for the bill", "how much is owed",
        "for the bill, how much is owed; money", "for the bill", "much is owed",
    ]  # fmt: skip
    assert texts("greets") == ["greets"]
    assert texts("says hello") == ["says hello"]


def test_labels_are_two_or_more_and_different() -> None:
    assert checked(LABELS) == LABELS
    for some, told in ((LABELS[:1], "first pile"), ([], "none"), ([*LABELS, LABELS[0]], "first pile, second")):
        with pytest.raises(BadOption, match=f"the labels are {told}"):
            checked(some)


def test_a_lesson_holds_every_text_with_its_label_and_the_names_last(model: SentenceModel) -> None:
    batch = lesson(model, LABELS)
    counts = [len(texts(label.meaning)) for label in LABELS]
    assert batch.targets.tolist() == [row for row, count in enumerate(counts) for _ in range(count)]
    names, mask = model.tokens([label.name for label in LABELS])
    assert torch.equal(batch.lengths[-3:], mask.sum(dim=1))
    assert torch.equal(batch.ids[-3:, : names.shape[1]], names)
    less = lesson(model, LABELS, barred=lambda text: text == "goals and players")
    assert less.targets.tolist().count(1) == counts[1] - 1


# --- steps ----------------------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, Layout, Tensor, list[tuple[Tensor, Tensor]]]:
    chance = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval().requires_grad_(False)
    modules = {"0": LowRank(torch.zeros(2, 6), torch.zeros(5, 2)), "2": LowRank(torch.zeros(2, 5), torch.zeros(3, 2))}
    layout = Layout.of([Adapter(modules)])
    data = [(torch.randn(4, 6, generator=chance), torch.randn(4, 3, generator=chance)) for _ in range(3)]
    return base, layout, torch.randn(3, layout.size, generator=chance) / 3, data


def test_the_steps_are_adams_on_the_changed_weights() -> None:
    base, layout, vectors, data = small()
    found, losses = rehearsed(Trial(base, layout), vectors, squares, data, steps=7, rate=0.02)
    for row, (values, wanted) in enumerate(data):
        leaf = vectors[row].clone().requires_grad_()
        optimizer = torch.optim.Adam([leaf], lr=0.02)
        rates = cosine(optimizer, 7)
        for step in range(7):
            weights = {}
            for place in layout.places:
                down, up = place.factors(leaf)
                weights[f"{place.name}.weight"] = base.get_parameter(f"{place.name}.weight") + up @ down
            loss = (torch.func.functional_call(base, weights, (values,)) - wanted).square().mean()
            assert torch.isclose(losses[step, row], loss, atol=1e-6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        assert torch.allclose(found[row], leaf.detach(), atol=1e-5)


def test_what_an_adapter_becomes_does_not_depend_on_the_others() -> None:
    base, layout, vectors, data = small()
    trial, before = Trial(base, layout), vectors.clone()
    together, _ = rehearsed(trial, vectors, squares, data, steps=5, rate=0.02)
    alone = [
        rehearsed(trial, vectors[row : row + 1], squares, data[row : row + 1], steps=5, rate=0.02)[0]
        for row in (0, 1, 2)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.equal(vectors, before)


def test_what_makes_no_sense_is_refused(model: SentenceModel) -> None:
    base, layout, vectors, data = small()
    trial = Trial(base, layout)
    for given in ({"steps": 0}, {"rate": 0.0}):
        with pytest.raises(BadOption, match="expected at least 1 step, a rate above 0"):
            rehearsed(trial, vectors, squares, data, **given)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="2 batches for 3 adapters"):
        rehearsed(trial, vectors, squares, data[:2])
    broken = [(torch.full((4, 6), torch.nan), wanted) for _, wanted in data]
    with pytest.raises(LoraHubError, match="second: the loss is nan after 0 steps"):
        rehearsed(trial, vectors, squares, [data[0], broken[1], data[2]], names=["first", "second", "third"])
    with pytest.raises(IncompatibleAdapters, match="no linear layer"):
        rehearse(model, fresh("decoder.{}"), LABELS)


# --- sentences ------------------------------------------------------------------------------------------------------


def test_labels_that_say_nothing_come_to_mean_their_words(model: SentenceModel) -> None:
    before = model.accuracy(None, TASK)
    done = rehearse(model, fresh(), LABELS)
    assert before <= 0.5
    assert model.accuracy(done.adapter, TASK) > 0.8
    assert done.before > 1.0 > 0.2 > done.after
    assert {name: part.rank for name, part in done.adapter.modules.items()} == dict.fromkeys(fresh().modules, 8)
    again = rehearse(model, fresh(), LABELS)
    assert all(torch.equal(again.adapter.modules[n].up, part.up) for n, part in done.adapter.modules.items())


def test_generate_rehearses_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    example = Path(__file__).resolve().parents[1] / "cli" / "example"
    some = sorted(path.parent for path in example.glob("*/adapter_config.json"))[:5]
    assert typed("add", *some)[0] == 0
    asked = ["generate", "Sorts sentences into three piles", "--force", "--json", "--out"]
    labels = [word for label in LABELS for word in ("--label", f"{label.name}: {label.meaning}")]
    plain, out = tmp_path / "plain", tmp_path / "out"
    code, said, _ = typed(*asked, plain)
    assert code == 0
    assert json.loads(said)["rehearsal"] is None
    (tmp_path / "labels.txt").write_text(f"{LABELS[2].name}: {LABELS[2].meaning}\n", encoding="utf-8")
    code, said, _ = typed(*asked, out, *labels[:4], "--labels", tmp_path / "labels.txt")
    told = json.loads(said)["rehearsal"]
    assert code == 0
    assert [Label(**label) for label in told["labels"]] == LABELS
    assert told["loss"][1] < told["loss"][0]
    assert told["moved"] > 0
    assert "rehearsed, for 40 steps" in (out / "README.md").read_text(encoding="utf-8")
    sentences = SentenceModel()
    assert sentences.accuracy(read(out), TASK) > 0.8 > 0.6 > sentences.accuracy(read(plain), TASK)
    code, _, said = typed(*asked[:3], "--dry-run", "--out", tmp_path / "no", *labels)
    assert code == 0
    assert "generator fit --kind multitask" in said
    code, _, said = typed("generate", "Sorts", "--out", tmp_path / "no", "--label", "one: of them")
    assert (code, said.count("\n")) == (1, 0)
    assert "expected at least two" in said
    assert not (tmp_path / "no").exists()
