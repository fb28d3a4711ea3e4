"""`lorahub compress` from end to end, on files, and what PEFT makes of its results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import typed
from lorahub.cli.compress import bytes_of
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption
from lorahub.hub.reading import inspect, read
from lorahub.hub.writing import ready, save
from lorahub.merge import compress as merge_compress
from making import Place, delta, deltas, low_rank
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAMES = [f"encoder.layer.{layer}.attention.self.{part}" for layer in range(4) for part in ("query", "key", "value")]


def sample(seed: int = 0, *, rank: int = 8, called: str = "sample") -> Adapter:
    """Twelve modules of unequal weight, and a head."""
    modules = {
        name: low_rank(Place(24, 32), rank, seed=100 * seed + index, scale=0.5**index)
        for index, name in enumerate(NAMES)
    }
    return Adapter(modules, "tiny", {"classifier.weight": torch.ones(3, 24)}, {"name": called})


def best(matrix: Tensor, rank: int) -> Tensor:
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (u[:, :rank] * values[:rank]) @ vh[:rank]
    return nearest


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in a home of its own; returns (exit code, stdout, stderr or the error)."""
    monkeypatch.setenv("LORAHUB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save(ready(sample()), tmp_path / "sample", card=lambda: "# sample\n\nSorts letters by product.\n")
    return typed


@pytest.mark.parametrize(
    "limit", [("--rank", 3), ("--energy", 0.8), ("--budget-params", 1200), ("--max-size", "12kB")], ids=str
)
def test_every_limit_in_json(call, tmp_path: Path, limit: tuple[str, Any]) -> None:
    code, out, _ = call("compress", "sample", *limit, "--out", "small", "--json")
    assert code == 0
    told = json.loads(out)
    source, result = read(tmp_path / "sample"), read(tmp_path / "small")
    ranks = {name: one["rank"] for name, one in told["per_module"].items()}
    assert set(ranks) == set(NAMES)
    assert {name: rank for name, rank in ranks.items() if rank} == {n: s.rank for n, s in result.shapes.items()}
    assert told["left_out"] == [name for name, rank in ranks.items() if not rank]
    lost = whole = 0.0
    for name, matrix in deltas(source).items():
        wanted = best(matrix, ranks[name])
        if ranks[name]:
            assert float((delta(result.modules[name]) - wanted).norm()) <= 1e-5 * float(matrix.norm())
        lost, whole = lost + float((matrix - wanted).norm()) ** 2, whole + float(matrix.norm()) ** 2
        assert told["per_module"][name]["rank_before"] == 8
    assert told["error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert told["parameters"] == {"before": source.parameters, "after": result.parameters}
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("sample", "small")]
    assert told["bytes"] == dict(zip(("before", "after"), (file.stat().st_size for file in files), strict=True))
    assert torch.equal(result.extras["classifier.weight"], source.extras["classifier.weight"])
    holds = {
        "--rank": max(ranks.values()) == 3,
        "--energy": min(one["energy"] for one in told["per_module"].values()) > 0.8 - 1e-6,
        "--budget-params": 0 <= 1200 - result.parameters < 24 + 32,
        "--max-size": told["bytes"]["after"] <= 12_000,
    }
    assert holds[limit[0]]


def test_the_catalogue_and_the_card_tell_where_it_comes_from(call, tmp_path: Path) -> None:
    call("add", "sample")
    assert call("compress", "sample", "--rank", 2, "--out", "small", "--name", "sample-small")[0] == 0
    shown = json.loads(call("show", "sample-small", "--json")[1])
    [link] = shown["lineage"]
    assert (link["parent_name"], link["operation"], link["weight"]) == ("sample", "compress", 1.0)
    assert link["options"]["options"] == {"rank": 2}
    assert shown["base"] == "tiny"
    card = (tmp_path / "small" / "README.md").read_text()
    assert "sample (Sorts letters by product), made smaller." in card
    assert link["parent_digest"][:16] in card
    assert all(name in card for name in NAMES)
    assert json.loads(call("search", "letters by product", "--json")[1])


def test_the_terminal_shows_the_least_exact_and_what_is_left_out(call) -> None:
    code, out, _ = call("compress", "sample", "--budget-params", 900, "--out", "small")
    told = json.loads(call("compress", "sample", "--budget-params", 900, "--out", "x", "--dry-run", "--json")[1])
    assert code == 0
    assert "and 2 more; --json has all" in out
    assert f"{len(told['left_out'])} modules are left out" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("encoder.")]
    assert len(rows) == 10
    errors = [float(row[-1]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert [row[0] for row in rows if row[2] == "0"] == told["left_out"][:10]
    assert f"{told['parameters']['before']:,} -> {told['parameters']['after']:,}" in out
    assert f"{told['bytes']['before']:,} -> {told['bytes']['after']:,}" in out


def test_a_dry_run_tells_the_same_and_writes_nothing(call, tmp_path: Path) -> None:
    rehearsed = json.loads(call("compress", "sample", "--max-size", "9kB", "--out", "s", "--dry-run", "--json")[1])
    assert not (tmp_path / "s").exists()
    assert not json.loads(call("list", "--json")[1])
    assert json.loads(call("compress", "sample", "--max-size", "9kB", "--out", "s", "--json")[1]) == rehearsed


def test_it_is_said_when_nothing_could_be_saved(call) -> None:
    for limit in (("--rank", 8), ("--max-size", "1GB"), ("--budget-params", 10**9), ("--energy", 1)):
        code, out, _ = call("compress", "sample", *limit, "--out", "same", "--force")
        assert (code, "nothing could be saved" in out) == (0, True), limit
    code, out, _ = call("compress", "sample", "--rank", 7, "--dtype", "float64", "--out", "wider")
    assert (code, "no smaller" in out) == (0, True)


def test_errors_of_sketched_modules_are_stated(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_compress, "SKETCHED_ABOVE", 7)
    code, out, _ = call("compress", "sample", "--rank", 2, "--out", "small", "--json")
    told = json.loads(out)
    assert code == 0
    assert all(one["least_error"] <= one["error"] * (1 + 1e-6) for one in told["per_module"].values())
    assert "12 modules were too wide" in call("compress", "sample", "--rank", 2, "--out", "b")[1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "exactly one"),
        (["--rank", 2, "--energy", 0.5], "exactly one"),
        (["--rank", 2, "--max-size", "1MB"], "exactly one"),
        (["--energy", 0.5, "--budget-params", 100, "--rank", 1], "exactly one"),
        (["--rank", 0], "rank"),
        (["--energy", 1.5], "energy"),
        (["--budget-params", -4], "budget"),
        (["--budget-params", 55], "smallest possible is 56"),
        (["--max-size", "500"], "smallest possible file"),
        (["--max-size", "8 bananas"], "8MB"),
        (["--max-size", "0"], "8MB"),
        (["--rank", 2, "--to", "onnx"], "peft"),
        (["--max-size", "8kB", "--to", "onnx"], "peft"),
        (["--rank", 2, "--to", "kohya"], "kohya"),
        (["--rank", 2, "--dtype", "int8"], "dtype"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_in_one_line(call, tmp_path: Path, arguments: list[object], word: str) -> None:
    code, out, said = call("compress", "sample", *arguments, "--out", "small")
    assert (code, out) == (1, "")
    assert word in said
    assert "\n" not in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["sample"]


def test_nothing_is_overwritten_unasked_nor_half_written(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("compress", "sample", "--rank", 2, "--out", "small")[0] == 0
    file = tmp_path / "small" / "adapter_model.safetensors"
    before = file.read_bytes()
    code, _, said = call("compress", "sample", "--rank", 3, "--out", "small")
    assert (code, "--force" in said) == (1, True)
    assert file.read_bytes() == before
    code, _, said = call("compress", "sample", "--rank", 3, "--out", "other", "--name", "small")
    assert (code, "small" in said) == (1, True)
    assert call("compress", "sample", "--rank", 3, "--out", "small", "--force")[0] == 0
    assert file.read_bytes() != before

    before = file.read_bytes()
    tensors = load_file(tmp_path / "sample" / "adapter_model.safetensors")
    tensors[sorted(tensors)[-2]][0, 0] = math.nan
    save_file(tensors, tmp_path / "sample" / "adapter_model.safetensors")
    for limit in (["--rank", 1], ["--max-size", "9kB"]):
        code, _, said = call("compress", tmp_path / "sample", *limit, "--out", "small", "--force")
        assert (code, "NaN" in said) == (1, True)
        assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "sample", "small"]


def test_an_adapter_can_be_compressed_in_its_own_place(call, tmp_path: Path) -> None:
    size = inspect(tmp_path / "sample").size
    told = json.loads(call("compress", "sample", "--rank", 1, "--out", "sample", "--force", "--json")[1])
    assert told["bytes"] == {"before": size, "after": inspect(tmp_path / "sample").size}
    assert {shape.rank for shape in read(tmp_path / "sample").shapes.values()} == {1}


def test_pickles_and_a_missing_alpha_need_your_word(call, tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(3, 2)}
    torch.save(tensors, tmp_path / "old.bin")
    assert call("compress", "old.bin", "--rank", 1, "--out", "small")[0] == 4
    assert call("compress", "old.bin", "--rank", 1, "--out", "small", "--allow-pickle", "--alpha", 8)[0] == 0
    torch.testing.assert_close(read(tmp_path / "small").modules["q"].dense(), torch.full((3, 5), 8.0))


def test_other_dialects_are_single_files_with_a_card_beside(call, tmp_path: Path) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    modules = {f"{stem}.to_{part}": low_rank(Place(32, 32), 6, seed=ord(part)) for part in "qkv"}
    save(Adapter(modules, None), tmp_path / "style.safetensors", "kohya")
    for to in ("kohya", "diffusers"):
        out = tmp_path / f"{to}.safetensors"
        told = json.loads(
            call("compress", "style.safetensors", "--max-size", "3kB", "--to", to, "--out", out, "--json")[1]
        )
        assert told["bytes"]["after"] == out.stat().st_size <= 3000
        assert out.with_suffix(".md").is_file()
        for name, module in read(out).modules.items():
            wanted = best(delta(modules[name]), told["per_module"][name]["rank"])
            assert float((delta(module) - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize(
    ("text", "size"),
    [("8MB", 8_000_000), ("500kB", 500_000), ("4MiB", 4 * 2**20), ("123", 123), ("1.5 KiB", 1536), ("2g", 2 * 10**9)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "8TBs", "1e6", "0.2", "nan", "9" * 400])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="8MB"):
        bytes_of(text)


def test_a_failure_of_the_program_is_one_line_on_stderr(call, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lorahub")
    command = [script, "compress", "sample", "--budget-params", "3", "--out", "small"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (found.returncode, found.stdout, len(found.stderr.splitlines())) == (1, "", 1)


# --- PEFT as judge ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(10, 12), nn.Linear(10, 7)
        self.pointwise, self.wide = nn.Conv2d(6, 8, 1), nn.Conv2d(4, 5, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 10)
        self.blocks = nn.ModuleList([Block(), Block()])


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about themselves
@pytest.mark.parametrize("limit", [("--energy", 0.7), ("--budget-params", 300), ("--max-size", 4500), ("--rank", 2)])
def test_peft_loads_mixed_ranks_convolutions_and_embeddings(call, tmp_path: Path, limit: tuple[str, object]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["words", "query", "key", "pointwise", "wide"], init_lora_weights=False,
        rank_pattern={r"blocks\.1\..*": 6}, alpha_pattern={"key": 10},
    )  # fmt: skip
    model = peft.get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "trained"), save_embedding_layers=False)
    told = json.loads(call("compress", "trained", *limit, "--out", "small", "--json")[1])

    def changes(folder: str) -> dict[str, Tensor]:
        loaded = peft.PeftModel.from_pretrained(Model(), str(tmp_path / folder))
        return {
            name: layer.get_delta_weight("default").detach().double().flatten(1)
            for name, layer in loaded.base_model.model.named_modules()
            if hasattr(layer, "get_delta_weight") and hasattr(layer, "scaling")
        }

    before, after = changes("trained"), changes("small")
    ranks = {name: one["rank"] for name, one in told["per_module"].items()}
    assert set(before) == set(ranks)
    assert set(after) == {name for name, rank in ranks.items() if rank}
    assert limit[0] == "--rank" or len(set(ranks.values())) > 1
    for name, change in after.items():
        assert float((change - best(before[name], ranks[name])).norm()) <= 1e-5 * float(before[name].norm())
