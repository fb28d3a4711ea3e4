"""How fast merging is: against PEFT's `svd` on one large module, and against the disk on adapters of a 7B model.

(a) 8 adapters of rank 16 on one 4096 x 4096 linear layer (2048 x 2048 with --quick), merged to rank 16: lorahub's exact
truncation and PEFT's `add_weighted_adapter(..., combination_type="svd", svd_rank=16)`, in one process.
Error: ||got - sum|| / ||sum|| with the sum multiplied out in float64.

(b) 8 adapters of a 7B shape (224 modules: q, k, v, o, gate, up, down of 32 layers; rank 16; float16) from disk to disk:
read, merge with its report, write, in a process of its own whose peak memory is told (imports counted in memory, not in
time). `copy` merely reads the 8 files and writes as many bytes as the merge does. Every writer ends with fsync; files
are in the page cache for all. --quick takes 2 layers.

lorahub's rows run on one thread, where its thin factors are fastest; PEFT's on as many as --threads says, by default on
all cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorahub.hub.adapter import Adapter
    from torch import Tensor

COUNT, RANK = 8, 16
OUR_THREADS = 1
WEIGHTS = [0.3, -0.2, 0.5, 0.1, 0.25, 0.4, -0.35, 0.15]
MEMORY_BAR, SPEED_BAR = 1.5 * 2**30, 500
SHAPES = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
CHUNK = 8 * 2**20
Row = dict[str, Any]


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# --- (a) one module, against PEFT -----------------------------------------------------------------------------------


def peft_model(size: int, seed: int) -> Any:
    """A PEFT model with COUNT adapters of rank RANK on one linear layer, factors normally distributed."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(size, size, bias=False)

        def forward(self, value: Tensor) -> Tensor:
            return self.layer(value)  # type: ignore[no-any-return]

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"])
    model: Any = get_peft_model(Model(), config, adapter_name="0")
    for index in range(1, COUNT):
        model.add_adapter(str(index), config)
    chance = torch.Generator().manual_seed(seed)
    layer = model.base_model.model.layer
    for name in layer.lora_A:
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.weight.data = torch.randn(factor.weight.shape, generator=chance) / math.sqrt(size)
    return model


def held_by(layer: Any) -> list[Adapter]:
    """The layer's PEFT adapters as lorahub's, sharing the factors."""
    from lorahub.hub.adapter import Adapter
    from lorahub.hub.lowrank import LowRank

    return [
        Adapter({"layer": LowRank(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.scaling[name])})
        for name in layer.lora_A
    ]


def our_rows(adapters: list[Adapter], repeats: int) -> list[tuple[Row, Tensor]]:
    """lorahub's truncation alone, and the public call with its report."""
    from lorahub.hub.lowrank import LowRank, concat
    from lorahub.merge.run import merge

    parts = [one.modules["layer"] for one in adapters]

    def truncated() -> LowRank:
        return concat(parts, WEIGHTS).truncate(RANK)

    def reported() -> LowRank:
        return merge(adapters, weights=WEIGHTS, given={"rank": RANK}).adapter.modules["layer"]

    rows = []
    for name, work in (("lorahub: concat, truncate", truncated), ("lorahub: merge, report", reported)):
        delta = work().dense()  # also warms up: the first call loads libraries
        rows.append(({"row": name, "seconds": timed(work, repeats)}, delta))
    return rows


def peft_rows(model: Any, repeats: int) -> list[tuple[Row, Tensor]]:
    """PEFT's combination as it is by default, and with the thin decomposition that its options allow."""
    import torch

    names = [str(index) for index in range(COUNT)]
    torch.linalg.svd(torch.randn(64, 64))  # warm up, as above

    def combine(full: bool) -> None:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        options = {"combination_type": "svd", "svd_rank": RANK, "svd_full_matrices": full}
        model.add_weighted_adapter(names, WEIGHTS, "merged", **options)

    rows = []
    for name, full in (("PEFT svd", True), ("PEFT svd, svd_full_matrices=False", False)):
        seconds = timed(lambda full=full: combine(full), repeats)  # type: ignore[misc]
        with torch.no_grad():
            rows.append(({"row": name, "seconds": seconds}, model.base_model.model.layer.get_delta_weight("merged")))
    return rows


def one_module(size: int, seed: int, peft_repeats: int, peft_threads: int) -> list[Row]:
    """Rows of part (a)."""
    model = peft_model(size, seed)
    adapters = held_by(model.base_model.model.layer)
    total: Any = 0.0
    for one, weight in zip(adapters, WEIGHTS, strict=True):
        part = one.modules["layer"]
        total = total + weight * part.scale * (part.up.double() @ part.down.double())
    limit_threads(OUR_THREADS)
    found = our_rows(adapters, 15)
    limit_threads(peft_threads)
    found += peft_rows(model, peft_repeats)
    return [{**row, "error": float((delta.double() - total).norm() / total.norm())} for row, delta in found]


# --- (b) a 7B shape, from disk to disk ------------------------------------------------------------------------------


def write_inputs(room: Path, layers: int, seed: int) -> None:
    """COUNT PEFT directories of rank RANK in float16, each with its own factors."""
    import torch
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(seed)
    for index in range(COUNT):
        tensors = {}
        for layer in range(layers):
            for name, (outputs, inputs) in SHAPES.items():
                stem = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inputs, generator=chance).half() / 64
                tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, RANK, generator=chance).half() / 64
        folder = room / f"input-{index}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": "seven-b"}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def merge_files(room: Path, given: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Seconds from disk to disk, and the report's total."""
    from lorahub.hub.reading import read
    from lorahub.hub.writing import save
    from lorahub.merge.run import merge

    began = time.perf_counter()
    inputs = [read(room / f"input-{index}") for index in range(COUNT)]
    result = merge(inputs, weights=WEIGHTS, given=given)
    save(result.adapter, room / "merged", force=True)
    return time.perf_counter() - began, vars(result.report.total)


def copy_files(room: Path, size: int) -> float:
    """Seconds to read all inputs and write `size` bytes."""
    began = time.perf_counter()
    data = b""
    for index in range(COUNT):
        with (room / f"input-{index}" / "adapter_model.safetensors").open("rb") as file:
            while chunk := file.read(CHUNK):
                data = chunk if len(chunk) > len(data) else data
    with (room / "copied").open("wb") as file:
        for start in range(0, size, len(data)):
            file.write(data[: size - start])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def child(room: Path, job: dict[str, Any]) -> None:
    """One measurement in this process; prints JSON."""
    limit_threads(OUR_THREADS)
    if job["copy"] is not None:
        outcome: Row = {"seconds": copy_files(room, job["copy"])}
    else:
        seconds, total = merge_files(room, job["given"])
        outcome = {"seconds": seconds, "error": total["error"]}
    print(json.dumps({**outcome, "peak_bytes": peak_memory()}))


def peak_memory() -> int:
    """The most bytes that this process has held. `ru_maxrss` would count what its parent held when it was forked."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(room: Path, repeats: int, **job: Any) -> Row:
    """The median run of `repeats` fresh processes, with the highest peak of them."""
    command = [sys.executable, __file__, "--child", json.dumps({"copy": None, **job}), "--room", str(room)]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    runs.sort(key=lambda run: float(run["seconds"]))
    return {**runs[len(runs) // 2], "peak_bytes": max(run["peak_bytes"] for run in runs)}


def disk_to_disk(layers: int, seed: int, repeats: int) -> list[Row]:
    """Rows of part (b): each merge after a copy of the same bytes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        write_inputs(room, layers, seed)
        os.sync()
        for name, given in (
            ("merge, ranks add up", {}),
            ("merge, energy=0.97", {"energy": 0.97}),
            (f"merge, rank={RANK}", {"rank": RANK}),
        ):
            row = in_child(room, repeats, given=given)
            size = (room / "merged" / "adapter_model.safetensors").stat().st_size
            copied = in_child(room, repeats, copy=size)
            rows.append({"row": f"copy of {size / 2**20:.0f} MiB", "written_bytes": size, **copied, "times_copy": 1.0})
            rows.append({"row": name, "written_bytes": size, **row, "times_copy": row["seconds"] / copied["seconds"]})
    return rows


# --- the table ------------------------------------------------------------------------------------------------------


def limit_threads(threads: int) -> None:
    """torch's threads, in this process."""
    import torch

    torch.set_num_threads(threads)


def print_modules(rows: list[Row], size: int) -> None:
    """The table of part (a)."""
    print(f"(a) {COUNT} adapters of rank {RANK} on {size} x {size}, to rank {RANK}\n")
    print(f"{'':36} {'seconds':>10} {'error':>12} {'PEFT svd / this':>16}")
    for row in rows:
        print(f"{row['row']:36} {row['seconds']:10.4f} {row['error']:12.9f} {row['times_faster']:16.1f}")
    print(f"\nexpected: at least {SPEED_BAR} times faster at 4096, with no larger error\n")


def print_files(rows: list[Row], layers: int) -> None:
    """The table of part (b)."""
    print(f"(b) {COUNT} adapters of {layers * len(SHAPES)} modules, rank {RANK}, float16, disk to disk\n")
    print(f"{'':36} {'seconds':>10} {'x copy':>8} {'peak MiB':>9} {'error':>10}")
    for row in rows:
        error = f"{row['error']:10.2e}" if "error" in row else f"{'':10}"
        peak = row["peak_bytes"] / 2**20
        print(f"{row['row']:36} {row['seconds']:10.2f} {row['times_copy']:8.1f} {peak:9.0f} {error}")
    print(f"\nexpected: peak below {MEMORY_BAR / 2**20:.0f} MiB")


def measure(arguments: argparse.Namespace) -> Row:
    """Both parts, over all seeds; medians over seeds."""
    size, layers = (2048, 2) if arguments.quick else (4096, 32)
    modules, files = [], []
    for seed in range(arguments.seeds):
        files.append(disk_to_disk(layers, seed, 1 if arguments.quick else 3))
        modules.append(one_module(size, seed, 1, arguments.threads))
    table = [median_row(rows) for rows in zip(*modules, strict=True)]
    theirs = next(row["seconds"] for row in table if row["row"] == "PEFT svd")
    return {
        "threads": {"lorahub": OUR_THREADS, "PEFT": arguments.threads},
        "size": size,
        "layers": layers,
        "modules": [{**row, "times_faster": theirs / row["seconds"]} for row in table],
        "files": [median_row(rows) for rows in zip(*files, strict=True)],
    }


def median_row(rows: tuple[Row, ...]) -> Row:
    """The median of every figure of one row over the seeds; the worst of peaks and errors."""
    worst = {"peak_bytes", "error", "written_bytes"}
    return {
        key: value if isinstance(value, str) else (max if key in worst else statistics.median)([r[key] for r in rows])
        for key, value in rows[0].items()
    }


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2048 x 2048 and 2 layers")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch's threads for PEFT's rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--room", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.room, json.loads(arguments.child))
        return
    warnings.filterwarnings("ignore")
    # for every row: threads that spin while they wait ruin all times on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result = measure(arguments)
    print(
        f"threads: lorahub {OUR_THREADS}, PEFT {arguments.threads}; OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}\n"
    )
    print_modules(result["modules"], result["size"])
    print_files(result["files"], result["layers"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
