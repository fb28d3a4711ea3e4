"""How long `add` takes for 10,000 small adapter files: cold, warm, and against reading and hashing them with hashlib.

All rows are measured in one run on one machine with the files in the page cache. Cold is the first `add` into an empty
catalogue, in process; warm is the second, in the same process and as a fresh one (interpreter and imports included).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STYLES = "watercolor charcoal neon pastel gothic pixel vintage origami cyberpunk baroque".split()
PLACES = (
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q lora_te_text_model_encoder_layers_0_mlp_fc1"
)
WARM = """
import sys, time
from pathlib import Path
from lorahub.hub.catalog import Catalog
with Catalog(Path(sys.argv[1])) as catalog:
    began = time.perf_counter()
    count = sum(outcome.status == "unchanged" for outcome in catalog.add([Path(sys.argv[2])]))
    print(count, time.perf_counter() - began)
"""


def write_adapter(path: Path, number: int) -> None:
    """A kohya file of rank 2 with one or two modules, its own content and metadata like trainers write."""
    chance = np.random.default_rng(number)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for place in PLACES.split()[: 1 + number % 2]:
        tensors[f"{place}.alpha"] = np.array(2, "<f2")
        tensors[f"{place}.lora_down.weight"] = chance.standard_normal((2, 320)).astype("<f2")
        tensors[f"{place}.lora_up.weight"] = chance.standard_normal((320, 2)).astype("<f2")
    style = STYLES[number % len(STYLES)]
    frequency = {
        f"10_{style}": {f"{style} {word}": 1 + number % 7 for word in ("portrait", "castle", "forest", "night")}
    }
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_output_name": f"{style}_{number:05d}",
        "ss_tag_frequency": json.dumps(frequency),
        "ss_training_comment": f"{style} pictures, set {number}",
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, value in tensors.items():
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for value in tensors.values()))


def write_library(folder: Path, count: int) -> list[Path]:
    """`count` files in subfolders of a hundred."""
    files = []
    for number in range(count):
        path = folder / f"{number // 100:03d}" / f"{STYLES[number % len(STYLES)]}_{number:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(path, number)
        files.append(path)
    return files


def timed(work: Callable[[], int], expected: int) -> float:
    """Seconds that `work` takes; it must account for `expected` files."""
    began = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - began
    if count != expected:
        raise SystemExit(f"{count} files accounted for, expected {expected}")
    return seconds


def hash_files(files: list[Path]) -> int:
    """Read and hash all files; returns how many."""
    return len({hashlib.sha256(path.read_bytes()).hexdigest() for path in files})


def measure(folder: Path, count: int) -> dict[str, float]:
    """Seconds by row."""
    from lorahub.hub.catalog import Catalog
    from lorahub.hub.reading import examine

    library, home = folder / "library", folder / "home"
    files = write_library(library, count)
    shuffled = random.Random(0).sample(files, len(files))
    hash_files(shuffled)  # so that the page cache is equally warm for every row
    rows = {"read + sha256 (hashlib)": min(timed(lambda: hash_files(shuffled), count) for _ in range(3))}
    rows["examine (header, words, fingerprint)"] = timed(lambda: len([examine(path) for path in files]), count)
    with Catalog(home) as catalog:

        def add(status: str) -> int:
            return sum(outcome.status == status for outcome in catalog.add([library]))

        rows["add, cold"] = timed(lambda: add("added"), count)
        rows["add, warm, same process"] = min(timed(lambda: add("unchanged"), count) for _ in range(3))
    command = [sys.executable, "-c", WARM, str(home), str(library)]
    inside = []

    def fresh() -> int:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found, seconds = done.stdout.split()
        inside.append(float(seconds))
        return int(found)

    rows["add, warm, fresh process (all of it)"] = min(timed(fresh, count) for _ in range(3))
    rows["add, warm, fresh process (the add)"] = min(inside)
    return rows


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="2,000 files")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions; the fastest of each row counts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    count = 2_000 if arguments.quick else arguments.files
    runs = []
    for _ in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(Path(folder), count))
    rows = {name: min(run[name] for run in runs) for name in runs[0]}
    cold, hashing = rows["add, cold"], rows["read + sha256 (hashlib)"]
    print(f"{count:,} adapter files of rank 2\n")
    print(f"{'':38} {'seconds':>8} {'ms/file':>8} {'x hashing':>10} {'cold / this':>12}")
    table = []
    for name, seconds in rows.items():
        per_file = seconds / count * 1e3
        print(f"{name:38} {seconds:8.3f} {per_file:8.3f} {seconds / hashing:10.2f} {cold / seconds:12.1f}")
        table.append({"row": name, "seconds": seconds, "ms_per_file": per_file, "times_hashing": seconds / hashing})
    speedup = cold / rows["add, warm, same process"]
    print(f"\nwarm is {speedup:.0f} times faster than cold; expected at least 20")
    if arguments.json:
        result = {"files": count, "rows": table, "warm_speedup": speedup}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
