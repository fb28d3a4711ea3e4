"""Processes that are killed, and processes that do the same thing at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lorahub.hub.catalog import Catalog

ROOT = Path(__file__).resolve().parents[1]

ADD = """
import sys
from pathlib import Path
from lorahub.hub import ingest
from lorahub.hub.catalog import Catalog
ingest._BATCH = 7
print("ready", flush=True)
sys.stdin.readline()
with Catalog(Path(sys.argv[1]), sys.argv[3] or None) as catalog:
    outcomes = list(catalog.add([Path(sys.argv[2])], copy=True, tags=["raced"]))
print(*(outcome.status for outcome in outcomes))
"""


def test_a_killed_add_leaves_a_sound_catalogue_that_a_second_add_completes(tmp_path):
    script = ROOT / "benchmarks" / "kill_add.py"
    report = tmp_path / "report.json"
    command = [sys.executable, str(script), "--kills", "6", "--files", "80", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert (result["kills"], result["unsound"]) == (6, 0)
    assert [one["completed"] for one in result["outcomes"]] == [80] * 6


def test_four_processes_at_once_lose_nothing_and_double_nothing(tmp_path, url, lora):
    library = tmp_path.resolve() / "library"
    for number in range(40):
        lora(f"{number % 4}/style.safetensors" if number < 4 else f"style-{number}.safetensors", number)
        lora(f"copies/style-{number}.safetensors", number, note="another header")
    (library / "damaged.safetensors").write_bytes(b"damaged")
    command = [sys.executable, "-c", ADD, str(tmp_path / "home"), str(library), url or ""]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    statuses = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert len(output.split()) == 81
        statuses += output.split()
    assert statuses.count("added") == 40
    assert statuses.count("rejected") == 4
    with Catalog(tmp_path / "home", url) as catalog:
        entries = catalog.entries()
        assert len({entry.digest for entry in entries}) == len({entry.name for entry in entries}) == len(entries) == 40
        assert sorted(path for entry in entries for path in entry.locations) == sorted(
            str(path) for path in library.rglob("*") if path.is_file() and path.name != "damaged.safetensors"
        )
        assert all(entry.tags == ("raced",) and entry.blob for entry in entries)
        assert len(catalog.text_matches("style", 100)) == 40
        assert catalog.verify() == []
