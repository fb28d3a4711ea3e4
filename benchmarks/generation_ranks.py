"""Controls of the generation benchmark for rank: what a hypernetwork makes has more of it than the experts have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from generation_cell import Cell
from generation_rows import Desk, Made, Row
from generation_training import Trainer


def _trainer(cell: Cell) -> Trainer:
    """The world's, at the rank of what the hypernetwork makes, and scaled down as that rank wants it (rsLoRA,
    arXiv 2312.03732)."""
    known, rank = cell.world.trainer, cell.plan.hyper_rank * cell.plan.hyper_members
    return replace(known, rank=rank, scale=known.scale * (known.rank / rank) ** 0.5)


def _everything(desk: Desk) -> Made:
    cell, trainer = desk.cell, _trainer(desk.cell)
    vector = cell.world.multitask(trainer)
    return Made(vector.expand(len(cell.held), 1, -1), cell.trying(trainer.layout))


def _oracle(desk: Desk) -> Made:
    cell, trainer, effort = desk.cell, _trainer(desk.cell), desk.cell.plan.effort
    recipe = cell.recipe(
        oracles=[trainer.rank, trainer.scale], held=cell.split.held, effort=[effort.experts, effort.every]
    )
    draws = {one.task.name: cell.world.learning(one.place, effort.experts[1]) for one in cell.held}
    made = cell.room.tensors(
        "oracles",
        recipe,
        lambda: trainer.experts(draws, effort, start=cell.setting.start, seed=cell.setting.seed),
    )
    return Made(made["vectors"][:, -1:], cell.trying(trainer.layout))


def _row(name: str, make: Callable[[Desk], Made], *, peeks: bool = False) -> Row:
    return Row(f"{name}, of the hypernetwork's rank", make, only=("A", "B", "turns"), peeks=peeks, version=4)


RANK_ROWS = (_row("multi-task adapter", _everything), _row("oracle", _oracle, peeks=True))
