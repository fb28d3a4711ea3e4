"""The generators' commands: fit, evaluate, list, and which of them `generate` takes, with figures in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import typed
from lorahub.generate.own_generators import generator_path
from lorahub.generate.stored import load
from lorahub.hub.adapter import Adapter
from lorahub.hub.catalog import Catalog
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.index import own_similarity
from sorters import BASE, MODULE, TOPICS, sorter, world

CHOSEN = tuple(TOPICS)[:8]
SMALL = ("-o", "steps=3", "-o", "hidden=8", "-o", "latent=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight sorters, measured on one another's tasks, and a semantic generator fitted by the command."""
    folder = tmp_path_factory.mktemp("world")
    world(folder / "shelf", *CHOSEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAHUB_HOME", str(folder / "home"))
        patch.setattr(own_similarity, "STEPS", 2)
        tasks = folder / "shelf" / "tasks.json"
        assert typed("add", folder / "shelf", "--json")[0] == 0
        ran("generator", "measure", "--tasks", tasks)
        ran("generator", "fit", "--kind", "semantic", "-o", "neighbours=2", "-o", "temperature=0.1", *SMALL)
        yield folder


def ran(*arguments: object) -> Any:
    code, out, error = typed(*arguments, "--json")
    assert code == 0, error
    return json.loads(out)


def test_a_fit_is_one_file_that_knows_its_library(home: Path) -> None:
    path = generator_path(home / "home", BASE, "semantic")
    made = load(path)
    assert set(made.origin.library) == set(CHOSEN)
    assert made.layout.gauge == "canonical"
    assert made.origin.told["options"]["neighbours"] == "2"
    [row] = [row for row in ran("generator", "list") if row["kind"] == "semantic"]
    assert (row["experts"], row["gauge"], row["path"]) == (8, "canonical", str(path))


def test_generate_takes_a_fitted_kind_with_its_experts_in_the_lineage(home: Path) -> None:
    out = home / "by-semantic"
    made = ran("generate", "what is said of pets", "--method", "semantic", "--out", out, "--force")
    assert made["method"] == "semantic"
    assert made["why"] == "asked for"
    assert made["experts"][0]["name"] == "pets"
    assert sum(expert["weight"] for expert in made["experts"]) == pytest.approx(1.0)
    assert 0 <= made["novelty"] <= 2
    assert list(read(out).shapes) == [MODULE]
    shown = ran("show", "by-semantic")["lineage"]
    assert [(link["parent_name"], link["weight"]) for link in shown] == [
        (expert["name"], pytest.approx(expert["weight"])) for expert in made["experts"]
    ]
    assert shown[0]["operation"] == "generate:semantic"
    again = ran("generate", "what is said of pets", "--method", "semantic", "--out", home / "again")
    assert (home / "again/adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()
    assert again["experts"] == made["experts"]


def test_without_an_evaluation_it_blends_and_promises_nothing(home: Path) -> None:
    made = ran("generate", "what is said of pets", "--out", home / "g", "--dry-run", "--exclude", "fruit")
    assert made["estimate"] is None
    assert made["novelty_in_spreads"] is None


def test_an_evaluation_leaves_tasks_out_and_decides(home: Path) -> None:
    found = ran("generator", "evaluate", "--tasks", home / "shelf/tasks.json", "--folds", "2")
    trials = found["trials"]
    assert sorted(one["task"] for one in trials) == sorted(CHOSEN)
    assert {one["request"] for one in trials} == {f"what is said of {name}" for name in CHOSEN}
    assert set(found["methods"]) == {"nearest", "blend", "mean of all", "semantic"}
    assert all(one["similarity"] < 0.99 for one in trials)  # its own expert is not there
    gain = sum(one["own"] - one["bare"] for one in trials)
    for method, figures in found["methods"].items():
        scores = [one["scores"][method] for one in trials]
        assert figures["score"] == pytest.approx(sum(scores) / len(scores))
        if gain > 0:
            share = sum(score - one["bare"] for score, one in zip(scores, trials, strict=True)) / gain
            assert figures["recovered"] == pytest.approx(share)
    made = ran("generate", "what is said of pets", "--out", home / "best", "--dry-run")
    there = {name: found["methods"][name]["score"] for name in ("blend", "nearest", "semantic")}
    assert there[made["method"]] == max(there.values())
    assert "tasks left out" in made["why"]
    assert made["estimate"]["tasks"] == 8
    wanted = sum(one["scores"][made["method"]] - one["bare"] for one in trials) / 8
    assert made["estimate"]["gain"] == pytest.approx(wanted)
    listed = {row["kind"]: row["score"] for row in ran("generator", "list")}
    assert listed["semantic"] == pytest.approx(there["semantic"])


def test_hyper_learns_on_the_tasks_and_icm_on_the_weights(home: Path) -> None:
    tasks = home / "shelf/tasks.json"
    drill = ("steps=1", "tasks=2", "rank=3", "hidden=4", "code=4", "heads=2", "channels=2")
    options = [part for one in drill for part in ("-o", one)]
    made = ran("generator", "fit", "--kind", "hyper", "--tasks", tasks, "--out", home / "hyper.safetensors", *options)
    assert made["space"] == "text:tokens-3x384"
    assert load(home / "hyper.safetensors").origin.fingerprint
    ran("generator", "fit", "--kind", "multitask", "--tasks", tasks, "-o", "steps=1", "-o", "tasks=2")
    made = ran("generate", "what is said of pets", "--out", home / "one", "--method", "multitask", "--dry-run")
    assert (made["method"], made["experts"][0]["name"]) == ("multitask", "pets")
    generator_path(home / "home", BASE, "multitask").unlink()  # others judge what was fitted before
    few = ("-o", "steps=1", "-o", "stages=2", "-o", "channels=1", "-o", "latent=2")
    assert ran("generator", "fit", "--kind", "icm", "--out", home / "icm.safetensors", *few)["experts"] == 8


def test_checkpoints_of_one_expert_share_a_tag(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_HOME", str(home / "other"))
    for seed, name in enumerate(["fruit", "fruit-2", "fruit-10", "pets", "music", "sport"]):
        save(
            sorter(0, size=0.3 + seed / 100),
            home / "more" / name,
            card=lambda name=name: f"# {name}\n\nSorts {name}.\n",
        )
    ran("add", home / "more")
    for name in ("fruit", "fruit-2", "fruit-10"):
        ran("tag", name, "expert:Fruit")
    told = ran("generator", "fit", "--dry-run")
    assert (told["experts"], told["checkpoints"], told["gauge"]) == (4, 6, "none")
    assert not (home / "other/generators").exists()
    made = ran("generate", "Sorts fruit", "--out", home / "h", "--method", "nearest", "--dry-run", "--force")
    assert made["novelty_in_spreads"] == {"expert": "fruit", "spreads": pytest.approx(0.0, abs=1e-3)}
    with Catalog(home / "other") as catalog:
        before = {entry.name: entry.description for entry in catalog.entries()}
    ran("generate", "sorting apples from pears", "--out", home / "h", "--method", "nearest", "--force")
    with Catalog(home / "other") as catalog:  # the nearest expert was copied, and keeps what is said of it
        assert {entry.name: entry.description for entry in catalog.entries()} == before
    assert len(before) == 6


PRACTICE = """
import torch
from torch import nn
from lorahub.generate.hypernet import Practice

def practice():
    model = nn.ModuleDict({"a": nn.Linear(384, 384)}).eval().requires_grad_(False)
    def loss(model, batches):
        return model["a"](torch.cat(list(batches))).square().view(len(batches), -1).mean(dim=1)
    draw = lambda step, chance: torch.randn(2, 384, generator=chance)
    return Practice(model, loss, {name: draw for name in %r})
"""


def test_any_base_is_measured_and_judged_by_a_command_and_learned_by_practice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(own_similarity, "STEPS", 1)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(CHOSEN):
        adapter = Adapter({"a": sorter(seed).modules[MODULE]}, "tiny")
        save(adapter, tmp_path / "shelf" / name, card=lambda name=name: f"# {name}\n\nKnows {name}.\n")
    (tmp_path / "score.sh").write_text('echo "0.${#2}"\n')  # by the task's name, whatever the adapter
    (tmp_path / "mine.py").write_text(PRACTICE % (CHOSEN,))
    ran("add", tmp_path / "shelf")
    command = f"sh {tmp_path / 'score.sh'} {{adapter}} {{task}}"
    assert ran("generator", "measure", "--score", command)["measured"] == len(CHOSEN) ** 2
    few = [part for one in ("steps=1", "tasks=2", "rank=3", "hidden=4", "code=4") for part in ("-o", one)]
    made = ran("generator", "fit", "--kind", "hyper", "--practice", "mine:practice", *few)
    assert made["experts"] == len(CHOSEN)
    assert load(generator_path(tmp_path / "home", "tiny", "hyper")).origin.fingerprint
    judged = ran("generator", "evaluate", "--score", command, "--practice", "mine:practice", "--folds", "2")
    assert (
        judged["methods"]["hyper"]["score"]
        == judged["methods"]["blend"]["score"]
        == pytest.approx(sum(float(f"0.{len(name)}") for name in CHOSEN) / len(CHOSEN))
    )
    assert judged["methods"]["hyper"]["recovered"] is None  # nothing was to be gained
    code, _, said = typed("generator", "evaluate")
    assert (code, "--score" in said) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generator", "fit", "--kind", "none-such"], "semantic"),
        (["generator", "fit", "-o", "sharpness=3"], "neighbours"),
        (["generator", "fit", "--kind", "hyper", "--practice", "nowhere:practice"], "MODULE:FUNCTION"),
        (["generate", "what is said of pets", "--method", "icm", "--out", "x"], "generator fit --kind icm"),
        (["generate", "what is said of pets", "--method", "best", "--out", "x"], "blend"),
        (["generate", "what is said of pets", "--method", "semantic", "-o", "rank=2", "--out", "x"], "rank"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(home: Path, arguments: list[str], word: str) -> None:
    code, _, said = typed(*arguments)
    assert (code, word in said) == (1, True), said
    assert "\n" not in said.strip()
