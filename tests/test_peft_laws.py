"""Merging what PEFT wrote: rsLoRA, patterns, missing modules, convolutions, embeddings, Conv1D, with PEFT as judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import LoraHubError
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.run import merge
from making import ROUNDOFF, Deltas, Place, assert_equal, carried_out, delta, deltas, low_rank
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about themselves

PLACES = ["words", "query", "key", "fused", "pointwise", "wide", "line"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        # in the order that PEFT writes, which is sorted; the first that matches counts
        "rank_pattern": {r"blocks\.1\..*": 6, "query": 2},
        "alpha_pattern": {r"blocks\.0\.key": 10, r"blocks\.1\.\w*e": 5, "wide": 3},
    },
    "rslora and patterns": {
        "r": 3,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {r"^blocks\.0\.fused": 5, "key": 1},
        "alpha_pattern": {"words": 2, "line": 9},
    },
    "some modules": {"r": 5, "lora_alpha": 2, "target_modules": ["query", "wide", "blocks.1.fused"]},
}


class Block(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.query, self.key = nn.Linear(10, 12), nn.Linear(10, 7, bias=False)
        make: Any = Conv1D
        self.fused = make(9, 10)  # 9 outputs, 10 inputs, stored transposed
        self.pointwise, self.wide = nn.Conv2d(6, 8, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.line = nn.Conv1d(3, 6, 5)

    def forward(self, value: Tensor) -> Tensor:
        return value


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.name_or_path = "tiny"  # PEFT writes it as the base model's name
        self.words = nn.Embedding(11, 10)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, value: Tensor) -> Tensor:
        return value


def trained(seed: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A PEFT model whose adapter is random, as after training."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"target_modules": PLACES, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    return model


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(str(path), save_embedding_layers=False)
    return path


@torch.no_grad()
def judged(path: Path) -> Deltas:
    """What PEFT makes of a directory: its deltas in float64, as matrices from input to output.

    The model is loaded anew: PEFT sorts the patterns when it writes them, so a written one may scale differently.
    """
    model = peft.PeftModel.from_pretrained(Model(), str(path))
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "get_delta_weight") or not hasattr(layer, "scaling"):
            continue
        for parameter in layer.parameters():
            parameter.data = parameter.data.double()
        change = layer.get_delta_weight("default")
        transposed = getattr(layer, "fan_in_fan_out", False) or len(layer.lora_embedding_A) > 0
        found[name] = (change.T if transposed else change).flatten(1)
    return found


def bounds(some: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    return {name: 32 * ROUNDOFF[dtype] * (1.0 + float(matrix.norm())) for name, matrix in some.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_peft_wrote_is_read_exactly(config: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = saved(trained(1, dtype, **CONFIGS[config]), tmp_path / "one")
    adapter = read(path)
    assert adapter.base == "tiny"
    assert {module.dtype for module in adapter.modules.values()} == {dtype}
    wanted = judged(path)
    got = deltas(adapter)
    assert set(got) == set(wanted)
    for name, matrix in wanted.items():
        assert float((got[name] - matrix).norm()) <= 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("first", CONFIGS)
@pytest.mark.parametrize("second", CONFIGS)
def test_merges_of_what_peft_wrote_are_exact(first: str, second: str, tmp_path: Path) -> None:
    models = [trained(1, **CONFIGS[first]), trained(2, torch.float16, **CONFIGS[second])]
    paths = [saved(model, tmp_path / str(index)) for index, model in enumerate(models)]
    weights = [0.7, -1.4]
    wanted: Deltas = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, matrix in judged(path).items():
            wanted[name] = wanted.get(name, torch.zeros_like(matrix)) + weight * matrix
    result = carried_out(merge([read(path) for path in paths], weights=weights))
    assert result.report.total.error < 1e-6
    assert_equal(deltas(result.adapter), wanted, bounds(wanted))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("given", [{}, {"rank": 6}, {"energy": 0.8}], ids=str)
def test_merges_go_back_to_peft(config: str, given: dict[str, Any], tmp_path: Path) -> None:
    """A written merge has scale 1 everywhere and is, inside PEFT, the delta that was written."""
    models = [trained(3, **CONFIGS[config]), trained(4, **CONFIGS["rslora and patterns"])]
    inputs = [read(saved(model, tmp_path / str(index))) for index, model in enumerate(models)]
    result = merge(inputs, weights=[1.5, -0.5], given=given)
    path = save(result.adapter, tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(Model(), str(path))  # also shows that PEFT accepts the directory
    scalings = [layer.scaling["default"] for layer in loaded.modules() if hasattr(layer, "scaling")]
    assert scalings == [1.0] * len(scalings)
    wanted = deltas(result.adapter)
    assert_equal(judged(path), wanted, bounds(wanted))
    assert_equal(deltas(read(path)), wanted, dict.fromkeys(wanted, 0.0))


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    """PEFT's factors of one do not multiply: its down side is dense, its up side is in groups."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(8, 12, 3, groups=4)

    config = peft.LoraConfig(r=8, target_modules=["wide"], init_lora_weights=False)
    with pytest.raises(LoraHubError, match="wide"):
        read(saved(peft.get_peft_model(Grouped(), config), tmp_path / "grouped"))


def test_a_module_whose_name_ends_another_keeps_its_rank(tmp_path: Path) -> None:
    """PEFT matches the end of a path: `proj` must not stand for `deep.proj` too, neither as target nor as pattern."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 7)
            self.deep = nn.ModuleDict({name: nn.ModuleDict({"proj": nn.Linear(6, 7)}) for name in "ab"})

    chosen = {"proj": 2, "deep.a.proj": 4, "deep.b.proj": 4}
    written = Adapter({name: low_rank(Place(7, 6), rank, seed=rank) for name, rank in chosen.items()}, "tiny")
    path = save(written, tmp_path / "nested")
    loaded = peft.PeftModel.from_pretrained(Nested(), str(path))
    for name, module in written.modules.items():
        change = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(change, module.dense(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 on disk: fused attention in Conv1D, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=40, n_positions=16)).save_pretrained(path)
    return path


def test_merged_language_models_answer_as_their_deltas_say(gpt2: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    inputs = []
    for seed, places, rank in ((1, ["c_attn", "c_fc"], 4), (2, ["c_attn", "c_proj", "wte"], 3)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=rank, lora_alpha=5, use_rslora=seed == 2, fan_in_fan_out=True, target_modules=places,
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2), config)
        inputs.append(read(saved(model, tmp_path / str(seed))))
    weights = [0.6, 0.3]
    path = save(merge(inputs, weights=weights).adapter, tmp_path / "merged")
    ours: Any = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(gpt2), str(path))
    ours.eval()
    oracle: Any = GPT2LMHeadModel.from_pretrained(gpt2, tie_word_embeddings=False)
    oracle.eval()
    with torch.no_grad():
        oracle.lm_head.weight = nn.Parameter(oracle.transformer.wte.weight.clone())  # PEFT adapts the input side only
        for one, weight in zip(inputs, weights, strict=True):
            for name, module in one.modules.items():  # Conv1D and Embedding both store (inputs, outputs)
                oracle.get_submodule(name).weight += (weight * delta(module)).T.float()
        tokens = torch.arange(12).reshape(2, 6)
        torch.testing.assert_close(ours(tokens).logits, oracle(tokens).logits, rtol=1e-5, atol=1e-5)
