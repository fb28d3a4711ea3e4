"""Every expert on every task: many in one pass equal to one by one, kept, and measured once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import typed
from lorahub.generate.measuring import accuracies, fitting, task_digest, thinned
from lorahub.generate.sentences import SentenceModel, load_tasks
from lorahub.hub.adapter import Adapter
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import BadOption
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save
from lorahub.index import own_similarity
from sorters import BASE, MODULE, TOPICS, sorter, world


@pytest.fixture(scope="module")
def model() -> SentenceModel:
    return SentenceModel()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    return tmp_path / "shelf"


# --- many at once -------------------------------------------------------------------------------------------------


def test_many_in_one_pass_equal_one_by_one(model: SentenceModel, tmp_path: Path) -> None:
    task = load_tasks(world(tmp_path, "fruit"))["fruit"]
    adapters = [sorter(seed, size=3.0) for seed in range(4)] + [sorter(9, size=3.0, rank=2)]
    found = accuracies(model, adapters, task)
    assert found == pytest.approx([model.accuracy(one, task) for one in (None, *adapters)])
    assert len(set(found)) > 1
    assert accuracies(model, [], task) == pytest.approx([model.accuracy(None, task)])


def test_a_part_of_a_task_is_even_and_has_another_digest(tmp_path: Path) -> None:
    task = load_tasks(world(tmp_path, "fruit"))["fruit"]
    part = thinned(task, 2)
    assert part.sentences == (task.sentences[0], task.sentences[3])
    assert part.targets == (0, 1)
    assert thinned(task, 4) is thinned(task, None) is task
    assert task_digest(part) != task_digest(task)
    with pytest.raises(BadOption):
        thinned(task, 0)


def test_an_adapter_of_another_shape_is_left_out_by_name(
    model: SentenceModel, caplog: pytest.LogCaptureFixture
) -> None:
    odd = Adapter(
        {MODULE: LowRank(sorter(0).modules[MODULE].down, sorter(0).modules[MODULE].up[:5])}, BASE, meta={"name": "odd"}
    )
    assert list(fitting(model, {"a": sorter(0), "b": odd})) == ["a"]
    assert "odd is left out" in caplog.text


# --- the command --------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(shelf: Path, tmp_path: Path, model: SentenceModel) -> None:
    tasks = world(shelf, "fruit", "weather", "pets")
    typed("add", shelf / "fruit", shelf / "weather")
    command = ("generator", "measure", "--tasks", tasks, "--json")
    code, out, error = typed(*command)
    assert code == 0, error
    first = json.loads(out)
    assert (first["tasks"], first["experts"], first["measured"], first["total"]) == (3, 2, 6, 6)
    assert first["similarity"] is None
    assert "2 experts" in first["said"]
    assert json.loads(typed(*command)[1])["measured"] == 0
    typed("add", shelf / "pets")
    assert json.loads(typed(*command)[1])["measured"] == 3
    with Catalog(tmp_path / "home") as catalog:
        table = {one.name: one for one in catalog.transfer("all-MiniLM-L6-v2")}
        known = {entry.name: entry for entry in catalog.entries()}
    assert table["fruit"].expert == known["fruit"].id
    assert table["fruit"].texts[:2] == ("Sorts sentences about fruit.", "what is said of fruit")
    assert table["fruit"].bare == model.accuracy(None, load_tasks(tasks)["fruit"])
    wanted = model.accuracy(sorter(1), load_tasks(tasks)["fruit"])
    assert table["fruit"].scores[known["weather"].id] == wanted
    told = json.loads(tasks.read_text())
    told[0]["targets"] = [1, 0, 1, 0]
    tasks.write_text(json.dumps(told))
    assert json.loads(typed(*command)[1])["measured"] == 3


def test_a_command_of_the_users_measures_any_base(shelf: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("low", "high")):
        save(
            Adapter({"a.b": LowRank(sorter(seed).modules[MODULE].down, sorter(seed).modules[MODULE].up)}, "tiny"),
            shelf / name,
        )
    typed("add", shelf)
    script = tmp_path / "score.py"
    script.write_text("import sys\nprint(len(sys.argv[1].split('/')[-1]) + len(sys.argv[2]) / 10)\n")
    command = f"{sys.executable} {script} {{adapter}} {{task}}"
    code, out, error = typed("generator", "measure", "--score", command, "--json")
    assert code == 0, error
    assert json.loads(out)["measured"] == 4
    assert json.loads(typed("generator", "measure", "--score", command, "--task", "odd", "--json")[1])["measured"] == 2
    with Catalog(tmp_path / "home") as catalog:
        [high, low, odd] = catalog.transfer("tiny")
        ids = {entry.name: entry.id for entry in catalog.entries()}
    assert low.scores == {ids["low"]: 3.3, ids["high"]: 4.3}
    assert (low.bare, low.expert, high.expert, odd.expert) == (0.3, ids["low"], ids["high"], None)
    for wrong in ("true", "true {adapter} {task}", "false {adapter} {task}"):
        code, _, said = typed("generator", "measure", "--score", wrong, "--task", "new")
        assert (code, len(said.strip().splitlines())) == (1, 1)
    code, _, said = typed("generator", "measure")
    assert (code, "--score" in said) == (1, True)


def test_a_similarity_is_learned_from_enough_and_used_only_where_it_is_better(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_similarity, "STEPS", 3)
    tasks = world(shelf)
    typed("add", shelf)
    code, out, error = typed("generator", "measure", "--tasks", tasks, "--json")
    assert code == 0, error
    told = json.loads(out)
    assert told["total"] == len(TOPICS) ** 2
    used = told["similarity"]["used"]
    assert used == (told["similarity"]["learned"] > told["similarity"]["plain"])
    rows = json.loads(typed("search", "--for-task", "what is said of pets", "--json")[1])
    assert {row["name"] for row in rows} == set(TOPICS)
    assert {row["by"] for row in rows} == {"learned" if used else "text"}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    if not used:
        assert rows[0]["name"] == "pets"
    code, out, said = typed("search", "--for-task", "what is said of pets", "--limit", "2")
    assert (code, len(said.strip().splitlines())) == (0, 1)
    assert "ranked by" in said
