"""A cell of the generation benchmark on a world that a test has made small, and what holds of every such cell."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

STEPS = {"semantic": 2, "icm": 1, "regression": 2, "hyper": 2, "similarity": 2}
FEW = {"probes": 2, "tests": 3, "choice": 2, "queries": 2, "only": (), "icm_stages": 4, "hyper_samples": 2}


class Words:
    """In place of the text model: every text has a direction of its own, the same in every process."""

    def __init__(self, space: str, dim: int) -> None:
        self.space, self.dim = space, dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [np.random.default_rng(zlib.crc32(said.encode())).standard_normal(self.dim) for said in texts]
        made = np.stack(rows).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)


def hardly_trained(world: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cell of the world, in which nothing takes long."""
    import generation_cell
    import generation_methods
    from generation_room import Room
    from generation_training import Training
    from generation_world import Setting, plan_of

    monkeypatch.setattr(generation_cell, "text", lambda: Words("text", 8))
    monkeypatch.setattr(generation_cell, "token_states", lambda places: Words("text:tokens-1x4", 12))
    monkeypatch.setattr(generation_methods, "NEIGHBOURS", (1, 2))
    monkeypatch.setattr(generation_methods, "TEMPERATURES", (0.05,))
    effort = Training((3, 2), (2, 8), checkpoints=2, every=1)
    plan = replace(plan_of(world, quick=True), effort=effort, **STEPS, **FEW)
    name: Any = world
    return generation_cell.Cell(Setting(name, "shared", 0, 0), plan, Room(room))


def only_rows_that_peek_look_at_test_samples(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every row."""
    import generation_rows

    desk, looked = generation_rows.Desk(cell), []
    kind = type(cell.world)
    whole = kind.tests
    monkeypatch.setattr(kind, "tests", lambda world, task, count: looked.append(task) or whole(world, task, count))
    names = []
    for row in generation_rows.rows(cell):
        looked.clear()
        made = row.make(desk)
        assert bool(looked) == (row.name == "best expert in hindsight"), row.name
        assert {made.vectors.shape[1]} <= {1, 2}, row.name
        assert len(made.vectors) == len(cell.held), row.name
        assert torch.isfinite(made.vectors).all(), row.name
        names.append(row.name)
    assert not [name for name in names if "strange" in name]
    assert set(cell.practice.draws) == {task.name for task in cell.taught}


def measured_once_and_packed(cell: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run that was stopped finds what it had; what it found."""
    import generation
    import generation_rows
    from generation_closed import packed

    some = [row for row in generation_rows.ROWS if row.name in {"base", "nearest expert", "blend of deltas", "oracle"}]
    monkeypatch.setattr(generation_rows, "rows", lambda cell: some)
    given = (cell.setting, cell.plan, cell.room.folder, cell.sources)
    found = generation.measured(*given)
    files = {path: path.stat().st_mtime_ns for path in cell.room.folder.iterdir()}
    assert generation.measured(*given) == found
    assert {path: path.stat().st_mtime_ns for path in cell.room.folder.iterdir()} == files
    assert found["held"] == [cell.world.tasks[place].name for place in cell.split.held]
    lines = {line["row"]: line for line in packed(cell)}
    assert lines["last checkpoints"]["kept"] == 1
    assert lines["mean checkpoints"]["bytes"] == cell.last.nbytes
    return found


def libraries_of_one_start_begin_alike(cell: Any) -> None:
    """And those of others do not; their oracles are the same adapters in the canonical layout."""
    from generation_cell import Cell

    alone = Cell(replace(cell.setting, start="independent"), cell.plan, cell.room, cell.sources)
    layout, first = cell.trained.layout, []
    for one in (cell, alone):
        downs = torch.stack([vectors[0][layout.tensors[0]] for vectors in one.trained.vectors])
        first.append(float((downs - downs.mean(dim=0)).norm() / downs.norm()))
    assert first[0] < 0.2 < 0.5 < first[1]  # a step or two from where they began
    assert alone.layout.gauge == "canonical"
    oracle, held = alone.oracles[0], alone.trained.vectors[alone.held[0].place, -1]
    made = [alone.layout.adapter(oracle), layout.adapter(held)]
    for name in made[0].modules:
        torch.testing.assert_close(made[0].modules[name].dense(), made[1].modules[name].dense(), atol=1e-5, rtol=1e-4)


def words_are_apart(tasks: Sequence[Any], count: int) -> None:
    """Every task has words of its own, and no query is a description."""
    assert len(tasks) == len({one.name for one in tasks}) == count
    told = [said for one in tasks for said in one.descriptions]
    asked = [said for one in tasks for said in one.queries]
    assert len(set(told)) == len(told)
    assert len(set(asked)) == len(asked)
    assert not {said.lower() for said in told} & {said.lower() for said in asked}
    assert all(len(one.descriptions) >= 4 and len(one.queries) == 3 for one in tasks)
