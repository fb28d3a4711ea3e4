"""Two or more workers for merging.py: what they are told to do comes back in order, nothing is measured twice."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from merging_experts import Expert, seconds_of
from merging_judge import Job, Outcome, Workplace, enter, judged, trained

Measure = Callable[[Sequence[Job]], list[Outcome]]


@contextmanager
def crew(place: Workplace, workers: int) -> Iterator[Executor]:
    """Workers that use one thread each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=fresh, initializer=enter, initargs=(place,)) as pool:
        yield pool


def train_missing(experts: Iterable[Expert], place: Workplace, tasks: Sequence[str], pool: Executor) -> float:
    """Trains what the folder lacks. The seconds of one thread that all of them took, now or when they were trained."""
    experts = list(experts)
    missing = [expert for expert in experts if seconds_of(expert, place.room, place.steps) is None]
    for done in [pool.submit(trained, expert, tasks) for expert in missing]:
        print(f"  {done.result()}", flush=True)
    return sum(seconds_of(expert, place.room, place.steps) or 0.0 for expert in experts)


def measurer(pool: Executor) -> Measure:
    """Carries jobs out on all workers; a job that was done before is looked up."""
    known: dict[Job, Outcome] = {}

    def measure(jobs: Sequence[Job]) -> list[Outcome]:
        new = [job for job in dict.fromkeys(jobs) if job not in known]
        known.update(zip(new, pool.map(judged, new), strict=True))
        return [known[job] for job in jobs]

    return measure
