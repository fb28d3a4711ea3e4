"""diffusers' own dialects: today's names with adapter metadata in the header, and the older ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.errors import BadOption, FormatError
from safetensors.torch import save_file
from torch import Tensor

KEY = "lora_adapter_metadata"


def saved(folder: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path = folder / "pytorch_lora_weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def pair(name: str, rank: int, seed: int = 0) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, 6, generator=chance),
        f"{name}.lora_B.weight": torch.randn(5, rank, generator=chance),
    }


def scales(path: Path) -> dict[str, float]:
    return {name: module.scale for name, module in reading.read(path).modules.items()}


def test_metadata_of_two_components(tmp_path: Path) -> None:
    tensors = {
        **pair("unet.mid_block.attentions.0.proj_in", 2),
        **pair("unet.mid_block.attentions.0.proj_out", 4),
        **pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 2),
        **pair("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 4),
    }
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.alpha_pattern": {"mid_block.attentions.0.proj_out": 16},
        "unet.rank_pattern": {"mid_block.attentions.0.proj_out": 4},
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }
    path = saved(tmp_path, tensors, **{KEY: json.dumps(settings), "format": "pt"})
    assert scales(path) == {
        "unet.mid_block.attentions.0.proj_in": 2.0,
        "unet.mid_block.attentions.0.proj_out": 4.0,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": pytest.approx(3 / 2**0.5),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": 1.0,
    }


def test_metadata_that_diffusers_writes(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=8, norm_num_groups=2, attention_head_dim=2,
        block_out_channels=(4, 8), cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0", "conv1"], init_lora_weights=False,
        rank_pattern={"attn2.to_v": 3}, alpha_pattern={r"attn1\.to_q": 5, "conv1": 1},
    )  # fmt: skip
    unet.add_adapter(config, adapter_name="made")
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name="made"))
    settings = {"unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(tmp_path, unet_lora_layers=state, **settings)
    adapter = reading.read(tmp_path / "pytorch_lora_weights.safetensors")
    layers = {f"unet.{n}": m for n, m in unet.named_modules() if "made" in getattr(m, "lora_A", ())}
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        right = layer.get_delta_weight("made").detach()
        assert float((adapter.modules[name].dense() - right).norm()) <= 1e-6 * float(right.norm()), name
    assert {module.scale for module in adapter.modules.values()} == {3.0, 2.0, 2.5, 0.5}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", None),
        ("transformer.single_transformer_blocks.5.proj_mlp", None),
        ("transformer.context_embedder", None),
        ("transformer.time_text_embed.guidance_embedder.linear_1", None),
        ("transformer.proj_out", None),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", None),
        ("down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.attentions.0.proj_in"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ],
)
def test_todays_names(key: str, name: str | None, tmp_path: Path) -> None:
    settings = {f"{(name or key).split('.')[0]}.lora_alpha": 4}
    path = saved(tmp_path, pair(key, 2), **{KEY: json.dumps(settings)})
    found = reading.inspect(path)
    assert list(reading.read(path).modules) == [name or key]
    if name is None:
        assert (found.format, found.scales) == ("diffusers", (2.0,))


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora", "unet.{}attn1.to_q"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora", "unet.{}attn1.to_out.0"),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora", "unet.{}attn2.to_k"),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.lora", "unet.{}attn2.to_out.0"),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_linear_layer", "unet.{}attn2.to_v"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora", "{}.self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora", "{}.self_attn.out_proj"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.k_proj.lora_linear_layer", "{}.self_attn.k_proj"),
        ("text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer", "{}.mlp.fc1"),
    ],
)
def test_older_names(stem: str, name: str, tmp_path: Path) -> None:
    where = {"unet.": "up_blocks.1.attentions.0.transformer_blocks.0."}.get(
        name[:5], "text_encoder.text_model.encoder.layers.1"
    )
    tensors = {f"{stem}.down.weight": torch.ones(2, 6), f"{stem}.up.weight": torch.ones(5, 2)}
    path = saved(tmp_path, tensors)
    adapter = reading.read(path)
    assert list(adapter.modules) == [name.format(where)]
    assert adapter.meta["format"] == "diffusers"
    assert scales(path) == {name.format(where): 1.0}


@pytest.mark.parametrize(
    "value",
    [
        "{", "[1]", '"x"', "1", '{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": [1]}',
        '{"unet.lora_alpha": true}', '{"unet.lora_alpha": 1e999}', '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": {"(": 1}}', '{"unet.alpha_pattern": {"(a+)+b": 1}}', "[" * 100_000,
        '{"unet.alpha_pattern": {"mid_block.attentions.0.proj_in": {}}}',
    ],
)  # fmt: skip
def test_metadata_that_make_no_sense_are_refused(value: str, tmp_path: Path) -> None:
    path = saved(tmp_path, pair("unet.mid_block.attentions.0.proj_in", 2), **{KEY: value})
    with pytest.raises(FormatError, match=r"pytorch_lora_weights\.safetensors: ") as caught:
        reading.inspect(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["", "{}", "null", '{"unet.lora_alpha": null}', '{"transformer.lora_alpha": 7}'])
def test_metadata_that_say_nothing(value: str, tmp_path: Path) -> None:
    path = saved(tmp_path, pair("unet.mid_block.attentions.0.proj_in", 2), **{KEY: value})
    assert reading.inspect(path).scales == (1.0,)


def test_the_dialect_can_be_overridden(tmp_path: Path) -> None:
    path = saved(tmp_path, pair("transformer.h.0.attn.c_attn", 2))
    assert reading.inspect(path).dialects == {"peft": 1}
    told = reading.read(path, dialect="peft")
    assert list(told.modules) == ["transformer.h.0.attn.c_attn"]
    with pytest.raises(FormatError, match="holds no adapter tensors"):
        reading.inspect(path, dialect="kohya")
    with pytest.raises(BadOption, match="expected one of cloneofsimo, comfy, diffusers"):
        reading.read(path, dialect="kohia")


def test_families_and_dialects_mix_in_one_file(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    first = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    second = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    third = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{first}.lora_down.weight": some(2, 6), f"{first}.lora_up.weight": some(6, 2), f"{first}.alpha": some(1),
        f"{second}.hada_w1_a": some(6, 2), f"{second}.hada_w1_b": some(2, 6), f"{second}.hada_w2_a": some(6, 2),
        f"{second}.hada_w2_b": some(2, 6), f"{third}.lokr_w1": some(2, 3), f"{third}.lokr_w2": some(3, 2),
        **pair("unet.mid_block.attentions.0.proj_out", 3),
        "unet.mid_block.resnets.0.norm1.diff_b": some(6), "bundle_emb.word.clip_l": some(2, 6),
    }  # fmt: skip
    found = reading.inspect(saved(tmp_path, tensors))
    assert found.dialects == {"kohya": 3, "diffusers": 1}
    assert found.format == "kohya+diffusers"
    assert (found.modules, found.ranks) == (4, (2, 4))
    assert set(found.extras) == {"unet.mid_block.resnets.0.norm1.diff_b", "bundle_emb.word.clip_l"}
    adapter = reading.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(adapter.extras["bundle_emb.word.clip_l"], tensors["bundle_emb.word.clip_l"])


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = {
        **pair("unet.mid_block.attentions.0.proj_in", 2),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 6),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(5, 2),
    }
    with pytest.raises(FormatError, match=r"two sets of tensors mean module unet\.mid_block"):
        reading.inspect(saved(tmp_path, tensors))


def test_two_tensors_for_one_factor_are_refused(tmp_path: Path) -> None:
    tensors = pair("base_model.model.layer", 2) | pair("base_model.model.layer", 2)
    tensors["base_model.model.layer.lora_A.default.weight"] = torch.ones(2, 6)
    with pytest.raises(FormatError, match="are the same factor"):
        reading.inspect(saved(tmp_path, tensors))


def test_header_without_metadata_and_with_a_null(tmp_path: Path) -> None:
    path = saved(tmp_path, pair("unet.mid_block.attentions.0.proj_in", 2))
    plain = reading.fingerprint(path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {"__metadata__": None, **json.loads(raw[8 : 8 + length])}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert reading.inspect(path).metadata == {}
    assert reading.fingerprint(path) == plain
