"""`check`: which modules of an adapter have their place in a base, and what a serving target would refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.coverage import Coverage, base_weights, coverage
from lorahub.hub.errors import BadOption, FormatError
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import ready, save
from safetensors.torch import save_file
from torch import Tensor, nn

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 2, "n_head": 2,
    "vocab_size": 11, "n_positions": 5,
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 11,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 11,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "norm_num_groups": 2,
    "block_out_channels": [4, 8], "cross_attention_dim": 12, "attention_head_dim": 2, "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
CLIP = {
    "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 9,
}  # fmt: skip


def adapter(extras: dict[str, Tensor] | None = None, **places: tuple[int, ...]) -> Adapter:
    """Random deltas of rank 2; names with `__` for dots, (outputs, inputs[, rank, *kernel])"""
    modules = {}
    for name, (outputs, inputs, *rest) in places.items():
        rank, kernel = (rest[0] if rest else 2), tuple(rest[1:])
        down, up = torch.randn(rank, inputs), torch.randn(outputs, rank)
        embedding = name.rpartition("__")[2] in {"wte", "word_embeddings"}
        modules[name.replace("__", ".")] = LowRank(down, up, 1.0, kernel, embedding)
    return Adapter(modules, None, extras or {}, {"name": "made"})


def base(folder: Path, config: Any, name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_gpt2_by_its_configuration(tmp_path: Path) -> None:
    weights = base_weights(base(tmp_path, GPT2))
    assert weights["transformer.h.1.attn.c_attn"] == (8, 24)
    assert "lm_head" in weights
    made = adapter(
        transformer__h__0__attn__c_attn=(24, 8),
        transformer__h__1__mlp__c_proj=(8, 32),
        h__1__mlp__c_fc=(32, 8),
        transformer__wte=(8, 11),
        lm_head=(11, 8),
    )
    found = coverage(made, weights)
    assert found.complete
    assert len(found.matched) == 5


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    weights = base_weights(base(tmp_path, GPT2))
    made = adapter(
        transformer__h__0__attn__c_attn=(24, 9),
        transformer__h__0__attn__c_proj=(8, 8),
        transformer__h__1__mlp__c_fc=(8, 32),
        transformer__h__2__attn__c_attn=(24, 8),
        lm_head=(8, 11),
    )
    found = coverage(made, weights)
    assert found.matched == ("transformer.h.0.attn.c_proj",)
    assert found.unmatched == ("transformer.h.2.attn.c_attn",)
    assert [line.partition(":")[0] for line in found.misfit] == [
        "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "lm_head",
    ]  # fmt: skip
    assert found.misfit[0] == "transformer.h.0.attn.c_attn: adapter 24x9, base 8x24"
    assert not found.complete


def test_bert_with_and_without_a_task_head(tmp_path: Path) -> None:
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value"]
    bare = adapter(**{name.replace(".", "__"): (8, 8) for name in names})
    wrapped = adapter(**{f"bert.{name}".replace(".", "__"): (8, 8) for name in names})
    task = {**BERT, "architectures": ["BertForSequenceClassification"]}
    for config in (BERT, task):
        weights = base_weights(base(tmp_path, config))
        for made in (bare, wrapped):
            assert coverage(made, weights).complete
    embedded = adapter(embeddings__word_embeddings=(8, 11))
    assert coverage(embedded, base_weights(tmp_path)).complete


def test_grouped_heads_have_their_own_width(tmp_path: Path) -> None:
    weights = base_weights(base(tmp_path, LLAMA))
    good = adapter(model__layers__0__self_attn__q_proj=(8, 8), model__layers__0__self_attn__k_proj=(2, 8))
    assert coverage(good, weights).complete
    assert coverage(adapter(model__layers__0__self_attn__k_proj=(8, 8)), weights).misfit


def test_a_fused_projection_takes_its_rows_and_nothing_else() -> None:
    weights = {"image_encoder.blocks.0.attn.qkv": (24, 8), "image_encoder.blocks.0.attn.proj": (24, 8)}
    assert coverage(adapter(image_encoder__blocks__0__attn__qkv__q=(8, 8)), weights).complete
    assert coverage(adapter(image_encoder__blocks__0__attn__qkv__v=(24, 8)), weights).misfit
    assert coverage(adapter(image_encoder__blocks__0__attn__proj=(8, 8)), weights).misfit


def test_a_safetensors_base(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.q_proj.weight": torch.zeros(8, 6), "model.layers.0.q_proj.bias": torch.zeros(8),
        "conv.weight": torch.zeros(6, 4, 3, 3), "h.0.attn.c_attn.weight": torch.zeros(8, 24), "x": torch.zeros(()),
        "norm.weight": torch.zeros(8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "base.safetensors")
    weights = base_weights(tmp_path / "base.safetensors")
    assert set(weights) == {"model.layers.0.q_proj", "conv", "h.0.attn.c_attn", "norm"}
    good = adapter(layers__0__q_proj=(8, 6), conv=(6, 36, 2, 3, 3), transformer__h__0__attn__c_attn=(24, 8))
    assert coverage(good, weights).complete
    assert coverage(adapter(norm=(8, 8)), weights).misfit


def test_a_pipeline_folder(tmp_path: Path) -> None:
    base(tmp_path / "unet", UNET)
    base(tmp_path / "text_encoder", CLIP)
    base(tmp_path / "text_encoder_2", CLIP)
    base(
        tmp_path, {"_class_name": "P", "unet": [], "text_encoder": [], "text_encoder_2": [], "x": 1}, "model_index.json"
    )
    weights = base_weights(tmp_path)
    made = adapter(
        unet__down_blocks__0__attentions__0__transformer_blocks__0__attn2__to_k=(4, 12),
        unet__down_blocks__0__resnets__0__conv1=(4, 36, 2, 3, 3),
        unet__mid_block__attentions__0__proj_in=(8, 8, 2, 1, 1),
        text_encoder__text_model__encoder__layers__1__self_attn__q_proj=(12, 12),
        text_encoder_2__text_model__encoder__layers__0__mlp__fc1=(20, 12),
    )
    found = coverage(made, weights, "diffusers")
    assert (found.unmatched, found.misfit, found.problems) == ((), (), ())
    assert found.complete
    assert coverage(made, base_weights(base(tmp_path / "unet", UNET))).unmatched


def test_modules_that_do_nothing_or_harm() -> None:
    made = adapter(a=(4, 4), b=(4, 4), c=(4, 4), d=(4, 4), e=(4, 4))
    modules = dict(made.modules)
    modules["b"] = LowRank(modules["b"].down, torch.zeros(4, 2))
    modules["c"] = LowRank(modules["c"].down * float("nan"), modules["c"].up)
    modules["d"] = LowRank(modules["d"].down, modules["d"].up / 0)
    modules["e"] = LowRank(modules["e"].down, modules["e"].up, 0.0)
    found = coverage(Adapter(modules))
    assert found == Coverage(tuple("abcde"), (), (), ("b", "e"), ("c", "d"), ())
    assert not found.complete
    assert coverage(Adapter({name: modules[name] for name in "abe"})).complete


@pytest.mark.parametrize(
    ("target", "made", "words"),
    [
        ("vllm", adapter(model__layers__0__q=(8, 8, 8), model__layers__1__q=(8, 8, 8)), []),
        ("vllm", adapter(model__layers__0__q=(8, 8, 8), model__layers__1__q=(8, 8, 4)), ["ranks 4 to 8"]),
        ("vllm", adapter(q=(600, 600, 513)), ["above vLLM's largest, 512"]),
        ("vllm", adapter({"score.weight": torch.ones(1)}, q=(8, 8)), ["saved modules"]),
        ("vllm", adapter(q=(8, 36, 2, 3, 3)), ["convolutions"]),
        ("vllm", adapter({"x": torch.ones(1)}, a=(8, 9, 1, 3), b=(8, 8, 2)), ["ranks", "saved", "convolutions"]),
        ("peft", adapter(model__q=(8, 8)), []),
        ("peft", adapter(unet__q=(8, 8), text_encoder__q=(8, 8)), ["holds one model"]),
        ("diffusers", adapter(unet__q=(8, 8), text_encoder_2__q=(8, 8), transformer__q=(8, 8)), []),
        ("diffusers", adapter(model__layers__0__q=(8, 8)), ["outside a pipeline"]),
    ],
)  # fmt: skip
def test_what_a_target_would_refuse(target: str, made: Adapter, words: list[str]) -> None:
    found = coverage(made, target=target)
    assert len(found.problems) == len(words)
    for problem, word in zip(found.problems, words, strict=True):
        assert word in problem
    assert found.complete is not bool(words)
    with pytest.raises(BadOption, match="expected one of peft, diffusers, vllm"):
        coverage(made, target="ollama")


@pytest.mark.parametrize(
    "config",
    [
        "", "{", "[]", "7", "{}", {"model_type": "nothing"}, {"model_type": 7}, {"model_type": None},
        {**GPT2, "n_embd": "x"}, {**GPT2, "n_embd": -1}, {**BERT, "num_attention_heads": 0}, {**BERT, "hidden_size": 7},
        {**BERT, "hidden_size": 10**30}, {"_class_name": "Nothing"}, {"_class_name": "DDIMScheduler"},
        {"_class_name": 7}, {**UNET, "block_out_channels": 7}, {**UNET, "cross_attention_dim": "x"}, "[" * 100_000,
    ],
)  # fmt: skip
def test_a_base_that_makes_no_sense_is_refused_in_one_line(config: Any, tmp_path: Path) -> None:
    path = base(tmp_path, config)
    with pytest.raises(FormatError) as caught:
        base_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("names", [[], ["Trainer"], ["pipeline"], ["__doc__"], ["NoSuchModel"], None])
def test_only_models_are_built(names: Any, tmp_path: Path) -> None:
    """An architecture that is no model is passed over for the type's bare model; nothing else is called."""
    weights = base_weights(base(tmp_path, {**BERT, "architectures": names}))
    assert "encoder.layer.0.attention.self.query" in weights


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):
        with pytest.raises(FormatError, match=str(path)):
            base_weights(path)


def test_only_names_and_shapes_are_built(tmp_path: Path) -> None:
    """A base of seven thousand million parameters costs no memory."""
    big = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    big |= {"num_attention_heads": 32, "num_key_value_heads": 32}
    weights = base_weights(base(tmp_path, big))
    assert weights["model.layers.31.mlp.down_proj"] == (4096, 11008)


def test_the_command(tmp_path: Path) -> None:
    out = save(ready(adapter(transformer__h__0__attn__c_attn=(24, 8), transformer__h__7__attn__c_attn=(24, 8))),
               tmp_path / "out")  # fmt: skip
    config = base(tmp_path / "base", GPT2)

    def check(*words: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).with_name("lorahub")), "check", str(out), *words]
        environment = {**os.environ, "LORAHUB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in run.stderr
        return run.returncode, run.stdout

    code, text = check("--base", str(config), "--for", "vllm", "--json")
    found = json.loads(text)
    assert (code, found["complete"], found["problems"]) == (3, False, [])
    assert found["unmatched"] == ["transformer.h.7.attn.c_attn"]
    code, text = check("--for", "diffusers")
    assert code == 3
    assert "2 of 2 modules apply" in text
    assert "outside a pipeline" in text


def test_linear_layers_of_a_model_are_what_its_parameters_say(tmp_path: Path) -> None:
    """The base's shapes against a real model's layers, for every layer that a LoRA can be put on."""
    from transformers import BertConfig, BertModel

    settings = {key: value for key, value in BERT.items() if key not in {"model_type", "architectures"}}
    model = BertModel(BertConfig(**settings))
    weights = base_weights(base(tmp_path, BERT))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name: weights[name] for name in layers} == {n: (m.out_features, m.in_features) for n, m in layers.items()}
