"""The advice that follows from an analysis, the command that gives both, and its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import typed
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.merge.advise import RULES, advise
from lorahub.merge.analyze import analyze
from lorahub.merge.run import methods
from making import Place, adapter, low_rank
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[1] / "cli" / "example"
LARGE = Place(400, 700)


def alone(module: LowRank, called: str = "one") -> Adapter:
    return Adapter({"encoder.layer.0.query": module}, "tiny", {}, {"name": called})


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in a home of its own; returns (exit code, stdout, what it says of an error)."""
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    return typed


# --- advice --------------------------------------------------------------------------------------------------------


def mixed(share: float, seed: int, *, called: str) -> Adapter:
    """A delta with this share of a common one; the rest is its own."""
    common, own = low_rank(LARGE, 4, seed=1), low_rank(LARGE, 4, seed=seed)
    joined = LowRank(
        torch.cat([share * common.down, (1 - abs(share)) * own.down]), torch.cat([common.up, own.up], dim=1)
    )
    return alone(joined, called=called)


CASES: Sequence[tuple[str, list[Adapter], list[float]]] = [
    ("alone", [adapter()], [1.0]),
    ("disjoint", [adapter("words"), adapter("conv.wide")], [1.0, 1.0]),
    ("copies", [mixed(0.95, 5, called="a"), mixed(0.95, 6, called="b")], [1.0, 0.5]),
    ("subtraction", [mixed(0.6, 5, called="a"), mixed(0.6, 6, called="b")], [1.0, -1.0]),
    ("cancelling", [mixed(0.8, 5, called="a"), mixed(-0.8, 6, called="b")], [1.0, 1.0]),
    ("clashing", [mixed(0.4, 5, called="a"), mixed(-0.4, 6, called="b")], [1.0, 1.0]),
    ("apart", [alone(low_rank(LARGE, 4, seed=s)) for s in (5, 6, 7)], [1.0] * 3),
    ("related", [mixed(0.5, 5, called="a"), mixed(0.5, 6, called="b")], [1.0, 1.0]),
]


@pytest.mark.parametrize(("rule", "inputs", "weights"), CASES, ids=[case[0] for case in CASES])
def test_each_rule_has_its_case(rule: str, inputs: list[Adapter], weights: list[float]) -> None:
    told = advise(analyze(inputs, weights))
    assert told.rule == rule
    assert "{" not in told.reason
    if rule == "copies":
        assert told.weights == pytest.approx((2 / 3, 1 / 3))
    else:
        assert told.weights == tuple(weights)


def test_the_rules_name_methods_that_exist_and_the_last_fits_all() -> None:
    assert {rule.name for rule in RULES} == {case[0] for case in CASES}
    assert {rule.method for rule in RULES} <= set(methods())


def test_cautions() -> None:
    strong = alone(low_rank(LARGE, 4, seed=1, scale=100.0), called="strong")
    weak = replace(alone(low_rank(LARGE, 4, seed=2), called="weak"), base="other")
    third = alone(low_rank(LARGE, 4, seed=3), called="third")
    told = advise(analyze([strong, weak, third], base="tiny"))
    for words in ("2 different bases", "times the weakest", "add up to 12"):
        assert any(words in caution for caution in told.cautions), words
    assert advise(analyze([third, third])).cautions == ()
    assert dict(advise(analyze([third, third]), rank=3).options) == {"rank": 3}


# --- the command ---------------------------------------------------------------------------------------------------

NAMES = ("clinc-home", "clinc-travel", "sst2-movie-reviews")


def test_the_command_on_real_adapters(call, tmp_path: Path) -> None:
    refs = [f"{EXAMPLE / name}" for name in NAMES]
    code, out, _ = call("analyze", *refs[:2], f"{refs[2]}:0.7", "--json", "--plot", tmp_path / "map.png")
    told = json.loads(out)
    assert code == 0
    assert [one["name"] for one in told["adapters"]] == list(NAMES)
    assert told["adapters"][2]["weight"] == 0.7
    assert [(one["first"], one["second"]) for one in told["pairs"]] == [
        ("clinc-home", "clinc-travel"),
        ("clinc-home", "sst2-movie-reviews"),
        ("clinc-travel", "sst2-movie-reviews"),
    ]
    assert {"cosine", "norm_ratio", "outputs", "inputs", "conflict", "conflict_error"} <= set(told["pairs"][0]["whole"])
    assert len(told["pairs"][0]["modules"]) == told["modules"] == 12
    assert list(told["pairs"][0]["layers"]) == [f"encoder.layer.{i}" for i in range(6)]
    assert {"method", "options", "weights", "reason"} <= set(told["advice"])
    with Image.open(tmp_path / "map.png") as image:
        image.load()
        assert image.format == "PNG"
        assert 600 < image.width < 6000
        assert 300 < image.height < 3000
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10  # something is drawn


def test_the_command_in_words(call) -> None:
    refs = [EXAMPLE / name for name in NAMES]
    code, out, _ = call("analyze", *refs, "--layers")
    assert code == 0
    for word in (
        "clinc-home | clinc-travel",
        "+-",
        "interference",
        "encoder.layer.5",
        "expected best",
        "lorahub merge",
    ):
        assert word in out
    assert "furthest from orthogonal: encoder.layer." in call("analyze", *refs)[1]
    code, out, _ = call("analyze", refs[0])
    assert code == 0
    assert "stable rank" in out
    assert "try:" not in out
    assert call("analyze", refs[0], f"{refs[1]}:0")[0] == 1
    assert call("analyze")[0] == 2


def test_a_picture_is_replaced_only_when_asked(call, tmp_path: Path) -> None:
    place = tmp_path / "map.png"
    place.write_bytes(b"mine")
    code, _, said = call("analyze", EXAMPLE / NAMES[0], "--plot", place)
    assert (code, "--force" in said, place.read_bytes()) == (1, True, b"mine")
    assert call("analyze", EXAMPLE / NAMES[0], "--plot", place, "--force")[0] == 0
    with Image.open(place) as image:
        assert image.width > 500
    code, _, said = call("analyze", EXAMPLE / NAMES[0], "--plot", tmp_path / "map.jpg")
    assert (code, ".png" in said) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "map.png"]


def test_pictures_of_many_adapters_with_odd_names(tmp_path: Path) -> None:
    from lorahub.cli.plot import save_plot, shortened

    inputs = [
        adapter("layer.0.value", "words", seed=seed, called=f"a $very$ long \x1b name_{{of}} number {seed} 水彩")
        for seed in range(20)
    ]
    with Image.open(save_plot(analyze(inputs), tmp_path / "many.png")) as image:
        assert 1500 < image.width < 6000
        assert image.height < 3000
    short = shortened([f"banking77-something-{i}-more" for i in range(20)])
    assert len(set(short)) == 20
    assert max(map(len, short)) <= 18
    assert shortened(["abcdefghijklmnopqrstuvwxyz", "a$b$"]) == ["abcdefgh…rstuvwxyz", r"a\$b\$"]
