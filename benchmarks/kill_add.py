"""`kill -9` during `add` at random moments: does the catalogue open, is it sound, and does a second `add` complete it?

Every kill has a fresh home folder; the moment is drawn uniformly over the time that an undisturbed `add` takes, from
the creation of the database on. Every second kill adds with copies, so that blobs are cut off too.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BATCH = 20  # files a transaction, so that many transactions can be cut
ADD = """
import sys
from pathlib import Path
from lorahub.hub import ingest
from lorahub.hub.catalog import Catalog
ingest._BATCH = int(sys.argv[4])
print("ready", flush=True)
with Catalog(Path(sys.argv[1])) as catalog:
    for outcome in catalog.add([Path(sys.argv[2])], copy=sys.argv[3] == "copy"):
        pass
"""


@dataclass(frozen=True)
class Outcome:
    """One kill: the moment (seconds after the start), adapters recorded by then, what was wrong, adapters at last."""

    moment: float
    copies: bool
    killed: bool
    recorded: int
    problems: list[str]
    completed: int


def write_library(folder: Path, count: int) -> None:
    """`count` kohya files with one small module each."""
    folder.mkdir()
    for number in range(count):
        chance = np.random.default_rng(number)
        place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {
            f"{place}.lora_down.weight": chance.standard_normal((2, 64), np.float32),
            f"{place}.lora_up.weight": chance.standard_normal((64, 2), np.float32),
        }
        save_file(tensors, folder / f"style_{number:04d}.safetensors", {"ss_output_name": f"style {number}"})


def start(home: Path, library: Path, copies: bool) -> subprocess.Popen[str]:
    """An adding process whose imports are done."""
    command = [sys.executable, "-c", ADD, str(home), str(library), "copy" if copies else "point", str(BATCH)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise SystemExit("the adding process did not start")
    return process


def undisturbed(home: Path, library: Path, copies: bool) -> float:
    """Seconds that an `add` takes that nobody kills."""
    process = start(home, library, copies)
    began = time.perf_counter()
    process.wait()
    return time.perf_counter() - began


def kill_once(home: Path, library: Path, moment: float, copies: bool) -> Outcome:
    """Kill an `add` at the moment, look at what it left, and add again."""
    from lorahub.hub.catalog import Catalog

    process = start(home, library, copies)
    time.sleep(moment)
    process.kill()
    killed = process.wait() != 0
    with Catalog(home) as catalog:
        problems = catalog.verify()
        entries = catalog.entries()
        problems += [f"{entry.name} has no file" for entry in entries if not entry.locations]
        problems += [f"{entry.name} has no copy" for entry in entries if copies and entry.blob is None]
        list(catalog.add([library], copy=copies))
        problems += [f"afterwards: {problem}" for problem in catalog.verify()]
        completed = {path for entry in catalog.entries() for path in entry.locations}
        return Outcome(moment, copies, killed, len(entries), problems, len(completed))


def main() -> int:
    """Kill, check, print the table, write the figures; 1 if anything was lost or unsound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=0, help="where the random moments start from")
    parser.add_argument("--quick", action="store_true", help="10 kills, 200 files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kills, files = (10, 200) if arguments.quick else (arguments.kills, arguments.files)
    chance = random.Random(arguments.seeds)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library"
        write_library(library, files)
        lasts = {copies: undisturbed(Path(folder) / f"calm{copies}", library, copies) for copies in (False, True)}
        print(f"{files} files; undisturbed {lasts[False]:.2f} s, with copies {lasts[True]:.2f} s\n")
        print(f"{'kill':>4} {'at s':>6} {'copies':>6} {'killed':>6} {'recorded':>8} {'problems':>8} {'completed':>9}")
        for number in range(kills):
            copies = number % 2 == 1
            moment = chance.uniform(0, lasts[copies])
            found = kill_once(Path(folder) / str(number), library, moment, copies)
            outcomes.append(found)
            print(
                f"{number:4} {moment:6.3f} {copies!s:>6} {found.killed!s:>6} {found.recorded:8} "
                f"{len(found.problems):8} {found.completed:9}"
            )
    unsound = [found for found in outcomes if found.problems or found.completed != files]
    amidst = sum(found.killed and 0 < found.recorded < files for found in outcomes)
    print(f"\n{kills} kills, {amidst} of them amidst recording: {len(unsound)} left an unsound or incomplete catalogue")
    for found in unsound:
        print(f"  at {found.moment:.3f} s: {found.completed} of {files} files; {'; '.join(found.problems[:3])}")
    if arguments.json:
        result = {
            "kills": kills,
            "files": files,
            "unsound": len(unsound),
            "outcomes": [asdict(one) for one in outcomes],
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
