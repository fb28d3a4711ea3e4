"""Image adapters in the dialects of their trainers, made here, against diffusers' own conversions or dense formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.adapter import Adapter
from safetensors.torch import save_file
from torch import Tensor, nn

Deltas = dict[str, Tensor]


class Chance:
    """Tensors that differ from each other, the same in every run."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


@pytest.fixture
def chance() -> Chance:
    return Chance()


def saved(folder: Path, tensors: Mapping[str, Tensor], name: str = "made.safetensors", **metadata: str) -> Path:
    """The tensors as a file."""
    path = folder / name
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def pair(stem: str, up: Tensor, down: Tensor, style: str = "kohya", alpha: float | None = None) -> dict[str, Tensor]:
    """A module's tensors under the names of a dialect."""
    names = {
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "peft": ("lora_A.weight", "lora_B.weight"),
        "old": ("lora.down.weight", "lora.up.weight"),
        "linear": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    }[style]
    found = {f"{stem}.{names[0]}": down, f"{stem}.{names[1]}": up}
    return found if alpha is None else {**found, f"{stem}.alpha": torch.tensor(alpha)}


def assert_same(adapter: Adapter, wanted: Mapping[str, Tensor]) -> None:
    """The same modules with the same deltas, to float32 rounding."""
    assert set(adapter.modules) == set(wanted)
    for name, right in wanted.items():
        got = adapter.modules[name].dense()
        assert got.shape == right.shape, f"{name}: {tuple(got.shape)}, wanted {tuple(right.shape)}"
        assert float((got - right).norm()) <= 1e-6 * float(right.norm()), name


# --- Stable Diffusion ---------------------------------------------------------------------------------------------

SD1 = {
    "in_channels": 4, "out_channels": 4, "sample_size": 8, "norm_num_groups": 2, "attention_head_dim": 2,
    "block_out_channels": (4, 8, 8, 8), "cross_attention_dim": 12,
}  # fmt: skip
SDXL = {
    **SD1, "block_out_channels": (4, 8, 16), "transformer_layers_per_block": (1, 2, 2), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36,
}  # fmt: skip


def unet(config: Mapping[str, Any]) -> nn.Module:
    """A UNet with all the modules of the real one, at a few channels each."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def clip() -> nn.Module:
    """A text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=9, bos_token_id=0, eos_token_id=1, **sizes))


def paths(model: nn.Module) -> dict[str, Tensor]:
    """Path -> weight of every linear and convolutional layer, as older and newer transformers agree to call it."""
    found = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    text = any("self_attn" in name for name in found)
    return {f"text_model.{n}" if text and not n.startswith("text_model.") else n: w for n, w in found.items()}


def trained(
    chance: Chance, layers: Mapping[str, Tensor], stem: Callable[[str], str], alphas: list[float | None]
) -> tuple[dict[str, Tensor], Deltas]:
    """kohya tensors for layers, ranks 1 to 3, and their deltas by up @ down * alpha / rank."""
    tensors, deltas = {}, {}
    for number, (name, weight) in enumerate(layers.items()):
        rank, alpha = 1 + number % 3, alphas[number % len(alphas)]
        kernel = weight.shape[2:]
        down, up = chance(rank, *weight.shape[1:]), chance(weight.shape[0], rank, *(1 for _ in kernel))
        tensors |= pair(stem(name), up, down, alpha=alpha)
        deltas[name] = (up.flatten(1) @ down.flatten(1) * ((alpha or rank) / rank)).reshape(weight.shape)
    return tensors, deltas


def loaded(file: Path, model: nn.Module, text: Mapping[str, nn.Module]) -> Deltas:
    """The deltas that diffusers puts into a pipeline's models when it loads a file."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader

    state, alphas = Loader.lora_state_dict(str(file.parent), weight_name=file.name, unet_config=model.config)[:2]
    Loader.load_lora_into_unet(state, alphas, model, adapter_name="made")
    found = {}
    for component, encoder in text.items():
        Loader.load_lora_into_text_encoder(state, alphas, encoder, prefix=component, adapter_name="made")
    for component, one in {"unet": model, **text}.items():
        for name, layer in one.named_modules():
            if "made" in getattr(layer, "lora_A", ()):
                full = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                found[f"{component}.{full}"] = layer.get_delta_weight("made").detach()
    return found


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}_{name.replace('.', '_')}"


def test_kohya_sd1_agrees_with_diffusers(chance: Chance, tmp_path: Path) -> None:
    model, text = unet(SD1), clip()
    first, _ = trained(chance, paths(model), flat("lora_unet"), [2.0])
    second, _ = trained(chance, paths(text), flat("lora_te"), [2.0])
    file = saved(tmp_path, {**first, **second})
    adapter = reading.read(file)
    assert adapter.meta["format"] == "kohya"
    assert len(adapter.modules) > 280
    assert_same(adapter, loaded(file, model, {"text_encoder": text}))


def test_kohya_alphas_belong_to_modules(chance: Chance, tmp_path: Path) -> None:
    # diffusers 0.42 gives attention layers the most frequent alpha of the file, so it is no oracle here
    tensors, deltas = trained(chance, paths(unet(SD1)), flat("lora_unet"), [None, 1.0, 8.0, 0.0])
    file = saved(tmp_path, tensors)
    assert_same(reading.read(file), {f"unet.{name}": delta for name, delta in deltas.items()})
    assert reading.inspect(file).ranks == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_of_any_kind(dtype: torch.dtype, shape: tuple[int, ...], chance: Chance, tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = pair(stem, chance(6, 2), chance(2, 6)) | {f"{stem}.alpha": torch.full(shape, 3, dtype=dtype)}
    assert reading.inspect(saved(tmp_path, tensors)).scales == (1.5,)


def sgm(name: str) -> str:
    """The name of an SDXL UNet's layer in Stability's own checkpoint."""
    part, *rest = name.split(".")
    stems = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    if name in stems:
        return stems[name]
    leaf = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    leaf["conv_shortcut"] = "skip_connection"
    if part == "mid_block":
        kind, index, *tail = rest
        slot = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{slot}.{'.'.join(tail) if slot == 1 else leaf[tail[0]]}"
    level, kind, index, *tail = rest
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.2.conv"
    number = 3 * int(level) + int(index) + (1 if part == "down_blocks" else 0)
    where = f"{'input' if part == 'down_blocks' else 'output'}_blocks.{number}"
    return f"{where}.0.{leaf[tail[0]]}" if kind == "resnets" else f"{where}.1.{'.'.join(tail)}"


def test_kohya_sdxl_dialects_meet(chance: Chance, tmp_path: Path) -> None:
    model, text = unet(SDXL), {"text_encoder": clip(), "text_encoder_2": clip()}
    layers = paths(model)
    tensors, deltas = trained(chance, layers, lambda name: flat("lora_unet")(sgm(name)), [2.0])
    for number, encoder in enumerate(text.values(), 1):
        tensors |= trained(chance, paths(encoder), flat(f"lora_te{number}"), [2.0])[0]
    file = saved(tmp_path, tensors)
    adapter = reading.read(file)
    wanted = {f"unet.{name}": delta for name, delta in deltas.items()}
    assert_same(replace(adapter, modules={n: m for n, m in adapter.modules.items() if n.startswith("unet.")}), wanted)
    assert_same(adapter, loaded(file, model, text))
    renamed = {
        f"{flat('lora_unet')(name)}.{suffix}": tensors[f"{flat('lora_unet')(sgm(name))}.{suffix}"]
        for name in layers
        for suffix in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert_same(reading.read(saved(tmp_path, renamed, "diffusers_names.safetensors")), wanted)


def test_dotted_original_names_meet_too(chance: Chance, tmp_path: Path) -> None:
    layers = {n: w for n, w in paths(unet(SDXL)).items() if "resnets" not in n}
    tensors, deltas = {}, {}
    for name, weight in layers.items():
        down, up = chance(2, *weight.shape[1:]), chance(weight.shape[0], 2, *(1 for _ in weight.shape[2:]))
        tensors |= pair(f"diffusion_model.{sgm(name)}", up, down, "peft")
        deltas[f"unet.{name}"] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    adapter = reading.read(saved(tmp_path, tensors))
    assert adapter.meta["format"] == "comfy"
    assert_same(adapter, deltas)


# --- FLUX ---------------------------------------------------------------------------------------------------------

FLUX = {  # path in the original checkpoint -> outputs, inputs; the width is the real one, which conversions expect
    "double_blocks.3.img_attn.qkv": (9, 4),
    "double_blocks.3.txt_attn.qkv": (12, 4),
    "double_blocks.3.img_attn.proj": (5, 4),
    "double_blocks.18.txt_attn.proj": (5, 4),
    "double_blocks.0.img_mlp.0": (8, 4),
    "double_blocks.0.img_mlp.2": (4, 8),
    "double_blocks.0.txt_mlp.0": (8, 4),
    "double_blocks.0.txt_mlp.2": (4, 8),
    "double_blocks.0.img_mod.lin": (6, 4),
    "double_blocks.0.txt_mod.lin": (6, 4),
    "single_blocks.0.linear1": (7 * 3072, 2),
    "single_blocks.37.linear2": (4, 15),
    "single_blocks.37.modulation.lin": (6, 4),
    "img_in": (5, 3),
    "txt_in": (5, 6),
    "time_in.in_layer": (5, 3),
    "time_in.out_layer": (5, 5),
    "vector_in.in_layer": (5, 3),
    "vector_in.out_layer": (5, 5),
    "guidance_in.in_layer": (5, 3),
    "guidance_in.out_layer": (5, 5),
    "final_layer.linear": (3, 5),
    "final_layer.adaLN_modulation.1": (10, 5),
}


def original_flux(chance: Chance) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> up, down of rank 2 for every kind of layer."""
    return {path: (chance(outputs, 2), chance(2, inputs)) for path, (outputs, inputs) in FLUX.items()}


def multiplied(state: Mapping[str, Tensor]) -> Deltas:
    """up @ down of a state dictionary of diffusers' names, each under its component."""
    found = {}
    for key, up in state.items():
        if key.endswith(".lora_B.weight"):
            name = key.removesuffix(".lora_B.weight")
            delta = up @ state[f"{name}.lora_A.weight"]
            found[name if name.startswith(("transformer.", "text_encoder.")) else f"transformer.{name}"] = delta
    return found


def test_kohya_flux_agrees_with_diffusers(chance: Chance, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    tensors = {}
    for path, (up, down) in original_flux(chance).items():
        # diffusers 0.42 takes alpha for the rank in the final layer: let it be the rank there
        alpha = None if path.startswith("final_layer") else 3.0
        tensors |= pair(flat("lora_unet")(path), up, down, alpha=alpha)
    adapter = reading.read(saved(tmp_path, tensors))
    assert_same(adapter, multiplied(_convert_kohya_flux_lora_to_diffusers(dict(tensors))))
    assert adapter.base == "flux-1"


def test_flux_dialects_meet(chance: Chance, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    factors = original_flux(chance)
    kohya: dict[str, Tensor] = {}
    for path, (up, down) in factors.items():
        kohya |= pair(flat("lora_unet")(path), up, down)
    wanted = multiplied(_convert_kohya_flux_lora_to_diffusers(dict(kohya)))
    for prefix, dialect in (
        ("diffusion_model.", "comfy"),
        ("base_model.model.", "peft"),
        ("transformer.", "diffusers"),
    ):
        tensors = {}
        for path, (up, down) in factors.items():
            tensors |= pair(f"{prefix}{path}", up, down, "peft")
        adapter = reading.read(saved(tmp_path, tensors))
        assert adapter.meta["format"] == dialect
        assert_same(adapter, wanted)


def test_onetrainer_writes_fused_layers_in_parts(chance: Chance, tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    names = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    for layer, parts in names.items():
        for number, part in enumerate(parts):
            up, down = chance(5, 2), chance(2, 4)
            tensors |= pair(f"transformer.double_blocks.4.{layer}.{number}", up, down, "peft")
            wanted[f"transformer.transformer_blocks.4.attn.{part}"] = up @ down
    for number, part in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        up, down = chance(5, 2), chance(2, 4)
        tensors |= pair(f"transformer.single_blocks.2.linear1.{number}", up, down, "peft")
        wanted[f"transformer.single_transformer_blocks.2.{part}"] = up @ down
    assert_same(reading.read(saved(tmp_path, tensors)), wanted)


def test_rows_that_do_not_divide_stay_whole(chance: Chance, tmp_path: Path) -> None:
    up, down = chance(10, 2), chance(2, 4)
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", up, down)
    assert_same(reading.read(saved(tmp_path, tensors)), {"transformer.transformer_blocks.0.img_attn.qkv": up @ down})


def test_xlabs_agrees_with_diffusers(chance: Chance, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    tensors = {}
    for stem, outputs in {
        "double_blocks.7.processor.qkv_lora1": 9,
        "double_blocks.7.processor.qkv_lora2": 9,
        "double_blocks.7.processor.proj_lora1": 5,
        "double_blocks.7.processor.proj_lora2": 5,
        "single_blocks.1.processor.qkv_lora": 12,
        "single_blocks.1.processor.proj_lora": 5,
    }.items():
        tensors |= {f"{stem}.up.weight": chance(outputs, 2), f"{stem}.down.weight": chance(2, 4)}
    adapter = reading.read(saved(tmp_path, tensors))
    assert_same(adapter, multiplied(_convert_xlabs_flux_lora_to_diffusers(dict(tensors))))


@pytest.mark.parametrize("stem", ["lora_transformer_", "lycoris_"])
def test_flattened_diffusers_names(stem: str, chance: Chance, tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    for path in (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.norm1.linear",
        "transformer_blocks.1.ff_context.net.0.proj", "transformer_blocks.1.norm1_context.linear",
        "single_transformer_blocks.3.proj_mlp", "single_transformer_blocks.3.attn.to_v",
    ):  # fmt: skip
        up, down = chance(5, 2), chance(2, 4)
        tensors |= pair(f"{stem}{path.replace('.', '_')}", up, down, alpha=1.0)
        wanted[f"transformer.{path}"] = up @ down / 2
    assert_same(reading.read(saved(tmp_path, tensors)), wanted)
