"""The encoder's commands: fit, evaluate, and what search, similar, describe and map make of it; figures in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import typed
from concepts import BASE, CONCEPTS, concept_adapter, shelf
from lorahub.hub.catalog import Catalog
from lorahub.hub.writing import save
from lorahub.index.weight_encoder import encoder_path, load_encoder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with 24 adapters of four concepts, the first of each silent, and an encoder fitted by the command."""
    folder = tmp_path_factory.mktemp("world")
    shelf(folder / "shelf", 6, bare=(0, 1, 2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAHUB_HOME", str(folder / "home"))
        assert typed("add", folder / "shelf", "--json")[0] == 0
        code, out, error = typed("encoder", "fit", "--kind", "ridge", "--json")
        assert code == 0, error
        (folder / "fit.json").write_text(out)
        yield folder


def asked(*arguments: object) -> Any:
    code, out, error = typed(*arguments, "--json")
    assert code == 0, error
    return json.loads(out)


def test_fit_says_what_it_did_and_encodes_the_base(world: Path) -> None:
    told = json.loads((world / "fit.json").read_text())
    assert {"base", "kind", "out", "space", "described", "seen", "examples", "text_space", "seed"} <= set(told)
    assert (told["base"], told["kind"], told["described"], told["seen"]) == (BASE, "ridge", 20, 20)
    path = encoder_path(world / "home", BASE)
    assert told["out"] == str(path)
    assert load_encoder(path).space == told["space"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no checkpoint is left
    with Catalog(world / "home") as catalog:
        assert catalog.vector_state(told["space"])[0] == 24


def test_search_by_weights_and_hybrid(world: Path) -> None:
    for mode in ("weights", "hybrid"):
        hits = asked("search", "robot android", "--mode", mode, "--limit", "6")
        assert {hit["name"] for hit in hits} == {"lora-001", *(f"robot-{n}" for n in range(5, 24, 4))}
        assert set(hits[0]) == {"id", "name", "score", "base", "why", "confidence"}
        assert all(0 <= hit["confidence"] <= 1 for hit in hits)
    code, out, _ = typed("search", "robot android", "--mode", "weights")
    assert (code, "right in" in out) == (0, True)


def test_a_search_among_stored_vectors_needs_no_torch(world: Path) -> None:
    for mode in ("hybrid", "weights"):
        code = (
            "import sys\n"
            f"sys.argv = ['lorahub', 'search', 'robot', '--mode', {mode!r}, '--json']\n"
            "from lorahub.cli.main import run\n"
            "try: run()\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules)"
        )
        environment = {**os.environ, "LORAHUB_HOME": str(world / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


def test_similar_shows_the_encoders_cosine(world: Path) -> None:
    found = asked("similar", "lora-003", "--limit", "5")
    assert {one["name"].split("-")[0] for one in found} == {"kitten"}
    assert all(one["encoded"] > 0.5 and 0 <= one["confidence"] <= 1 for one in found)
    assert "encoded" in typed("similar", "lora-003", "--limit", "2")[1]


def test_describe_an_entry_or_a_file(world: Path, tmp_path: Path) -> None:
    save(concept_adapter(0, 999, base=None), tmp_path / "nameless")
    for ref in ("lora-000", tmp_path / "nameless"):
        found = asked("describe", ref, "--limit", "2")
        assert set(found) == {"ref", "name", "base", "space", "certain", "cases", "words", "neighbours"}
        assert found["certain"] is True
        assert found["words"][0]["words"] == CONCEPTS[0]
        assert set(found["words"][0]) == {"words", "cosine", "confidence"}
        assert {one["name"].split("-")[0] for one in found["neighbours"]} <= {"watercolor", "lora"}
    code, out, error = typed("describe", "lora-000")
    assert (code, error) == (0, "")
    assert CONCEPTS[0] in out
    assert "held out" in out


def test_evaluate_fits_anew_without_those_it_judges_by(world: Path, tmp_path: Path) -> None:
    found = asked("encoder", "evaluate")
    assert (found["pool"], found["fits"], found["seen"]) == (20, 5, 20)
    assert set(found["found"]["recall"]) == {"1", "5", "10"}
    for name in ("found", "ceiling", "named"):
        assert found[name]["reciprocal_rank"] > 1.5 * found["chance"]["reciprocal_rank"]
    assert found["ceiling"]["recall"]["1"] == 1.0
    lines = typed("encoder", "evaluate", "--folds", "2")[1]
    assert "left out of 2 fits" in lines
    assert "chance" in lines
    assert not list((world / "home" / "encoders").glob("*.checkpoint"))
    code, _, error = typed("encoder", "evaluate", "--folds", "11")
    assert (code, "expected 1 to 10" in error) == (1, True)


def test_the_library_is_drawn(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    found = asked("map", "--out", out)
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert (found["by"], found["missing"], len(found["points"])) == ("weights", 0, 24)
    assert set(found["points"][0]) == {"id", "name", "x", "y", "theme"}
    assert typed("map", "--out", out)[0] == 1
    assert asked("map", "--out", tmp_path / "no.html", "--by", "text", "--dry-run")["by"] == "text"
    assert not (tmp_path / "no.html").exists()
    for arguments, word in ((["--by", "colour"], "weights or text"), (["--base", "none"], "at least 3")):
        code, _, error = typed("map", "--out", tmp_path / "no.png", *arguments)
        assert (code, word in error, "\n" in error.strip()) == (1, True, False)


def test_an_encoder_can_be_written_elsewhere(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    assert asked("encoder", "fit", "--kind", "ridge", "--out", out, "--dry-run")["described"] == 20
    assert not out.exists()
    before = encoder_path(world / "home", BASE).read_bytes()
    asked("encoder", "fit", "--kind", "ridge", "--out", out, "--seed", "3")
    assert load_encoder(out).told["seed"] == 3
    assert encoder_path(world / "home", BASE).read_bytes() == before
    code, _, error = typed("encoder", "fit", "--kind", "ridge", "--out", out)
    assert (code, "--force" in error) == (1, True)
    out.write_bytes(out.read_bytes()[:200])
    code, _, error = typed("encoder", "evaluate", "--encoder", out)
    assert (code, "\n" in error.strip()) == (1, False)


# --- without an encoder ---------------------------------------------------------------------------------------------


def test_without_an_encoder_each_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    typed("add", *shelf(tmp_path / "shelf", 1))
    for arguments in (
        ["search", "robot", "--mode", "weights"],
        ["describe", "robot-1"],
        ["map", "--by", "weights", "--out", tmp_path / "m.png"],
    ):
        code, out, error = typed(*arguments)
        assert (code, out) == (1, "")
        assert "lorahub encoder fit" in error
        assert "\n" not in error.strip()
    code, _, error = typed("encoder", "fit")
    assert (code, "at least 8" in error, f"{BASE}: 4" in error) == (1, True, True)
    assert typed("search", "robot android", "--json")[0] == 0
