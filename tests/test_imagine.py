"""The imagine command: what it finds, how it fuses, what it writes and remembers, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import typed
from lorahub.cli import canvas
from lorahub.cli.sheet import GAP, LEAST, read_recipe
from lorahub.generate.painting import Painter
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save
from numpy.typing import NDArray
from PIL import Image
from small_pictures import adapter, composition, gated_paths, painted, picture_pipeline, write_adapter, write_gates

STYLES = {
    "watercolor": ("Wet, pale colours that pool and run on rough paper.", "watercolor painting"),
    "pencil-sketch": ("Thin graphite lines and hatching on white paper.", "pencil sketch"),
    "wild-animals": ("Wild animals of the forest: foxes, bears and wolves.", "emoji animal"),
    "letters": ("Sorts letters of complaint by product.", ""),
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _one_reader() -> Iterator[None]:
    """The sentence encoder that reads prompts is loaded once, not for every command."""
    from lorahub.generate import pictures

    with pytest.MonkeyPatch.context() as patch:
        reader = pictures.Reader()
        patch.setattr(pictures, "Reader", lambda: reader)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and adapters for it, in folders."""
    room: Path = tmp_path_factory.mktemp("world")
    pipeline = picture_pipeline()
    pipeline.save_pretrained(room / "base")
    for seed, (name, (text, trigger)) in enumerate(STYLES.items()):
        write_adapter(adapter(pipeline.transformer, seed), room / "library" / name, name, text, trigger)
    return room


@pytest.fixture(scope="module")
def known(world: Path) -> Path:
    """A home whose catalogue knows the adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAHUB_HOME", str(world / "home"))
        assert typed("add", world / "library")[0] == 0
    return world / "home"


@pytest.fixture
def call(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in a home of its own, which knows the adapters; returns (exit code, stdout, stderr or error)."""
    shutil.copytree(known, tmp_path / "home")
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return typed


@pytest.fixture
def imagine(call: Call, world: Path) -> Call:
    """`lorahub imagine` with the small pipeline and two steps."""
    return lambda *arguments: call("imagine", "--pipeline", world / "base", "--steps", 2, *arguments)


def facts(outcome: tuple[int, str, str]) -> Any:
    code, out, said = outcome
    assert code == 0, said
    return json.loads(out)


def pixels(path: Path) -> NDArray[np.int16]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.int16)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_the_adapters_that_the_prompt_asks_for_are_found_and_summed(imagine: Call, world: Path, tmp_path: Path) -> None:
    made = facts(imagine("a watercolor fox", "--out", tmp_path / "fox.png", "--seed", 3, "--json"))
    assert [one["name"] for one in made["adapters"]] == ["watercolor", "wild-animals"]
    assert made["adapters"][0]["score"] == 1.0
    assert made["adapters"][0]["why"] == ["named: watercolor"]
    assert "fox" in made["adapters"][1]["why"][0]
    assert {"out", "prompt", "fuse", "reason", "adapters", "left_out", "seeds", "steps", "seconds", "base"} <= set(made)
    assert (made["fuse"], made["seeds"], made["steps"], made["base"]) == ("sum", [3], 2, None)
    assert "no gates in" in made["reason"]
    wanted = painted(world, ["watercolor", "wild-animals"], [1.0, 1.0], "a watercolor fox", seed=3)
    assert np.array_equal(pixels(tmp_path / "fox.png"), wanted)
    assert np.abs(wanted - painted(world, [], [], "a watercolor fox", seed=3)).max() > 5


def test_a_prompt_that_asks_for_nothing_gets_the_base_and_is_told_so(
    imagine: Call, world: Path, tmp_path: Path
) -> None:
    code, out, said = imagine("a red wooden chair", "--out", tmp_path / "a.png")
    assert code == 0
    assert "the base's own picture" in said
    assert "the base's own picture" in out
    assert np.array_equal(pixels(tmp_path / "a.png"), painted(world, [], [], "a red wooden chair"))
    made = facts(imagine("a watercolor fox", "--limit", 0, "--out", tmp_path / "b.png", "--json"))
    assert (made["adapters"], made["fuse"], made["left_out"]) == ([], "none", [])


def test_what_does_not_fit_is_left_out_and_reported(call: Call, imagine: Call, tmp_path: Path) -> None:
    model = picture_pipeline().transformer
    place = "transformer.transformer_blocks.0.attn1.to_q"
    wide = Adapter({place: LowRank(torch.ones(2, 5), torch.ones(16, 2))}, None, {}, {"name": "wide"})
    place = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    encoder = Adapter({place: LowRank(torch.ones(2, 5), torch.ones(5, 2))}, None, {}, {"name": "words"})
    some = {
        "blue-mosaic": wide,
        "mosaic-words": encoder,
        "mosaic-of-another": adapter(model, 50, base="runwayml/stable-diffusion-v1-5"),
    }
    for name, one in some.items():
        write_adapter(one, tmp_path / "more" / name, name, f"A mosaic, {name}.", "tile mosaic")
    call("add", tmp_path / "more")
    arguments = ("a tile mosaic", "--out", tmp_path / "a.png", "--dry-run", "--base", "tests/small-pictures")
    made = facts(imagine(*arguments, "--json"))
    assert made["adapters"] == []
    reasons = {one["name"]: one["reason"] for one in made["left_out"]}
    assert "to_q is 16x16 in the transformer, 16x5 in it" in reasons["blue-mosaic"]
    assert "changes text_encoder, not the transformer" in reasons["mosaic-words"]
    assert "stable-diffusion-v1-5" in reasons["mosaic-of-another"]
    code, _, said = imagine(*arguments)
    assert code == 0
    assert len([line for line in said.splitlines() if line.startswith("left out: ")]) == 1
    for name, word in (("blue-mosaic", "16x5"), ("mosaic-of-another", "--base runwayml/stable-diffusion-v1-5")):
        code, _, said = imagine(*arguments, "--adapters", name)
        assert (code, word in said) == (1, True)
    assert facts(imagine(*arguments[:-2], "--adapters", "mosaic-of-another", "--json"))["adapters"]


def test_parts_for_other_components_are_said_to_be_left_aside(call: Call, imagine: Call, tmp_path: Path) -> None:
    words = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": LowRank(torch.ones(2, 5), torch.ones(5, 2))}
    both = Adapter({**adapter(picture_pipeline().transformer, 60).modules, **words}, None, {}, {"name": "both"})
    assert call("add", save(both, tmp_path / "both", "diffusers"), "--name", "stained-glass")[0] == 0
    code, out, said = imagine("stained glass", "--out", tmp_path / "a.png", "--dry-run", "--json")
    assert json.loads(out)["adapters"][0]["aside"] == ["text_encoder"]
    assert "stained-glass also changes text_encoder" in said
    assert code == 0


# --- what is named ----------------------------------------------------------------------------------------------------


def test_named_adapters_and_weights_skip_the_search(imagine: Call, world: Path, tmp_path: Path) -> None:
    path = world / "library" / "letters"
    named = ("--adapters", "watercolor:0.5", "--adapters", f"{path}:-0.25", "--json")
    made = facts(imagine("a boat", *named, "--out", tmp_path / "a.png"))
    assert [(one["name"], one["weight"], one["score"]) for one in made["adapters"]] == [
        ("watercolor", 0.5, None), ("letters", -0.25, None)
    ]  # fmt: skip
    assert np.array_equal(pixels(tmp_path / "a.png"), painted(world, ["watercolor", "letters"], [0.5, -0.25], "a boat"))
    one = ("--adapters", "watercolor", "-w", 0.5, "--out", tmp_path / "b.png", "--json")
    assert facts(imagine("a boat", *one))["adapters"][0]["weight"] == 0.5
    found = facts(imagine("watercolor", "-w", 0.3, "--out", tmp_path / "c.png", "--json", "--dry-run"))
    assert found["adapters"][0]["weight"] == 0.3


def test_trigger_words_are_mentioned_and_appended_on_demand(imagine: Call, tmp_path: Path) -> None:
    arguments = ("watercolor of a boat", "--out", tmp_path / "a.png", "--dry-run", "--json")
    code, out, said = imagine(*arguments)
    made = json.loads(out)
    assert (code, made["prompt"]) == (0, "watercolor of a boat")
    assert made["adapters"][0]["lacking_triggers"] == ["watercolor painting"]
    assert "'watercolor painting' (watercolor); --triggers" in said
    made = facts(imagine(*arguments, "--triggers"))
    assert made["prompt"] == "watercolor of a boat, watercolor painting"
    assert made["adapters"][0]["lacking_triggers"] == []
    made = facts(imagine("Watercolor  paintings of a boat", *arguments[1:], "--triggers"))
    assert made["prompt"] == "Watercolor  paintings of a boat"


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gates(world: Path, tmp_path: Path) -> Path:
    """Gates of the base."""
    model = picture_pipeline().transformer
    write_gates(model, gated_paths(model), tmp_path / "g.safetensors")
    return tmp_path / "g.safetensors"


def test_gates_are_used_where_there_are_some(imagine: Call, gates: Path, tmp_path: Path) -> None:
    ask = ("watercolor", "--json", "--out")
    assert facts(imagine(*ask, tmp_path / "sum.png"))["fuse"] == "sum"
    (tmp_path / "home" / "gates").mkdir()
    (tmp_path / "home" / "gates" / "z.safetensors").write_bytes(gates.read_bytes())
    made = facts(imagine(*ask, tmp_path / "gated.png"))
    assert (made["fuse"], made["gates"].endswith("z.safetensors")) == ("gated", True)
    assert np.abs(pixels(tmp_path / "gated.png") - pixels(tmp_path / "sum.png")).max() > 3
    assert facts(imagine(*ask, tmp_path / "c.png", "--gates", gates))["gates"] == str(gates)
    assert np.array_equal(pixels(tmp_path / "c.png"), pixels(tmp_path / "gated.png"))
    assert facts(imagine(*ask, tmp_path / "d.png", "--fuse", "sum"))["reason"] == "as asked"
    assert np.array_equal(pixels(tmp_path / "d.png"), pixels(tmp_path / "sum.png"))


def test_adapters_are_composed_and_so_again(imagine: Call, call: Call, world: Path) -> None:
    for name, passes in (("each.png", [[1.0, 0.0], [0.0, 1.0]]), ("tagged.png", [[1.0, 1.0], [0.0, 1.0]])):
        made = facts(imagine("a watercolor fox", "--fuse", "composed", "--out", name, "--json"))
        assert (made["fuse"], made["reason"], made["passes"]) == ("composed", "as asked", passes)
        assert np.abs(pixels(Path(name)) - composition(world, list(STYLES)[::2], "a watercolor fox", passes)).max() <= 1
        call("tag", "watercolor", "Style")
    call("imagine", "--again", "each.png", "--out", "b.png")
    assert np.array_equal(pixels(Path("each.png")), pixels(Path("b.png")))


# --- sheets ---------------------------------------------------------------------------------------------------------


def test_compare_paints_every_way(imagine: Call, world: Path, gates: Path, tmp_path: Path) -> None:
    prompt = "a watercolor fox"
    ask = (prompt, "--compare", "--fuse", "composed", "--gates", gates, "--out", tmp_path / "a.png", "--json")
    made = facts(imagine(*ask))
    assert made["panels"] == ["base", "watercolor", "wild-animals", "sum", "composed", "gated"]
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[1] == GAP + 6 * (LEAST + GAP)
    top = picture.shape[0] - LEAST - GAP
    wanted = [painted(world, names, [1.0] * len(names), prompt) for names in ([], ["watercolor"], ["wild-animals"])]
    wanted.append(painted(world, ["watercolor", "wild-animals"], [1.0, 1.0], prompt))
    wanted.append(composition(world, ["watercolor", "wild-animals"], prompt))
    for number, small in enumerate(wanted):
        left = GAP + number * (LEAST + GAP)
        panel = picture[top : top + LEAST, left : left + LEAST]
        assert np.array_equal(panel[:: LEAST // 8, :: LEAST // 8], small), made["panels"][number]
    assert facts(imagine(prompt, "--compare", "--out", tmp_path / "b.png", "--json"))["panels"][-1] == "sum"
    one = facts(imagine("watercolor", "--compare", "--out", tmp_path / "c.png", "--json", "-w", 0.5))
    assert one["panels"] == ["base", "watercolor x 0.5"]
    rows = facts(imagine("watercolor", "--compare", "--grid", 3, "--out", tmp_path / "d.png", "--json"))
    assert rows["seeds"] == [0, 1, 2]
    assert pixels(tmp_path / "d.png").shape[0] > 3 * LEAST


def test_a_grid_holds_a_picture_for_every_seed(imagine: Call, world: Path, tmp_path: Path) -> None:
    made = facts(imagine("watercolor", "--grid", 3, "--seed", 5, "--out", tmp_path / "a.png", "--json"))
    assert made["seeds"] == [5, 6, 7]
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[1] == GAP + 2 * (LEAST + GAP)
    below = picture[picture.shape[0] - LEAST - GAP : -GAP, GAP : GAP + LEAST]
    wanted = painted(world, ["watercolor"], [1.0], "watercolor", seed=7)
    assert np.abs(below[:: LEAST // 8, :: LEAST // 8] - wanted).max() <= 1


# --- what is written and remembered ---------------------------------------------------------------------------------


def test_equal_requests_give_equal_files_that_carry_their_recipe(imagine: Call, tmp_path: Path) -> None:
    ask = ("a watercolor fox", "--out", tmp_path / "a.png", "--seed", 9)
    assert imagine(*ask)[0] == 0
    first = (tmp_path / "a.png").read_bytes()
    assert imagine(*ask, "--force")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == first
    recipe = read_recipe(tmp_path / "a.png")
    assert (recipe["prompt"], recipe["seeds"], recipe["steps"], recipe["guidance"]) == ("a watercolor fox", [9], 2, 3.0)
    assert [len(one["digest"]) for one in recipe["adapters"]] == [64, 64]
    assert len(recipe["base_fingerprint"]) == 64
    assert {"fuse", "reason", "pipeline", "base", "version", "command", "panels"} <= set(recipe)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["parameters"].startswith("a watercolor fox <lora:watercolor:1>")


def test_a_recipe_can_be_painted_again(call: Call, imagine: Call, gates: Path, tmp_path: Path) -> None:
    assert imagine("a watercolor fox", "--seed", 4, "--gates", gates, "-w", 0.8, "--out", tmp_path / "a.png")[0] == 0
    again = ("imagine", "--again", tmp_path / "a.png", "--out", tmp_path / "b.png", "--gates", gates, "--json")
    made = facts(call(*again))
    assert made["fuse"] == "gated"
    assert [one["weight"] for one in made["adapters"]] == [0.8, 0.8]
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code, _, said = call("imagine", "--again", tmp_path / "plain.png", "--out", tmp_path / "c.png")
    assert (code, "recipe" in said) == (1, True)


def test_the_catalogue_knows_the_pictures_of_an_adapter(call: Call, imagine: Call, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert imagine("a watercolor fox", "--out", out)[0] == 0
    [picture] = json.loads(call("show", "watercolor", "--json")[1])["pictures"]
    assert (picture["out"], picture["prompt"], picture["weight"]) == (str(out.resolve()), "a watercolor fox", 1.0)
    assert "a watercolor fox" in call("show", "wild-animals")[1]
    assert imagine("watercolor", "--out", out, "--force")[0] == 0
    assert [one["prompt"] for one in json.loads(call("show", "watercolor", "--json")[1])["pictures"]] == ["watercolor"]
    assert json.loads(call("show", "wild-animals", "--json")[1])["pictures"] == []
    assert json.loads(call("show", "watercolor", "--json")[1])["lineage"] == []
    assert call("verify")[0] == 0
    stranger = world / "base" / ".." / "stranger"
    write_adapter(adapter(picture_pipeline().transformer, 70), stranger, "stranger", "Unknown.")
    assert imagine("a boat", "--adapters", stranger, "--out", tmp_path / "b.png")[0] == 0
    assert len(json.loads(call("show", str(stranger.resolve()), "--json")[1])["pictures"]) == 1


def test_a_dry_run_writes_nothing(imagine: Call, call: Call, tmp_path: Path) -> None:
    code, out, _ = imagine("a watercolor fox", "--out", tmp_path / "new" / "a.png", "--dry-run")
    assert (code, out.startswith("would paint")) == (0, True)
    assert not (tmp_path / "new").exists()
    assert json.loads(call("show", "watercolor", "--json")[1])["pictures"] == []


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, SystemExit(130), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["paint", "write"])
def test_nothing_is_half_written(
    imagine: Call, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException, where: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"before")

    def fail(*arguments: Any, **_: Any) -> Any:
        if where == "write":
            arguments[1].write_bytes(b"half of a picture")
        raise trouble

    if where == "paint":
        monkeypatch.setattr(Painter, "paint", fail)
    else:
        monkeypatch.setattr(canvas, "write_png", fail)
    code = imagine("watercolor", "--out", tmp_path / "a.png", "--force")[0]
    assert code in (1, 130)
    assert (tmp_path / "a.png").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "home"]
    monkeypatch.undo()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--fuse", "best"], "composed, gated, sum"),
        (["--fuse", "gated"], "--gates FILE"),
        (["--grid", "0"], "1 to 64"),
        (["--steps", "0"], "at least 1"),
        (["--seed", "-1"], "--seed"),
        (["--limit", "-1"], "limit"),
        (["--mode", "weights"], "weight encoder"),
        (["--mode", "guess"], "hybrid"),
        (["--dtype", "int8"], "float32"),
        (["--device", "abacus"], "cpu or cuda"),
        (["--adapters", "nobody"], "nobody"),
        (["--gates", "none.safetensors"], "none.safetensors"),
        (["--adapters", "watercolor:1", "-w", "1"], "one of the two"),
        (["--again", "x.png"], "not both"),
    ],
)
def test_bad_options_are_one_line_that_says_what_there_is(
    imagine: Call, tmp_path: Path, arguments: list[str], word: str
) -> None:
    code, out, said = imagine("watercolor", "--out", tmp_path / "a.png", *arguments)
    assert (code, out) == (1, "")
    assert word in said
    assert not (tmp_path / "a.png").exists()


def test_a_taken_or_unfit_name_and_a_missing_pipeline_are_refused_first(
    call: Call, imagine: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    monkeypatch.setattr(canvas, "open_painter", lambda *_, **__: pytest.fail("opened the pipeline first"))
    code, _, said = imagine("watercolor", "--out", tmp_path / "a.png")
    assert (code, "--force" in said) == (1, True)
    code, _, said = imagine("watercolor", "--out", tmp_path / "a.jpg")
    assert (code, ".png" in said) == (1, True)
    monkeypatch.undo()
    assert call("imagine", "watercolor", "--out", "b.png", "--pipeline", tmp_path)[0] == 1
    monkeypatch.setattr("lorahub.generate.pictures.shipped", lambda: tmp_path / "nowhere")
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    code, _, said = call("imagine", "watercolor", "--out", tmp_path / "b.png")
    assert (code, "--pipeline" in said) == (1, True)
    assert (tmp_path / "a.png").read_bytes() == b"mine"


def test_json_is_pure_in_a_process_of_its_own(world: Path, tmp_path: Path) -> None:
    """Also what diffusers and transformers write while they load stays off stdout, and stderr has our lines only."""
    script = Path(sys.executable).with_name("lorahub")
    done = subprocess.run(
        [script, "imagine", "a boat", "--pipeline", world / "base", "--steps", "1", "--json", "--out", "a.png"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"LORAHUB_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "a.png"
    assert len(done.stderr.splitlines()) == 1, done.stderr
