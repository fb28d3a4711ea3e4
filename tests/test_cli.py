"""The contract of the command line: pure JSON, exit codes, one line a failure, nothing written unasked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import typed
from lorahub.cli.refs import weighted, weights_of
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption
from lorahub.hub.lowrank import LowRank
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.run import methods, options

NAMES = ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value")
DESCRIPTIONS = {
    "watercolor": "Paints soft watercolor pictures of landscapes.",
    "letters": "Sorts letters of complaint by product.",
    "mails": "Sorts support mails by urgency.",
}


def small(seed: int, *, base: str = "tiny", rank: int = 2, name: str = "small") -> Adapter:
    torch.manual_seed(seed)
    modules = {key: LowRank(torch.randn(rank, 12), torch.randn(8, rank)) for key in NAMES}
    return Adapter(modules, base=base, meta={"name": name})


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Three PEFT folders with a model card each."""
    for seed, (name, text) in enumerate(DESCRIPTIONS.items()):
        save(small(seed), tmp_path / "shelf" / name, card=lambda name=name, text=text: f"# {name}\n\n{text}\n")
    return tmp_path / "shelf"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in a home of its own; returns (exit code or error, stdout, stderr)."""
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return typed


def test_the_main_job_in_json(call, shelf: Path, tmp_path: Path) -> None:
    code, out, _ = call("add", shelf, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["status"] for row in rows] == ["added"] * 3
    assert {"id", "name", "path", "format", "base", "rank", "modules", "mergeable", "status", "reason"} <= set(rows[0])

    assert [row["status"] for row in json.loads(call("add", shelf, "--json")[1])] == ["unchanged"] * 3
    assert {row["name"] for row in json.loads(call("list", "--json")[1])} == set(DESCRIPTIONS)

    hits = json.loads(call("search", "watercolor", "--json")[1])
    assert hits[0]["name"] == "watercolor"
    assert {"id", "name", "score", "base", "why"} <= set(hits[0])

    merged = json.loads(call("merge", "letters:0.5", "mails:-0.25", "--out", tmp_path / "m", "--json")[1])
    assert {"out", "method", "modules", "error", "cosine", "norm_ratio", "energy"} <= set(merged)
    one, other = read(shelf / "letters").modules[NAMES[0]], read(shelf / "mails").modules[NAMES[0]]
    wanted = 0.5 * one.dense() - 0.25 * other.dense()
    torch.testing.assert_close(read(tmp_path / "m").modules[NAMES[0]].dense(), wanted)

    shown = json.loads(call("show", "m", "--json")[1])
    assert [(link["parent_name"], link["weight"]) for link in shown["lineage"]] == [("letters", 0.5), ("mails", -0.25)]
    card = (tmp_path / "m" / "README.md").read_text()
    assert "letters" in card
    assert shown["lineage"][0]["parent_digest"][:16] in card


def test_generate_blends_the_near_and_refuses_the_far(call, shelf: Path, tmp_path: Path) -> None:
    call("add", shelf)
    code, out, _ = call(
        "generate", "sort support mails by product", "--base", "tiny", "--out", tmp_path / "g", "--json"
    )
    made = json.loads(out)
    assert code == 0
    assert {expert["name"] for expert in made["experts"][:2]} == {"letters", "mails"}
    assert sum(expert["weight"] for expert in made["experts"]) == pytest.approx(1.0)
    wanted = sum(e["weight"] * read(shelf / e["name"]).modules[NAMES[1]].dense() for e in made["experts"])
    torch.testing.assert_close(read(tmp_path / "g").modules[NAMES[1]].dense(), wanted)

    code, _, said = call("generate", "quantum chromodynamics on the lattice", "--base", "tiny", "--out", tmp_path / "n")
    assert code == 3
    assert "close" in said
    assert not (tmp_path / "n").exists()
    assert json.loads(out)["forced"] is False
    far = ["generate", "quantum chromodynamics on the lattice", "--base", "tiny", "--out", tmp_path / "far", "--json"]
    insisted = json.loads(call(*far, "--force")[1])
    assert insisted["forced"] is True
    assert insisted["similarity"] < insisted["close"]
    assert json.loads(call("show", "far", "--json")[1])["lineage"][0]["options"]["forced"] is True
    assert call("generate", "sort mails", "--base", "other", "--out", tmp_path / "n")[0] == 1


def test_nothing_is_overwritten_or_written_without_being_asked(call, shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    assert call("merge", shelf / "letters", shelf / "mails", "--out", out, "--dry-run")[0] == 0
    assert not out.exists()
    assert call("merge", shelf / "letters", shelf / "mails", "--out", out)[0] == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    code, _, said = call("merge", shelf / "letters", "--out", out)
    assert (code, "--force" in said) == (1, True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert call("merge", shelf / "letters", "--out", out, "--force")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "m", "shelf"]


def test_different_bases_are_refused_by_name(call, shelf: Path, tmp_path: Path) -> None:
    save(small(9, base="giant"), tmp_path / "giant")
    code, _, said = call("merge", shelf / "letters", tmp_path / "giant", "--out", tmp_path / "m")
    assert code == 1
    assert "tiny" in said
    assert "giant" in said
    assert call("merge", shelf / "letters", tmp_path / "giant", "--base", "tiny", "--out", tmp_path / "m")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--method", "no-such"], "exact"),
        (["-o", "sharpness=3"], "rank"),
        (["-o", "rank"], "KEY=VALUE"),
        (["--rank", "0"], "rank"),
        (["--energy", "1.5"], "energy"),
        (["--dtype", "int8"], "dtype"),
        (["--extras", "burn"], "refuse"),
        (["--to", "onnx"], "peft"),
        (["-w", "1", "-w", "2", "-w", "3"], "weights"),
        (["--where", "*=1"], "1 weights for"),
        (["--where", "nothing*=1,1"], "no module fits"),
        (["--where", "*=1,x"], "GLOB=W,W"),
    ],
)
def test_bad_options_say_what_there_is(call, shelf: Path, tmp_path: Path, arguments: list[str], word: str) -> None:
    code, _, said = call("merge", shelf / "letters", shelf / "mails", "--out", tmp_path / "m", *arguments)
    assert code == 1
    assert word in said
    assert not (tmp_path / "m").exists()


def test_exit_codes(call, shelf: Path, tmp_path: Path) -> None:
    assert call("merge")[0] == 2
    assert call("show", "nobody")[0] == 1
    code, out, _ = call("search", "watercolor", "--json")
    assert (code, json.loads(out)) == (0, [])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors at all")
    assert call("inspect", broken)[0] == 1
    assert call("add", broken)[0] == 1
    pickled = tmp_path / "old.bin"
    torch.save({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}, pickled)
    assert call("inspect", pickled)[0] == 4
    assert call("add", pickled)[0] == 4
    assert call("inspect", pickled, "--allow-pickle")[0] == 0
    assert call("check", shelf / "letters")[0] == 0
    assert call("check", shelf / "letters", "--for", "diffusers")[0] == 3


def test_a_failure_is_one_line_on_stderr(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lorahub")
    found = subprocess.run(
        [script, "inspect", tmp_path / "none.safetensors"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1
    assert "none.safetensors" in found.stderr


def test_weights_are_read_the_way_users_write_them(tmp_path: Path) -> None:
    assert weighted("style:0.7") == ("style", 0.7)
    assert weighted("style@-1e-1") == ("style", -0.1)
    assert weighted("<lora:style:0.5>") == ("style", 0.5)
    assert weighted("<lora:style>") == ("style", None)
    assert weighted("a:b") == ("a:b", None)
    folder = tmp_path / "x:2"
    folder.mkdir()
    assert weighted(str(folder)) == (str(folder), None)
    with pytest.raises(BadOption):
        weighted("style:nan")
    assert weights_of(["a:2", "b"], []) == (["a", "b"], [2.0, 1.0])
    assert weights_of(["a", "b"], [0.5]) == (["a", "b"], [0.5, 0.5])
    assert weights_of(["a", "b"], [0.5, 2.0]) == (["a", "b"], [0.5, 2.0])
    with pytest.raises(BadOption):
        weights_of(["a:2", "b"], [1.0, 1.0])
    with pytest.raises(BadOption):
        weights_of(["a", "b", "c"], [1.0, 1.0])


def test_every_method_can_be_called_with_its_seed_and_weights_recorded(call, shelf: Path, tmp_path: Path) -> None:
    inputs = (shelf / "letters", shelf / "mails")
    for method in methods():
        arguments = ["--method", method, "-w", "0.5", "--where", f"{NAMES[0]}=1,0", "--rank", "2", "--json"]
        code, out, said = call("merge", *inputs, "--out", tmp_path / method, *arguments)
        assert code == 0, said
        made = json.loads(out)
        assert made["options"]["where"] == [f"{NAMES[0]}=1,0"]
        assert {name: made["options"][name] for name in options(method) if name != "rank"} == {
            name: option.default for name, option in options(method).items() if name != "rank"
        }
        assert made["per_module"][NAMES[0]]["rank"] <= 2
        got, wanted = read(tmp_path / method).modules[NAMES[0]], read(inputs[0]).modules[NAMES[0]].truncate(2)
        torch.testing.assert_close(got.dense(), wanted.dense(), rtol=1e-3, atol=1e-3)


def test_weights_ask_for_a_sum_and_no_weights_for_one_that_can_all(call, shelf: Path, tmp_path: Path) -> None:
    both, out = (shelf / "letters", shelf / "mails"), ("--out", tmp_path / "m", "--force", "--json")

    def method(*arguments: object) -> str:
        code, said, error = call("merge", *arguments, *out)
        assert code == 0, error
        return str(json.loads(said)["method"])

    assert method(*both) == method(*both, "--rank", "2") == "core"
    assert method(both[0]) == "exact"
    assert method(f"{both[0]}:1", both[1]) == method(*both, "-w", "1") == method(*both, "--where", "*=1,1") == "exact"
    assert method(*both, "-w", "1", "--method", "ties") == "ties"


def test_weights_can_be_searched_on_a_command(call, shelf: Path, tmp_path: Path) -> None:
    call("add", shelf)
    script = tmp_path / "score.py"
    script.write_text(  # best where the first adapter alone is left
        "import sys\n"
        "from safetensors.numpy import load_file\n"
        f"paths = sys.argv[1], {str(shelf / 'letters')!r}\n"
        f"stem = 'base_model.model.{NAMES[0]}'\n"
        "tables = [load_file(f'{path}/adapter_model.safetensors') for path in paths]\n"
        "a, b = (t[f'{stem}.lora_B.weight'] @ t[f'{stem}.lora_A.weight'] for t in tables)\n"
        "print('distance', abs(a - b).sum())\n"
        "print(-abs(a - b).sum())\n"
    )
    command = f"{sys.executable} {script} {{}}"
    arguments = ["letters", "mails", "--optimize", command, "--evaluations", "12", "--seed", "3", "--json"]
    code, out, said = call("merge", *arguments, "--out", tmp_path / "m")
    assert code == 0, said
    made = json.loads(out)
    search = made["options"]["search"]
    assert search["score"] >= max(trial["score"] for trial in search["trace"][:2])
    assert search["score"] > search["start_score"]
    assert [one["weight"] for one in made["inputs"]] == search["weights"]
    assert f"{search['score']:.6g}" in (tmp_path / "m" / "README.md").read_text()
    assert "trace" not in (tmp_path / "m" / "README.md").read_text()
    code, _, said = call("merge", "letters", "mails", "--optimize", "true {}", "--out", tmp_path / "n")
    assert (code, len(said.strip().splitlines())) == (1, 1)
    assert not (tmp_path / "n").exists()


def test_convert_keeps_the_delta_and_tag_and_remove_leave_files_alone(call, shelf: Path, tmp_path: Path) -> None:
    call("add", shelf)
    assert call("convert", "letters", "--out", tmp_path / "c", "--dtype", "float16")[0] == 0
    got, wanted = read(tmp_path / "c").modules[NAMES[0]], read(shelf / "letters").modules[NAMES[0]]
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.dense(), wanted.dense(), rtol=2e-3, atol=1e-2)
    assert json.loads(call("tag", "letters", "work", "--json")[1])["tags"].count("work") == 1
    assert "work" not in json.loads(call("tag", "letters", "--drop", "work", "--json")[1])["tags"]
    assert call("remove", "letters")[0] == 0
    assert (shelf / "letters" / "adapter_model.safetensors").is_file()
    assert call("verify")[0] == 0
    assert call("similar", "mails", "--json")[0] == 0


def test_a_replaced_result_leaves_one_entry_and_a_changed_file_is_read_anew(call, shelf: Path, tmp_path: Path) -> None:
    call("add", shelf)
    assert call("merge", "letters", "mails", "--out", tmp_path / "m")[0] == 0
    assert call("merge", "letters", "mails:-1", "--out", tmp_path / "m", "--force")[0] == 0
    assert sorted(row["name"] for row in json.loads(call("list", "--json")[1])) == [
        "letters",
        "m",
        "mails",
        "watercolor",
    ]
    shown = json.loads(call("show", "m", "--json")[1])
    assert [link["weight"] for link in shown["lineage"]] == [1.0, -1.0]
    assert call("verify")[0] == 0

    save(small(7), shelf / "letters", force=True)
    assert call("merge", shelf / "letters", "--out", tmp_path / "again")[0] == 0
    got = read(tmp_path / "again").modules[NAMES[0]].dense()
    torch.testing.assert_close(got, small(7).modules[NAMES[0]].dense())


def test_a_taken_name_is_refused_before_anything_is_written(call, shelf: Path, tmp_path: Path) -> None:
    call("add", shelf)
    for command in (["merge", "letters"], ["generate", "sort support mails by product"]):
        code, _, said = call(*command, "--out", tmp_path / "m", "--name", "mails")
        assert (code, "mails" in said) == (1, True)
        assert not (tmp_path / "m").exists()
