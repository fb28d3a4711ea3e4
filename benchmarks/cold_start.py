"""How long a fresh process takes: help against importing typer, search against importing sentence_transformers.

The catalogue has 10,000 adapters whose descriptions are embedded, and the search is hybrid: full text and embeddings.
Every figure is the median of several processes, which run in turn so that all rows see the same machine.
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SUBJECTS = "lighthouse dragon portrait skyline orchard robot harbour kitten castle ballet motorcycle mushroom".split()
STYLES = "watercolor charcoal neon pastel gothic pixel vintage origami cyberpunk baroque gouache linocut mosaic".split()
MOODS = "misty cheerful stormy quiet dreamlike dramatic faded glowing moonlit autumnal".split()
PLACE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = "watercolor"

# row: (command, what it is held against, how many times that it may take)
PYTHON = sys.executable
LORAHUB = str(Path(PYTHON).with_name("lorahub"))
TYPER = "import typer"
SENTENCES = "import sentence_transformers"
COMMANDS: dict[str, list[str]] = {
    TYPER: [PYTHON, "-c", TYPER],
    "lorahub --help": [LORAHUB, "--help"],
    SENTENCES: [PYTHON, "-c", SENTENCES],
    "lorahub search": [LORAHUB, "search", QUERY, "--json"],
}
BARS = {"lorahub --help": (TYPER, 3.0), "lorahub search": (SENTENCES, 0.5)}


def write_library(folder: Path, count: int) -> None:
    """`count` kohya files of rank 1 whose words differ, as those of a collector's folder do."""
    chance = np.random.default_rng(0)
    for number in range(count):
        subject, style, mood = (words[chance.integers(len(words))] for words in (SUBJECTS, STYLES, MOODS))
        other = SUBJECTS[chance.integers(len(SUBJECTS))]
        metadata = {
            "ss_base_model_version": "sd_v1",
            "modelspec.title": f"{mood} {subject} {number}",
            "modelspec.description": f"A {mood} {style} look for a {subject}, with a {other} in some pictures.",
            "ss_tag_frequency": json.dumps({f"10_{subject}": {style: 9, subject: 8, mood: 5, other: 2}}),
        }
        tensors = {
            f"{PLACE}.lora_down.weight": chance.standard_normal((1, 32), np.float32),
            f"{PLACE}.lora_up.weight": chance.standard_normal((32, 1), np.float32),
        }
        path = folder / f"{number // 100:03d}" / f"{style}_{number:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)


def stock(home: Path, library: Path) -> dict[str, float]:
    """Seconds to add the library to a new catalogue, to embed its words, and to build the index."""
    from lorahub.hub.catalog import Catalog
    from lorahub.index.embed import fill
    from lorahub.index.encoders.text import text
    from lorahub.index.vector_index import open_index

    with Catalog(home) as catalog:
        seconds = {}
        began = time.perf_counter()
        count = sum(outcome.status == "added" for outcome in catalog.add([library]))
        seconds["add"] = time.perf_counter() - began
        began = time.perf_counter()
        if fill(catalog, text()) != count:
            raise SystemExit("not every description was embedded")
        seconds["embed"] = time.perf_counter() - began
        began = time.perf_counter()
        open_index(catalog, "text")
        seconds["index"] = time.perf_counter() - began
    return seconds


def fresh(command: Sequence[str], home: Path) -> float:
    """Seconds that a process takes from start to end."""
    environment = {**os.environ, "LORAHUB_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    if "search" in command and len(json.loads(done.stdout)) != 10:
        raise SystemExit(f"the search found {len(json.loads(done.stdout))} adapters, expected 10")
    return seconds


def encode_once() -> dict[str, float]:
    """Seconds in a fresh process to open the text encoder and embed one query, numpy being imported."""
    code = (
        "import time, numpy; began = time.perf_counter()\n"
        "from lorahub.index.encoders.text import text\n"
        f"text().encode([{QUERY!r}]); print(time.perf_counter() - began)"
    )
    runs = [subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return {"open the encoder and embed a query": statistics.median(float(run.stdout) for run in runs)}


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="500 entries, 2 processes a row")
    parser.add_argument("--seeds", type=int, default=5, help="processes a row")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    entries, runs = (500, 2) if arguments.quick else (arguments.entries, arguments.seeds)
    with tempfile.TemporaryDirectory() as folder:
        home, library = Path(folder) / "home", Path(folder) / "library"
        write_library(library, entries)
        made = stock(home, library)
        print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in made.items()), f"for {entries:,} entries\n")
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for turn in range(runs + (not arguments.quick)):
            for name, command in COMMANDS.items():
                seconds = fresh(command, home)
                if turn or arguments.quick:  # the first turn fills the page cache
                    times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    table = []
    print(f"{'fresh process':32} {'seconds':>8} {'least':>8}   against")
    for name, seconds in medians.items():
        against, bar = BARS.get(name, (None, None))
        ratio = seconds / medians[against] if against else None
        note = f"{ratio:.2f} x `{against}`; expected at most {bar}" if against else ""
        print(f"{name:32} {seconds:8.3f} {min(times[name]):8.3f}   {note}")
        table.append({"row": name, "seconds": seconds, "runs": times[name], "against": against, "ratio": ratio})
    inside = encode_once()
    for name, seconds in inside.items():
        print(f"{name:40} {seconds:.3f} s in process")
    if arguments.json:
        result = {"entries": entries, "stocked": made, "rows": table, "inside": inside}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
