"""How fast compressing is, against decomposing the multiplied-out delta; and what a budget gains when it is global.

(a) One linear layer of 4096 x 4096 (2048 x 2048 with --quick), rank 64 to 16, all in one process: lorahub's truncation,
the public call with its report, the sketch for wide factors, then on the dense delta torch's SVD and its randomised
SVD. (PEFT's `add_weighted_adapter` leaves the rank of a single adapter as it is.) Every row begins with the factors and
ends with factors of rank 16. Error: ||got - delta|| / ||delta||, multiplied out in float64. lorahub's rows run on one
thread, the others on as many as --threads says, by default on all cores.

(b) Real adapter files, found below --adapters: the same number of parameters, spent as one rank for all modules, as one
share of energy for each module, and as one budget over all modules. Error: relative, over all modules, of what is
stored in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorahub.hub.adapter import Adapter
    from lorahub.hub.lowrank import LowRank
    from torch import Tensor

FROM_RANK, TO_RANK = 64, 16
OUR_THREADS = 1
SPEED_BAR = 1000
ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


# --- (a) one module -------------------------------------------------------------------------------------------------


def layer(size: int, seed: int) -> LowRank:
    """A delta whose factors' columns decay, as trained ones do: a rank of 16 keeps most of it, not all."""
    import torch
    from lorahub.hub.lowrank import LowRank

    chance = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, FROM_RANK + 1) ** -0.7
    down = torch.randn(FROM_RANK, size, generator=chance) * decay[:, None] / math.sqrt(size)
    return LowRank(down, torch.randn(size, FROM_RANK, generator=chance) / math.sqrt(size), scale=2.0)


def our_rows(module: LowRank) -> Iterator[tuple[str, Callable[[], LowRank]]]:
    """The truncation alone, the public call with its report, and the sketch that takes over for wide factors."""
    from lorahub.hub.adapter import Adapter
    from lorahub.merge.compress import compress

    adapter = Adapter({"layer": module})
    yield "lorahub: truncate", lambda: module.truncate(TO_RANK)
    yield "lorahub: compress, report", lambda: compress(adapter, rank=TO_RANK).adapter.modules["layer"]
    yield "lorahub: sketch", lambda: module.sketch(TO_RANK)


def dense_rows(module: LowRank) -> Iterator[tuple[str, Callable[[], LowRank]]]:
    """torch's decompositions of the multiplied-out delta."""
    import torch
    from lorahub.hub.lowrank import LowRank

    def kept(u: Tensor, values: Tensor, vh: Tensor) -> LowRank:
        return LowRank(vh[:TO_RANK], u[:, :TO_RANK] * values[:TO_RANK])

    def randomised() -> LowRank:
        torch.manual_seed(0)
        u, values, v = torch.svd_lowrank(module.dense(), q=TO_RANK)
        return kept(u, values, v.T)

    yield "dense: svd", lambda: kept(*torch.linalg.svd(module.dense(), full_matrices=False))
    yield "dense: svd_lowrank", randomised


def one_module(size: int, seed: int, threads: int) -> list[Row]:
    """The rows of part (a)."""
    import torch

    module = layer(size, seed)
    torch.linalg.svd(torch.randn(64, 64))  # the first call loads libraries
    exact = module.scale * (module.up.double() @ module.down.double())
    rows = []

    def measure(name: str, work: Callable[[], LowRank], repeats: int, *, warm: bool) -> None:
        if warm:
            work()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            got = work()
            seconds.append(time.perf_counter() - began)
        with torch.no_grad():
            off = got.scale * (got.up.double() @ got.down.double()) - exact
        rows.append({"row": name, "seconds": statistics.median(seconds), "error": float(off.norm() / exact.norm())})

    torch.set_num_threads(OUR_THREADS)
    for name, work in our_rows(module):
        measure(name, work, 15, warm=True)
    torch.set_num_threads(threads)
    for name, work in dense_rows(module):
        measure(name, work, 1, warm=False)
    return rows


# --- (b) real files -------------------------------------------------------------------------------------------------


def real_files(folder: Path, most: int) -> list[Path]:
    """Adapters that can be compressed: at least four modules of rank four and more, none twice, the largest first."""
    from lorahub.hub.errors import LoraHubError
    from lorahub.hub.reading import examine

    found: dict[str, tuple[int, Path]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        path = file.parent if (file.parent / "adapter_config.json").is_file() else file
        try:
            inspection, digest = examine(path)
        except LoraHubError:
            continue
        if inspection.mergeable and inspection.ranks[0] >= 4 and inspection.modules >= 4:
            found.setdefault(digest, (inspection.parameters, path))
    return [path for _, path in sorted(found.values(), key=lambda one: (-one[0], str(one[1])))][:most]


def at_energy(adapter: Adapter, limit: int) -> float:
    """The largest share of energy for each module that takes no more than `limit` parameters."""
    import torch
    from lorahub.hub.lowrank import rank_for
    from lorahub.merge.compress import singular_values

    spectra = {name: torch.tensor(singular_values(module)) for name, module in adapter.modules.items()}
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        ranks = {name: rank_for(values, middle) for name, values in spectra.items()}
        used = sum(ranks[name] * (shape.outputs + shape.inputs) for name, shape in adapter.shapes.items())
        low, high = (middle, high) if used <= limit else (low, middle)
    return low


def spent(adapter: Adapter, **limit: Any) -> Row:
    """Parameters, error and seconds of a compression, with its report."""
    import torch
    from lorahub.merge.compress import compress, read_all

    began = time.perf_counter()
    made = compress(adapter, dtype=torch.float32, **limit)
    read_all(made.adapter)
    seconds = time.perf_counter() - began
    return {"parameters": made.adapter.parameters, "error": made.report.total.error, "seconds": seconds}


def three_ways(path: Path, folder: Path, share: int) -> Row:
    """One file at a rank that is a `share`-th of its own, and the same number of parameters spent otherwise."""
    from lorahub.hub.reading import read

    adapter = read(path)
    largest = max(shape.rank for shape in adapter.shapes.values())
    rank = max(1, largest // share)
    uniform = spent(adapter, rank=rank)
    limit = uniform["parameters"]
    return {
        "file": path.relative_to(folder).as_posix(),
        "modules": len(adapter.shapes),
        "from_rank": largest,
        "to_rank": rank,
        "uniform": uniform,
        "energy": spent(adapter, energy=at_energy(adapter, limit)),
        "budget": spent(adapter, parameters=limit),
    }


# --- the tables -----------------------------------------------------------------------------------------------------


def median_row(rows: tuple[Row, ...]) -> Row:
    """The median of every figure of one row over the seeds; the worst of errors."""
    return {
        key: value if isinstance(value, str) else (max if key == "error" else statistics.median)([r[key] for r in rows])
        for key, value in rows[0].items()
    }


def print_module(rows: list[Row], size: int) -> None:
    """The table of part (a)."""
    print(f"(a) {size} x {size}, rank {FROM_RANK} to {TO_RANK}\n")
    print(f"{'':36} {'seconds':>10} {'error':>12} {'dense svd / this':>17}")
    for row in rows:
        print(f"{row['row']:36} {row['seconds']:10.4f} {row['error']:12.9f} {row['times_faster']:17.1f}")
    print(f"\nexpected: truncate at least {SPEED_BAR} times faster than a dense SVD at 4096, with the same error\n")


def print_files(rows: list[Row]) -> None:
    """The table of part (b)."""
    print("(b) the same number of parameters, spent in three ways: relative error over all modules\n")
    print(f"{'':64} {'modules':>7} {'rank':>8} {'parameters':>11} {'uniform':>8} {'energy':>8} {'budget':>8}")
    for row in rows:
        name = row["file"] if len(row["file"]) <= 64 else f"...{row['file'][-61:]}"
        ranks = f"{row['from_rank']} > {row['to_rank']}"
        errors = " ".join(f"{row[way]['error']:8.4f}" for way in ("uniform", "energy", "budget"))
        print(f"{name:64} {row['modules']:7} {ranks:>8} {row['budget']['parameters']:11,} {errors}")
    print("\nexpected: the budget's error is the smallest of each row")


def measure(arguments: argparse.Namespace) -> Row:
    """Both parts; medians over seeds."""
    size = 2048 if arguments.quick else 4096
    modules = [one_module(size, seed, arguments.threads) for seed in range(arguments.seeds)]
    table = [median_row(rows) for rows in zip(*modules, strict=True)]
    dense = next(row["seconds"] for row in table if row["row"] == "dense: svd")
    import torch

    torch.set_num_threads(OUR_THREADS)
    files = real_files(arguments.adapters, 3 if arguments.quick else 8)
    return {
        "threads": {"lorahub": OUR_THREADS, "others": arguments.threads},
        "size": size,
        "module": [{**row, "times_faster": dense / row["seconds"]} for row in table],
        "files": [three_ways(path, arguments.adapters, share) for path in files for share in (2, 4)],
    }


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2048 x 2048, and three files")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch's threads for dense rows")
    parser.add_argument("--adapters", type=Path, default=ROOT.parent / "shared" / "adapters")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    # threads that spin while they wait ruin all times on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result = measure(arguments)
    print(f"threads: lorahub {OUR_THREADS}, others {arguments.threads}\n")
    print_module(result["module"], result["size"])
    print_files(result["files"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
