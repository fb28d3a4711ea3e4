"""The adapters that merging.py merges: trained from independent seeds, kept in a folder, read back as lorahub reads.

Of every seed there is one expert of rank 8 for each task, one of another rank where the mixed library asks for it, and
one adapter of an expert's rank that is trained on all tasks in turn.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from example_library import Lesson, train, write_adapter
from lorahub.generate.sentences import SentenceModel
from torch.nn.attention import SDPBackend, sdpa_kernel

RANK = 8
MIXED_RANKS = (2, 4, 8, 16)
QUICK_STEPS = 2
ALL = "all-tasks"
RECORD = "training.json"
SHARE = 0.5  # of the steps of its own expert that a task gets in an adapter for all tasks


@dataclass(frozen=True)
class Expert:
    """What is trained: a task (or ALL), a rank, a seed."""

    task: str
    rank: int
    seed: int

    def folder(self, room: Path) -> Path:
        return room / f"seed-{self.seed}" / f"{self.task}-r{self.rank}"


def uniform(tasks: Sequence[str], seed: int) -> tuple[Expert, ...]:
    """The seed's library of equal ranks."""
    return tuple(Expert(task, RANK, seed) for task in tasks)


def mixed(tasks: Sequence[str], seed: int) -> tuple[Expert, ...]:
    """The seed's library of mixed ranks: each rank equally often, dealt out by the seed."""
    ranks = [MIXED_RANKS[number % len(MIXED_RANKS)] for number in range(len(tasks))]
    random.Random(seed).shuffle(ranks)
    return tuple(Expert(task, rank, seed) for task, rank in zip(tasks, ranks, strict=True))


def multitask(seed: int) -> Expert:
    """Trained on everything, as small as one expert. (One as large as all experts together learned less steadily: one
    seed of three stayed far behind.)"""
    return Expert(ALL, RANK, seed)


def wanted(tasks: Sequence[str], seeds: int) -> list[Expert]:
    """All that a run needs, each once, the slow ones first."""
    every: dict[Expert, None] = {}
    every |= dict.fromkeys(multitask(seed) for seed in range(seeds))
    for build in (uniform, mixed):
        every |= dict.fromkeys(expert for seed in range(seeds) for expert in build(tasks, seed))
    return list(every)


def teach(model: SentenceModel, expert: Expert, lessons: Sequence[Lesson], room: Path, steps: int) -> str:
    """Trains one expert and writes its PEFT folder; a line that says so. steps: of an expert of one task."""
    start = time.perf_counter()
    seed = 1000 * expert.seed + 100 * len(lessons) + lessons[0].seed
    length = steps if len(lessons) == 1 else round(SHARE * steps * len(lessons))
    with sdpa_kernel(SDPBackend.MATH):  # a third faster here than the fused kernel, whose backward pass is slow
        state = train(model, lessons, seed, length, expert.rank)
    folder, seconds = expert.folder(room), round(time.perf_counter() - start, 1)
    write_adapter(folder, state, expert.rank)
    (folder / RECORD).write_text(json.dumps({"steps": steps, "seconds": seconds}) + "\n", encoding="utf-8")
    return f"trained {expert.task} of rank {expert.rank}, seed {expert.seed}: {seconds} s"


def seconds_of(expert: Expert, room: Path, steps: int) -> float | None:
    """How long a finished expert took; None where it is missing or was trained for another number of steps."""
    record = expert.folder(room) / RECORD
    if not record.exists():
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    return float(found["seconds"]) if found["steps"] == steps else None
