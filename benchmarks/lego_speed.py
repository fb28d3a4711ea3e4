"""How fast LoRA-LEGO is: its clustering against scikit-learn's k-means, and a whole merge against the disk.

(a) The rank-one terms of 8 adapters of rank 16 on one 4096 x 4096 layer (128 points of dimension 8192) in 16 clusters:
lorahub's k-means on inner products (with the time to make them) and scikit-learn's `KMeans(16, n_init=10)` on the
vectors themselves, in float32, in one process, in turn. `normal` terms have no structure; `kin` adapters share their
terms but for noise of half their length. Inertia is computed from the vectors in float64 for both. Scikit-learn's time
is the best that any of the thread counts gives; lorahub's rows run on one thread.

(b) 8 adapters of a 7B shape (224 modules, rank 16, float16) from disk to disk, as in `merge_speed.py`: merged by `lego`
and by the best approximation of the exact sum at the same rank, in a process of its own each. `read and write` reads
every module of the 8 files as a merge does and writes as large a result, and merges nothing; `copy` moves the bytes
only. Rows are run in turn, `repeats` times; times are medians, ratios medians over the turns. --quick takes 2 layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_speed import (
    COUNT,
    OUR_THREADS,
    RANK,
    SHAPES,
    WEIGHTS,
    copy_files,
    limit_threads,
    median_row,
    peak_memory,
    write_inputs,
)

if TYPE_CHECKING:
    import numpy as np
    from lorahub.hub.lowrank import LowRank
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

SIZE, RESTARTS = 4096, 10
SPEED_BAR, INERTIA_BAR, DISK_BAR = 20, 1.01, 5
NOISE = 0.5  # of the kin adapters' terms, relative to what they share
Row = dict[str, Any]


# --- (a) clustering, against scikit-learn ---------------------------------------------------------------------------


def parts_of(kind: str, seed: int) -> list[LowRank]:
    """COUNT deltas of rank RANK: of normally distributed terms, or of the same ones but for noise, in any order."""
    import torch
    from lorahub.hub.lowrank import LowRank

    chance = torch.Generator().manual_seed(seed)

    def normal() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(RANK, SIZE, generator=chance), torch.randn(SIZE, RANK, generator=chance)

    down, up = normal()
    parts = []
    for _ in range(COUNT):
        other_down, other_up = normal()
        if kind == "kin":
            order = torch.randperm(RANK, generator=chance)
            other_down = (down + NOISE * other_down)[order]
            other_up = (up + NOISE * other_up)[:, order]
        parts.append(LowRank(other_down, other_up))
    return parts


def inertia(vectors: Vectors, labels: Sequence[int]) -> float:
    """The sum of squared distances to the means of the clusters, by its definition."""
    import numpy as np

    wide, names = vectors.astype(np.float64), np.asarray(labels)
    return float(sum(((wide[names == c] - wide[names == c].mean(axis=0)) ** 2).sum() for c in np.unique(names)))


def our_clusters(parts: list[LowRank], seed: int) -> tuple[float, float, Any]:
    """Seconds for the inner products, seconds for k-means, labels of the terms in the order of `parts`."""
    import numpy as np
    from lorahub.merge.clustering import kmeans
    from lorahub.merge.stack import Stack

    began = time.perf_counter()
    stack = Stack.of(parts)
    downs, ups = stack.products
    gram = (downs + ups).numpy()
    made = time.perf_counter()
    labels = kmeans(gram, RANK, restarts=RESTARTS, seed=seed).labels
    done = time.perf_counter()
    back = np.argsort([index * RANK + term for index in stack.order for term in range(RANK)])
    return made - began, done - made, labels[back]


def clustering(kind: str, seed: int, threads: Sequence[int], repeats: int) -> Row:
    """One row of part (a)."""
    import torch
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    parts = parts_of(kind, seed)
    vectors = torch.cat([torch.cat([part.down, part.up.T], dim=1) for part in parts]).numpy()
    theirs = KMeans(RANK, n_init=RESTARTS, random_state=seed)
    ours: list[tuple[float, float]] = []
    seconds: dict[int, list[float]] = {count: [] for count in threads}
    labels: Any = None
    for turn in range(repeats + 1):  # the first turn warms up
        with threadpool_limits(OUR_THREADS):
            gram, search, labels = our_clusters(parts, seed)
        for count in threads:
            with threadpool_limits(count):
                began = time.perf_counter()
                theirs.fit(vectors)
                seconds[count].append(time.perf_counter() - began)
        ours.append((gram, search))
        if not turn:
            ours.clear()
            seconds = {count: [] for count in threads}
    best = min(threads, key=lambda count: statistics.median(seconds[count]))
    made, found = (statistics.median(figures) for figures in zip(*ours, strict=True))
    return {
        "row": kind,
        "gram_seconds": made,
        "kmeans_seconds": found,
        "seconds": made + found,
        "sklearn_seconds": statistics.median(seconds[best]),
        "sklearn_threads": best,
        "times_faster": statistics.median(seconds[best]) / (made + found),
        "inertia_ratio": inertia(vectors, labels) / inertia(vectors, theirs.labels_),
    }


# --- (b) a 7B shape, from disk to disk ------------------------------------------------------------------------------


def read_and_write(room: Path) -> None:
    """Every module of all inputs read as a merge reads them; the first input's factors written."""
    from dataclasses import replace

    import torch
    from lorahub.hub.adapter import Adapter, LazyModules
    from lorahub.hub.reading import read
    from lorahub.hub.writing import save

    inputs = [read(room / f"input-{index}") for index in range(COUNT)]

    def load(name: str) -> LowRank:
        parts = [one.modules[name] for one in inputs]
        return replace(parts[0], scale=1.0)

    result = Adapter(LazyModules(inputs[0].shapes, load), inputs[0].base, meta={"dtype": torch.float16})
    save(result, room / "written", force=True)


def merge_files(room: Path, method: str, given: Row) -> float:
    """A merge from disk to disk; the report's error."""
    from lorahub.hub.reading import read
    from lorahub.hub.writing import save
    from lorahub.merge.run import merge

    inputs = [read(room / f"input-{index}") for index in range(COUNT)]
    result = merge(inputs, method, WEIGHTS, given=given)
    save(result.adapter, room / "written", force=True)
    return result.report.total.error


def jobs(written: int) -> dict[str, Callable[[Path], float | None]]:
    """What is measured, by the names of the rows."""
    return {
        "copy": lambda room: copy_files(room, written) and None,
        "read and write": lambda room: read_and_write(room),
        "lego": lambda room: merge_files(room, "lego", {}),
        "lego, gauge=svd": lambda room: merge_files(room, "lego", {"gauge": "svd"}),
        f"exact, rank={RANK}": lambda room: merge_files(room, "exact", {"rank": RANK}),
    }


def child(room: Path, name: str, written: int) -> None:
    """One measurement in this process; prints JSON. Imports count in memory, not in time."""
    import lorahub.hub.writing
    import lorahub.merge.methods.exact
    import lorahub.merge.methods.lego
    import lorahub.merge.run  # noqa: F401

    limit_threads(OUR_THREADS)
    began, used = time.perf_counter(), time.process_time()
    error = jobs(written)[name](room)
    outcome = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    print(json.dumps({**outcome, **({} if error is None else {"error": error}), "peak_bytes": peak_memory()}))


def in_child(room: Path, name: str, written: int) -> Row:
    command = [sys.executable, __file__, "--child", name, "--written", str(written), "--room", str(room)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: Row = json.loads(done.stdout)
    return found


def disk_to_disk(layers: int, seed: int, repeats: int) -> list[Row]:
    """Rows of part (b)."""
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        write_inputs(room, layers, seed)
        os.sync()
        in_child(room, "read and write", 0)
        written = (room / "written" / "adapter_model.safetensors").stat().st_size
        turns = [{name: in_child(room, name, written) for name in jobs(written)} for _ in range(repeats)]
    rows = []
    for name in jobs(written):
        row = {"row": name, **median_row(tuple(turn[name] for turn in turns))}
        for key, base in (("times_read_and_write", "read and write"), ("times_copy", "copy")):
            row[key] = statistics.median(turn[name]["seconds"] / turn[base]["seconds"] for turn in turns)
        rows.append(row)
    return rows


# --- the table ------------------------------------------------------------------------------------------------------


def print_clusterings(rows: list[Row]) -> None:
    """The table of part (a)."""
    print(f"(a) {COUNT * RANK} terms of dimension {2 * SIZE} in {RANK} clusters, {RESTARTS} restarts; milliseconds\n")
    print(
        f"{'':10} {'Gram':>8} {'k-means':>8} {'in all':>8} {'sklearn':>9} {'its threads':>11} {'x faster':>9} inertia"
    )
    for row in rows:
        times = (row[key] * 1e3 for key in ("gram_seconds", "kmeans_seconds", "seconds", "sklearn_seconds"))
        print(
            "{:10} {:8.2f} {:8.2f} {:8.2f} {:9.1f}".format(row["row"], *times),
            f"{row['sklearn_threads']:11.0f} {row['times_faster']:9.1f} {row['inertia_ratio']:7.4f}",
        )
    print(f"\ninertia: ours / sklearn's. expected: at least {SPEED_BAR} times faster, inertia at most {INERTIA_BAR}\n")


def print_files(rows: list[Row], layers: int) -> None:
    """The table of part (b)."""
    print(f"(b) {COUNT} adapters of {layers * len(SHAPES)} modules, rank {RANK}, float16, disk to disk\n")
    print(f"{'':18} {'seconds':>8} {'CPU':>7} {'x read and write':>17} {'x copy':>7} {'peak MiB':>9} {'error':>8}")
    for row in rows:
        error = f"{row['error']:8.4f}" if "error" in row else ""
        print(
            f"{row['row']:18} {row['seconds']:8.2f} {row['cpu_seconds']:7.2f} {row['times_read_and_write']:17.2f}",
            f"{row['times_copy']:7.1f} {row['peak_bytes'] / 2**20:9.0f} {error}",
        )
    print(f"\nexpected: lego at most {DISK_BAR} times read and write")


def measure(arguments: argparse.Namespace) -> Row:
    """Both parts over all seeds; medians over seeds, the worst of inertia ratios and peaks."""
    layers, turns = (2, 1) if arguments.quick else (32, arguments.repeats)
    threads = [1] if arguments.quick else sorted({1, os.cpu_count() or 1})
    kinds, files = [], []
    for seed in range(arguments.seeds):
        kinds.append([clustering(kind, seed, threads, 3 if arguments.quick else 7) for kind in ("normal", "kin")])
        files.append(disk_to_disk(layers, seed, turns))
    clusterings = []
    for rows in zip(*kinds, strict=True):
        worst = max(row["inertia_ratio"] for row in rows)
        clusterings.append({**median_row(rows), "inertia_ratio": worst})
    return {
        "threads": OUR_THREADS,
        "terms": COUNT * RANK,
        "dimension": 2 * SIZE,
        "clusters": RANK,
        "layers": layers,
        "clustering": clusterings,
        "files": [median_row(rows) for rows in zip(*files, strict=True)],
    }


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, few repeats, scikit-learn on one thread")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="turns of part (b)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--written", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.room, arguments.child, arguments.written)
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait ruin all times
    result = measure(arguments)
    print(f"threads: lorahub {OUR_THREADS}; OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}\n")
    print_clusterings(result["clustering"])
    print_files(result["files"], result["layers"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
