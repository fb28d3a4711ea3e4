"""PEFT directories that PEFT itself wrote: every layer's delta against PEFT's, and a reason for what is no delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import FormatError, IncompatibleAdapters
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")
Deltas = dict[str, Tensor]


class Model(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 6)}) for _ in range(3))
        self.fused = Conv1D(24, 8)
        self.wide = nn.Conv2d(4, 6, (3, 3))
        self.point = nn.Conv2d(4, 6, 1)
        self.line = nn.Conv1d(4, 6, 5)
        self.head = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x


def wrapped(config: Any) -> Any:
    """The model with an adapter whose every factor is random."""
    model = peft.get_peft_model(Model(), config)
    chance = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=chance) * 0.5
    return model


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q", "v"], **settings})


def deltas(model: Any) -> Deltas:
    """PEFT's own deltas as maps from input to output (an embedding's from the token)."""
    found = {}
    for name, layer in model.named_modules():
        embedded = "default" in getattr(layer, "lora_embedding_A", ())
        kinds = ("lora_A", "hada_w1_a", "lokr_w1", "lokr_w1_a")
        if embedded or any("default" in getattr(layer, kind, ()) for kind in kinds):
            delta = layer.get_delta_weight("default").detach()
            turned = embedded or getattr(layer, "fan_in_fan_out", False)
            found[name.removeprefix("base_model.model.")] = delta.T if turned else delta
    return found


def assert_same(adapter: Adapter, wanted: Deltas) -> None:
    assert set(adapter.modules) == set(wanted)
    for name, right in wanted.items():
        got = adapter.modules[name].dense()
        assert got.reshape(right.shape).shape == right.shape
        assert float((got.reshape(right.shape) - right).norm()) <= 1e-6 * float(right.norm()), name


LORAS = {
    "plain": lora(),
    "rsLoRA": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"layers.0.q": 2, r".*\.2\.v": 3}, alpha_pattern={"layers.2.q": 7, "q": 5}),
    "patterns and rsLoRA": lora(rank_pattern={"v": 2}, alpha_pattern={r"layers\.\d\.v": 9}, use_rslora=True),
    "an anchored pattern": lora(alpha_pattern={"^layers.1.q": 1, "^q": 99}),
    "embedding": lora(target_modules=["words", "q"]),
    "convolutions": lora(target_modules=["wide", "point", "line"]),
    "fan in, fan out": lora(target_modules=["fused"], fan_in_fan_out=True),
    "all": lora(target_modules=["words", "q", "v", "wide", "point", "line", "head"], r=3),
    "no scale": lora(lora_alpha=4),
    "nothing": lora(lora_alpha=0),
}


@pytest.mark.parametrize("kind", LORAS)
def test_lora_agrees_with_peft(kind: str, tmp_path: Path) -> None:
    model = wrapped(LORAS[kind])
    model.save_pretrained(tmp_path)
    adapter = reading.read(tmp_path)
    assert_same(adapter, deltas(model))
    assert (adapter.meta["format"], dict(adapter.extras)) == ("peft", {})
    assert reading.inspect(tmp_path).warnings == ()


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"alpha": 9}, {"module_dropout": 0.1}, {"rank_pattern": {"q": 2}, "alpha_pattern": {"v": 7}},
        {"target_modules": ["wide", "point"], "use_effective_conv2d": True}, {"target_modules": ["wide", "point"]},
    ],
)  # fmt: skip
def test_loha_agrees_with_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped(peft.LoHaConfig(**{"r": 2, "alpha": 5, "target_modules": ["q", "v"], **settings}))
    model.save_pretrained(tmp_path)
    assert_same(reading.read(tmp_path), deltas(model))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"decompose_both": True}, {"decompose_factor": 2}, {"r": 64}, {"r": 64, "alpha": 64},
        {"r": 1, "decompose_both": True}, {"r": 64, "rank_pattern": {"q": 32}, "alpha_pattern": {"v": 7}},
        {"target_modules": ["wide", "point"], "use_effective_conv2d": True, "r": 1}, {"target_modules": ["wide"]},
    ],
)  # fmt: skip
def test_lokr_agrees_with_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    # PEFT applies alpha/r where both factors are dense; LyCORIS does not
    model = wrapped(peft.LoKrConfig(**{"r": 2, "alpha": 5, "target_modules": ["q", "v"], **settings}))
    model.save_pretrained(tmp_path)
    assert_same(reading.read(tmp_path), deltas(model))


def test_extras_are_all_that_is_not_a_factor(tmp_path: Path) -> None:
    model = wrapped(lora(modules_to_save=["head"], lora_bias=True, trainable_token_indices={"words": [1, 3]}))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    adapter = reading.read(tmp_path)
    assert_same(adapter, deltas(model))
    factors = {key for key in stored if key.endswith((".lora_A.weight", ".lora_B.weight"))}
    assert set(adapter.extras) == {key.removeprefix("base_model.model.") for key in set(stored) - factors}
    assert {"head.weight", "head.bias", "layers.0.q.lora_B.bias"} <= set(adapter.extras)
    assert any("trainable_tokens_delta" in name for name in adapter.extras)
    for name, extra in adapter.extras.items():
        assert torch.equal(extra, stored[f"base_model.model.{name}"])


@pytest.mark.parametrize("form", ["no prefix", "a default", "both", "a file alone"])
def test_spellings_of_the_same_adapter(form: str, tmp_path: Path) -> None:
    model = wrapped(lora(target_modules=["words", "q", "wide"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if form in {"no prefix", "both"}:
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    if form in {"a default", "both"}:
        for old, new in ((".weight", ".default.weight"), ("embedding_A", "embedding_A.default")):
            tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        tensors = {key.replace("embedding_B", "embedding_B.default"): tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    if form == "a file alone":
        (tmp_path / "adapter_config.json").unlink()
        assert "nothing stores alpha" in reading.inspect(file).warnings[0]
        assert_same(reading.read(file, alpha=12), deltas(model))
    else:
        assert_same(reading.read(tmp_path), deltas(model))
        assert_same(reading.read(file), deltas(model))


def test_a_pickle_reads_like_safetensors(tmp_path: Path) -> None:
    model = wrapped(lora())
    model.save_pretrained(tmp_path)
    right = reading.fingerprint(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert reading.fingerprint(tmp_path, allow_pickle=True) == right
    assert_same(reading.read(tmp_path, allow_pickle=True), deltas(model))
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "adapter_model.bin")
    assert reading.fingerprint(tmp_path, allow_pickle=True) == right


def test_a_rank_that_the_configuration_denies_is_told(tmp_path: Path) -> None:
    wrapped(lora()).save_pretrained(tmp_path)
    rewrite(tmp_path, r=16)
    found = reading.inspect(tmp_path)
    assert found.warnings == ("the configuration says r=16, the tensors have rank 4",)
    assert found.scales == (3.0,)


def rewrite(folder: Path, **settings: Any) -> None:
    """Change entries of the configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


FOREIGN = {
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "ADALORA": ("AdaLoraConfig", {"total_step": 10}),
    "OFT": ("OFTConfig", {"oft_block_size": 2, "r": 0}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 2}),
    "VERA": ("VeraConfig", {"r": 4}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 5}),
    "HRA": ("HRAConfig", {"r": 2}),
    "MISS": ("MissConfig", {"r": 2}),
    "SHIRA": ("ShiraConfig", {"r": 1}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 2, "topk": 1, "r": 2}),
    "RANDLORA": ("RandLoraConfig", {"r": 2}),
    "C3A": ("C3AConfig", {"block_size": 2}),
    "ROAD": ("RoadConfig", {"group_size": 2}),
    "DELORA": ("DeloraConfig", {"r": 2}),
    "GRALORA": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 5}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_types_are_known_and_kept_apart(kind: str, tmp_path: Path) -> None:
    name, settings = FOREIGN[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    wrapped(getattr(peft, name)(**{"target_modules": ["q"], **settings})).save_pretrained(tmp_path)
    found = reading.inspect(tmp_path)
    assert (found.format, found.mergeable) == (f"peft-{kind.lower()}", False)
    assert found.reason
    assert set(found.extras) or found.modules
    with pytest.raises(IncompatibleAdapters, match=str(tmp_path)):
        reading.read(tmp_path)
    assert len(reading.fingerprint(tmp_path)) == 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {}}, None),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"alora_invocation_tokens": [1]}, "invocation tokens"),
        ({"target_parameters": ["experts.w"]}, "experts"),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "eva"}, None),
        ({"init_lora_weights": False}, None),
        ({"peft_type": "SOMETHING_NEW"}, "SOMETHING_NEW"),
        ({"peft_type": "lora"}, None),
    ],
)
def test_settings_that_change_what_the_tensors_mean(
    settings: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    wrapped(lora()).save_pretrained(tmp_path)
    before = reading.fingerprint(tmp_path)
    rewrite(tmp_path, **settings)
    found = reading.inspect(tmp_path)
    assert found.mergeable is (words is None)
    assert (words or "") in (found.reason or "")
    assert (reading.fingerprint(tmp_path) == before) is (words is None)


def test_dora_that_peft_trained(tmp_path: Path) -> None:
    model = wrapped(lora(use_dora=True))
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = reading.inspect(path)
        assert not found.mergeable
        assert "DoRA" in (found.reason or "")
        assert sum(name.endswith("lora_magnitude_vector") for name in found.extras) == 6
    (tmp_path / "adapter_config.json").unlink()  # its tensors alone give it away
    assert "DoRA" in (reading.inspect(tmp_path / "adapter_model.safetensors").reason or "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": "x"}, "lora_alpha"), ({"lora_alpha": [1]}, "lora_alpha"), ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"), ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "alpha_pattern"), ({"alpha_pattern": "q"}, "alpha_pattern"),
        ({"alpha_pattern": {"q": "x"}}, "lora_alpha"), ({"alpha_pattern": {"(": 1}}, "regular expression"),
        ({"alpha_pattern": {"(.*)*q": 1}}, "for ever"), ({"alpha_pattern": {"(a|a)" * 30: 1}}, "for ever"),
        ({"alpha_pattern": {"a?" * 40: 1}}, "for ever"), ({"alpha_pattern": {"x" * 2000 + "*": 1}}, "for ever"),
        ({"alpha_pattern": {r"(q)\1*": 1}}, "for ever"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    wrapped(lora()).save_pretrained(tmp_path)
    rewrite(tmp_path, **settings)
    with pytest.raises(FormatError, match=words) as caught:
        reading.inspect(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": "x"}, {"r": None}, {"r": -1}, {"r": {}}, {"rank_pattern": [1]}, {"rank_pattern": "x"},
        {"target_modules": 5}, {"base_model_name_or_path": ["a"]}, {"base_model_name_or_path": None},
        {"use_rslora": None}, {"alpha_pattern": None}, {"alpha_pattern": []}, {"modules_to_save": 7},
    ],
)  # fmt: skip
def test_settings_that_do_not_matter_are_not_asked(settings: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped(lora())
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, **settings)
    reading.inspect(tmp_path)
    assert_same(reading.read(tmp_path), deltas(model))
