"""What is written reads back as the same adapter, here and in the tools it was written for; or nothing is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub import reading, writing
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import FormatError, IncompatibleAdapters, LoraHubError, TargetExists, UnknownMethod
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import ready, save
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

LANGUAGE = {
    "model.layers.0.self_attn.q_proj": ((), 8, 8),
    "model.layers.0.self_attn.v_proj": ((), 4, 8),
    "model.layers.11.mlp.down_proj": ((), 8, 16),
    "vision.patch": ((3, 3), 6, 4),
    "vision.point": ((1, 1), 6, 4),
    "vision.line": ((5,), 6, 4),
}
PIPELINE = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ((), 8, 8),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": ((), 8, 8),
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": ((), 16, 8),
    "unet.up_blocks.1.resnets.0.conv1": ((3, 3), 6, 4),
    "unet.up_blocks.1.resnets.0.conv_shortcut": ((1, 1), 6, 4),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": ((), 8, 8),
    "text_encoder_2.text_model.encoder.layers.10.mlp.fc1": ((), 16, 8),
}
FLOW = {
    "transformer.transformer_blocks.0.attn.to_q": ((), 8, 8),
    "transformer.single_transformer_blocks.10.proj_mlp": ((), 16, 8),
    "transformer.context_embedder": ((), 8, 8),
}
FORMATS = {"peft": LANGUAGE, "diffusers": PIPELINE, "kohya": PIPELINE}


def made(
    places: Mapping[str, tuple[tuple[int, ...], int, int]],
    ranks: tuple[int, ...] = (1, 2, 3),
    *,
    scale: Callable[[int], float] = lambda number: 1.0,
    dtype: torch.dtype = torch.float32,
    embedding: bool = False,
) -> Adapter:
    """An adapter whose modules take turns in their ranks, each with its own scale."""
    chance = torch.Generator().manual_seed(0)
    modules = {}
    for number, (name, (kernel, outputs, channels)) in enumerate(places.items()):
        rank, inputs = ranks[number % len(ranks)], channels * math.prod(kernel)
        down = torch.randn(rank, inputs, generator=chance).to(dtype)
        up = torch.randn(outputs, rank, generator=chance).to(dtype)
        modules[name] = LowRank(down, up, scale(number), kernel)
    if embedding:
        down, up = torch.randn(2, 11, generator=chance).to(dtype), torch.randn(8, 2, generator=chance).to(dtype)
        modules["model.embed_tokens"] = LowRank(down, up, scale(9), embedding=True)
    return Adapter(modules, "some/base", {}, {"name": "made"})


def assert_same(got: Adapter, wanted: Adapter, allowed: float = 0.0) -> None:
    assert set(got.modules) == set(wanted.modules)
    for name, module in wanted.modules.items():
        back = got.modules[name]
        assert (back.kernel, back.embedding, back.rank) == (module.kernel, module.embedding, module.rank)
        distance = float((back.dense() - module.dense()).norm())
        assert distance <= allowed * float(module.dense().norm()), name


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scale_one_is_written_as_it_is(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = made(FORMATS[to], dtype=dtype, embedding=to == "peft")
    back = reading.read(save(ready(adapter), tmp_path / "out", to))
    assert_same(back, adapter)
    for name, module in adapter.modules.items():
        assert torch.equal(back.modules[name].down, module.down)
        assert torch.equal(back.modules[name].up, module.up)
        assert back.modules[name].scale == 1.0
        assert back.modules[name].dtype == dtype
    assert back.meta["format"] == to


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("scale", [0.5, 2.0, -1.0, 0.0, 3.7, 1e-4])
def test_scales_are_folded_into_the_factors(to: str, scale: float, tmp_path: Path) -> None:
    adapter = made(FORMATS[to], scale=lambda number: scale * (1 + number), embedding=to == "peft")
    path = save(ready(adapter), tmp_path / "out", to)
    assert_same(reading.read(path), adapter, 1e-6)
    assert reading.inspect(path).scales == (1.0,)
    half = save(ready(adapter, torch.float16), tmp_path / "half", to)
    assert_same(reading.read(half), adapter, 3e-3)


@pytest.mark.parametrize("to", FORMATS)
def test_alpha_is_the_rank_everywhere(to: str, tmp_path: Path) -> None:
    adapter = made(FORMATS[to], scale=lambda number: 2.0)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    path = save(ready(adapter), tmp_path / "out", to)
    if to == "peft":
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
        assert config["use_rslora"] is False
        assert config["target_modules"] == sorted(ranks)
        return
    with safe_open(path, "pt") as file:
        keys, header = set(file.keys()), file.metadata()
    if to == "kohya":
        stored = {key: tensor for key, tensor in load_file(path).items() if key.endswith(".alpha")}
        assert sorted(map(float, stored.values())) == sorted(ranks.values())
        assert header["ss_network_alpha"] == header["ss_network_dim"] == "Dynamic"
        return
    assert not any("alpha" in key for key in keys)
    settings = json.loads(header["lora_adapter_metadata"])
    for component in ("unet", "text_encoder", "text_encoder_2"):
        assert settings[f"{component}.lora_alpha"] == settings[f"{component}.r"]
        assert settings[f"{component}.alpha_pattern"] == settings[f"{component}.rank_pattern"]


@pytest.mark.parametrize("start", ["diffusers", "kohya"])
def test_there_and_back_gives_the_same_bytes(start: str, tmp_path: Path) -> None:
    other = {"diffusers": "kohya", "kohya": "diffusers"}[start]
    first = save(ready(made(PIPELINE)), tmp_path / "first", start)
    second = save(ready(reading.read(first)), tmp_path / "second", other)
    third = save(ready(reading.read(second)), tmp_path / "third", start)
    before, after = load_file(first), load_file(third)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_flow_transformers_go_through_all_formats(tmp_path: Path) -> None:
    adapter = made(FLOW)
    for to in ("diffusers", "kohya", "peft"):
        back = reading.read(save(ready(adapter), tmp_path / to, to))
        assert_same(back, adapter)


def test_diffusers_reads_a_flow_transformers_kohya_file(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    # of the layers that a LoRA for FLUX may hold, diffusers 0.42 knows these by kohya's names for them
    adapter = made({name: shape for name, shape in FLOW.items() if not name.endswith("proj_mlp")})
    state = _convert_kohya_flux_lora_to_diffusers(load_file(save(ready(adapter), tmp_path / "flow", "kohya")))
    for name, module in adapter.modules.items():
        torch.testing.assert_close(state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"], module.dense())
    with_text = {**FLOW, "text_encoder.text_model.encoder.layers.0.mlp.fc1": ((), 16, 8)}
    keys = load_file(save(ready(made(with_text)), tmp_path / "text", "kohya"))
    assert any(key.startswith("lora_te1_") for key in keys)
    assert_same(reading.read(tmp_path / "text" / "lora.safetensors"), made(with_text))


def test_extras_are_carried_through(tmp_path: Path) -> None:
    extras = {"score.weight": torch.randn(2, 8), "model.norm.bias": torch.randn(8).half()}
    adapter = Adapter(made(LANGUAGE).modules, None, extras, {"name": "made"})
    back = reading.read(save(ready(adapter), tmp_path / "out"))
    assert set(back.extras) == set(extras)
    assert all(torch.equal(back.extras[key], extras[key]) for key in extras)
    assert back.extras["model.norm.bias"].dtype == torch.float16


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    for adapter, to in (
        (made(LANGUAGE), "diffusers"),
        (made(LANGUAGE), "kohya"),
        (made(PIPELINE), "peft"),
        (Adapter({}, None), "peft"),
    ):
        with pytest.raises(IncompatibleAdapters):
            save(ready(adapter), tmp_path / "out", to)
    with pytest.raises(UnknownMethod, match="expected one of diffusers, kohya, peft"):
        save(ready(made(LANGUAGE)), tmp_path / "out", "mlx")
    assert list(tmp_path.iterdir()) == []


# --- the tools that the files are for -----------------------------------------------------------------------------


class Small(nn.Module):
    """A model that PEFT can load an adapter into: token, attention-like, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.image = nn.Conv2d(1, 4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.tanh(self.q(x)) * self.v(x)
        x = self.conv(x.transpose(1, 2))
        return self.image(x[:, None])


def dense_patched(model: nn.Module, adapter: Adapter, prefix: str = "") -> nn.Module:
    """A copy of the model with every delta added to its weight."""
    patched = deepcopy(model)
    for name, module in adapter.modules.items():
        layer = patched.get_submodule(name.removeprefix(prefix))
        delta = module.dense().T if module.embedding else module.dense()
        layer.weight.data += delta.reshape(layer.weight.shape)
    return patched


def test_peft_loads_what_is_written(tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    model = Small().eval()
    places = {"q": ((), 8, 8), "v": ((), 8, 8), "conv": ((3,), 8, 8), "image": ((3, 3), 4, 1)}
    adapter = made(places, scale=lambda number: 0.2 * (number - 1.5))
    down, up = torch.randn(2, 11), torch.randn(8, 2)
    embedding = {"embed": LowRank(down, up, 0.3, embedding=True)}
    adapter = Adapter({**adapter.modules, **embedding}, "base", {}, {"name": "made"})
    folder = save(ready(adapter), tmp_path / "out")
    loaded = PeftModel.from_pretrained(deepcopy(model), folder).eval()
    assert loaded.peft_config["default"].r in {1, 2, 3}
    tokens = torch.arange(10)[None]
    right = dense_patched(model, adapter)(tokens)
    torch.testing.assert_close(loaded(tokens), right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(tokens), right, atol=1e-2)
    injected = [name for name, layer in loaded.named_modules() if "default" in getattr(layer, "lora_A", ())]
    assert len(injected) == len(places)


def small_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=8, norm_num_groups=2, attention_head_dim=2,
        block_out_channels=(4, 8), cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def small_clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=9, bos_token_id=0, eos_token_id=1, **sizes)).eval()


def for_models(models: Mapping[str, nn.Module], leaves: tuple[str, ...], ranks: tuple[int, ...]) -> Adapter:
    """Random deltas for all layers that end so, under their canonical names."""
    places = {}
    for component, model in models.items():
        for name, layer in model.named_modules():
            if name.endswith(leaves) and isinstance(layer, nn.Linear | nn.Conv2d):
                text = component.startswith("text") and not name.startswith("text_model.")
                shape = layer.weight.shape
                places[f"{component}.{'text_model.' if text else ''}{name}"] = (tuple(shape[2:]), shape[0], shape[1])
    return made(places, ranks, scale=lambda number: 0.1 * (1 + number % 4))


# diffusers knows a text encoder's attention in a kohya file by the last one
LEAVES = ("to_q", "to_out.0", "net.2", "conv1", "q_proj", "fc1", "out_proj")


# from a kohya file of mixed ranks diffusers 0.42 gives attention layers the most frequent alpha, not their own
@pytest.mark.parametrize(("to", "ranks"), [("diffusers", (1, 2, 3)), ("diffusers", (2,)), ("kohya", (2,))])
def test_a_pipeline_loads_what_is_written(to: str, ranks: tuple[int, ...], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, text = small_unet(), small_clip()
    adapter = for_models({"unet": unet, "text_encoder": text}, LEAVES, ranks)
    assert len(adapter.modules) > 20
    file = save(ready(adapter), tmp_path / "out", to)
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=deepcopy(text), tokenizer=None, unet=deepcopy(unet), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    tokens = torch.arange(8)[None] % 9
    chance = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 8, 8, generator=chance)

    def outputs(one: nn.Module, other: nn.Module) -> tuple[Tensor, Tensor]:
        states = other(tokens).last_hidden_state
        return states, one(noise, 3, states).sample

    def part(component: str) -> Adapter:
        return Adapter({name: m for name, m in adapter.modules.items() if name.startswith(component)})

    deep = any(name.startswith("text_model.") for name, _ in text.named_modules())
    right_unet = dense_patched(unet, part("unet."), "unet.")
    right_text = dense_patched(text, part("text_encoder."), "text_encoder." + ("" if deep else "text_model."))
    with torch.no_grad():
        got, wanted = outputs(pipeline.unet, pipeline.text_encoder), outputs(right_unet, right_text)
        plain = outputs(unet, text)
    for mine, right, bare in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(bare, right, atol=1e-3)


# --- nothing half-written -----------------------------------------------------------------------------------------


def test_an_existing_target_is_kept_unless_forced(tmp_path: Path) -> None:
    first, second = made(LANGUAGE), made(LANGUAGE, scale=lambda number: 2.0)
    out = save(ready(first), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "note.txt").write_text("mine")
    with pytest.raises(TargetExists, match="--force"):
        save(ready(second), out)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.name in before} == before
    assert_same(reading.read(save(ready(second), out, force=True)), second, 1e-6)
    file = tmp_path / "one.safetensors"
    save(ready(made(PIPELINE)), file, "kohya")
    with pytest.raises(TargetExists):
        save(ready(made(PIPELINE)), file, "diffusers")
    assert reading.read(save(ready(made(PIPELINE)), file, "diffusers", force=True)).meta["format"] == "diffusers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "out"]


class Broken(Exception):
    """Something that has nothing to do with files."""


@pytest.fixture(params=["disk full", "overflow", "interrupt", "bug", "rename"])
def trouble(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Adapter, type]]:
    """An adapter whose writing fails after some modules, and the error to expect."""
    adapter = made(LANGUAGE)
    kinds: dict[str, type[BaseException]] = {"interrupt": KeyboardInterrupt, "bug": Broken}
    if request.param == "overflow":
        last = list(adapter.modules)[-1]
        huge = LowRank(adapter.modules[last].down * 1e6, adapter.modules[last].up, 1.0, adapter.modules[last].kernel)
        yield Adapter({**adapter.modules, last: huge}, None, {}, {"name": "made"}), FormatError
        return
    if request.param == "rename":
        replace = Path.replace

        def refuse(path: Path, target: Path) -> Path:
            if "adapter_model" in str(path) or path.name == "out":
                raise OSError(18, "Invalid cross-device link")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", refuse)
        yield adapter, FormatError
        return
    calls = 0
    made_bytes = writing.tensor_bytes

    def fail(tensor: Tensor) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise kinds[request.param]() if request.param in kinds else OSError(28, "No space left on device")
        return made_bytes(tensor)

    monkeypatch.setattr(writing, "tensor_bytes", fail)
    yield adapter, kinds.get(request.param, FormatError)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_midway_leaves_nothing_behind(trouble: tuple[Adapter, type], existing: bool, tmp_path: Path) -> None:
    adapter, error = trouble
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "note.txt").write_text("mine")
    with pytest.raises(error) as caught:
        save(ready(adapter, torch.float16), out, force=existing)
    if isinstance(caught.value, LoraHubError):
        assert "\n" not in str(caught.value)
    left = sorted(os.fspath(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["out", "out/note.txt"] if existing else [])


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="cannot be created"):
        save(ready(made(LANGUAGE)), tmp_path / "file" / "out")
