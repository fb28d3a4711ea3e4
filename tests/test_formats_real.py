"""Real adapter files of twelve public repositories against the tools that wrote them.

The files lie beside the checkout and do not ship with it; without them these tests are skipped. Each delta is compared
with one that lorahub had no part in: PEFT's, diffusers', or the trainer's own formula on tensors read by safetensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import FormatError, IncompatibleAdapters, UnsafeFile
from real_files import FOLDER, SD1, Deltas, empty, injected
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"real adapters are not at {FOLDER}")

GPT2 = {
    "deepbiolab__gpt2-classification-peft/peft_model": (2, 36),
    "gurvineet__peft-implementation/peft_model/best": (6, 36),
    "gurvineet__peft-implementation/peft_model/checkpoint-best": (2, 36),
    "parikshit-06__domain-skeleton-gpt2/adapters/legal": (0, 36),
    "parikshit-06__domain-skeleton-gpt2/adapters/medical": (0, 36),
    "parikshit-06__domain-skeleton-gpt2/adapters/sports": (0, 36),
}
REGRESSION = "huggingface__peft/tests/regression"
OPT = {
    f"{REGRESSION}/lora_opt-125m_bnb_4bit/0.5.0": (768, 12, True),
    f"{REGRESSION}/lora_opt-350m/0.6.1/adapter_model.bin": (1024, 24, False),
    f"{REGRESSION}/lora_opt-350m_bnb_4bit/0.6.1/adapter_model.bin": (1024, 24, False),
}
DIFFUSERS = [
    "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.bin",
    "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors",
    "huggingface__diffusers/examples/text_to_image/sd-pokemon-model-lora/pytorch_lora_weights.safetensors",
]
CLONEOFSIMO = ["analog_svd_rank4", "lora_disney", "lora_disney_inpainting"]


def assert_same(adapter: Adapter, wanted: Deltas) -> None:
    """Every module of the one is a module of the other, with the same delta to 1e-6."""
    assert set(adapter.modules) == set(wanted)
    for name, module in adapter.modules.items():
        got, right = module.dense(), wanted[name].float()
        assert got.shape == right.shape, f"{name}: {tuple(got.shape)}, wanted {tuple(right.shape)}"
        distance = float((got - right).norm())
        assert distance <= 1e-6 * float(right.norm()), f"{name}: off by {distance:.3e} of {float(right.norm()):.3e}"


@pytest.mark.parametrize("place", GPT2)
def test_peft_on_gpt2_agrees_with_peft(place: str) -> None:
    from peft import PeftModel
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    labels, count = GPT2[place]
    config = GPT2Config(vocab_size=8, bos_token_id=0, eos_token_id=0, **({"num_labels": labels} if labels else {}))
    kind = GPT2ForSequenceClassification if labels else GPT2LMHeadModel
    loaded = PeftModel.from_pretrained(empty(lambda: kind(config)), FOLDER / place)
    adapter = reading.read(FOLDER / place)
    assert len(adapter.modules) == count
    assert_same(adapter, injected(loaded, "default"))
    assert set(adapter.extras) == ({"score.weight"} if labels else set())
    for name, extra in adapter.extras.items():
        stored = dict(loaded.named_parameters())[f"base_model.model.{name.replace('.', '.modules_to_save.default.')}"]
        assert torch.equal(extra, stored)


@pytest.mark.parametrize("place", OPT)
def test_peft_pickles_on_opt_agree_with_peft(place: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import OPTConfig, OPTForCausalLM

    width, layers, configured = OPT[place]
    shape = OPTConfig(
        vocab_size=8, pad_token_id=1, bos_token_id=2, eos_token_id=2, hidden_size=width, word_embed_proj_dim=width,
        num_hidden_layers=layers, ffn_dim=8, num_attention_heads=16, max_position_embeddings=8,
    )  # fmt: skip
    folder = FOLDER / place
    if not configured:  # the file came without its configuration: lorahub assumes scale 1 and says so
        LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
        (tmp_path / "adapter_model.bin").symlink_to(FOLDER / place)
        folder = tmp_path
    loaded = PeftModel.from_pretrained(empty(lambda: OPTForCausalLM(shape)), folder)
    with pytest.raises(UnsafeFile, match="--allow-pickle"):
        reading.read(FOLDER / place)
    adapter = reading.read(FOLDER / place, allow_pickle=True)
    assert len(adapter.modules) == 2 * layers
    assert_same(adapter, injected(loaded, "default"))
    assert bool(adapter.meta["warnings"]) is not configured


@pytest.mark.parametrize("place", DIFFUSERS)
def test_diffusers_agrees_with_diffusers(place: str) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    file = FOLDER / place
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(file.parent), weight_name=file.name)[:2]
    unet = empty(lambda: UNet2DConditionModel(**SD1))
    prefix = "unet" if any(key.startswith("unet.") for key in state) else None
    unet.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, adapter_name="real")
    adapter = reading.read(file, allow_pickle=file.suffix == ".bin")
    assert len(adapter.modules) == 128
    assert_same(adapter, {f"unet.{name}": delta for name, delta in injected(unet, "real").items()})


def test_loralib_is_up_times_down() -> None:
    file = FOLDER / "microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin"
    state = torch.load(file, weights_only=True, map_location="cpu")
    stems = {key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")}
    adapter = reading.read(file, allow_pickle=True)
    assert len(stems) == 24
    assert_same(adapter, {stem: state[f"{stem}.lora_B"] @ state[f"{stem}.lora_A"] for stem in stems})
    assert set(adapter.extras) == {key for key in state if "lora_" not in key}
    # the file does not say alpha; the training script's is 16
    told = reading.read(file, allow_pickle=True, alpha=16)
    name = sorted(stems)[0]
    assert told.modules[name].scale == 2.0


def test_mlx_is_transposed() -> None:
    file = FOLDER / "ml-explore__mlx-lm/test_dpo_adapters/adapters.safetensors"
    state = load_file(file)
    stems = {key.removesuffix(".lora_a") for key in state if key.endswith(".lora_a")}
    assert len(stems) == 4
    assert_same(reading.read(file), {stem: (state[f"{stem}.lora_a"] @ state[f"{stem}.lora_b"]).T for stem in stems})


@pytest.mark.parametrize("rank", [2, 4, 6, 8, 16])
def test_sam_pairs_are_query_and_value(rank: int) -> None:
    file = FOLDER / f"MathieuNlp__Sam_LoRA/lora_weights/lora_rank{rank}.safetensors"
    state = load_file(file)
    wanted = {
        f"image_encoder.blocks.{number // 2}.attn.qkv.{'qv'[number % 2]}": state[f"w_b_{number:03d}"]
        @ state[f"w_a_{number:03d}"]
        for number in range(24)
    }
    assert len(state) == 48
    assert_same(reading.read(file), wanted)


@pytest.mark.parametrize("stem", CLONEOFSIMO)
def test_cloneofsimo_numbers_become_the_models_names(stem: str) -> None:
    from diffusers import UNet2DConditionModel

    file = FOLDER / f"cloneofsimo__lora/example_loras/{stem}.safetensors"
    state = load_file(file)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD1)
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    leaves = [*(f"attn1.{leaf}" for leaf in attention), "ff.net.0.proj", *(f"attn2.{leaf}" for leaf in attention)]
    names = {f"unet:{n}": f"unet.{blocks[n // 9]}.{leaves[n % 9]}" for n in range(144)}
    leaves = ["k_proj", "v_proj", "q_proj", "out_proj"]
    layers = "text_encoder.text_model.encoder.layers"
    names |= {f"text_encoder:{n}": f"{layers}.{n // 4}.self_attn.{leaves[n % 4]}" for n in range(48)}
    wanted = {name: state[f"{key}:up"].float() @ state[f"{key}:down"].float() for key, name in names.items()}
    for name, parameter in unet.named_parameters():
        module = f"unet.{name.removesuffix('.weight')}"
        assert module not in wanted or wanted[module].shape == parameter.shape
    adapter = reading.read(file)
    assert len(state) - len(adapter.extras) == 2 * 192
    assert_same(adapter, wanted)


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_lokr_is_the_kronecker_product(rank: int) -> None:
    file = FOLDER / f"KohakuBlueleaf__LyCORIS/result/smart_falcon_{rank}_lokr.safetensors"
    state = {key: tensor.float() for key, tensor in load_file(file).items()}
    stems = sorted({key.partition(".")[0] for key in state})
    adapter = reading.read(file)
    assert len(stems) == len(adapter.modules) == 350
    names = _kohya_names()
    for stem in stems:
        parts = {key.partition(".")[2]: state[key] for key in state if key.startswith(f"{stem}.")}
        first, second = parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        scale = float(parts["alpha"]) / parts["lokr_w2_b"].shape[0]
        right = torch.kron(first, second).mul_(scale)
        module = adapter.modules[names[stem]]
        distance = float(module.dense().flatten(1).sub_(right).norm())
        assert distance <= 1e-6 * float(right.norm()), stem
        assert module.kernel in {(), (3, 3)}
        assert (module.kernel == (3, 3)) == stem.endswith(("_conv1", "_conv2", "samplers_0_conv"))


@cache
def _kohya_names() -> dict[str, str]:
    """kohya's flattened name -> path, from the models themselves."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD1)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
    names = {f"lora_unet_{name.replace('.', '_')}": f"unet.{name}" for name, _ in unet.named_modules()}
    for name, _ in text.named_modules():
        path = name if name.startswith("text_model") else f"text_model.{name}"
        names[f"lora_te_{path.replace('.', '_')}"] = f"text_encoder.{path}"
    return names


REFUSED = {
    "invoke-ai__InvokeAI/tests/test_model_probe/Alien Style.safetensors",
    "invoke-ai__InvokeAI/tests/test_model_probe/shinkai_makoto_offset.safetensors",
    "invoke-ai__InvokeAI/tests/test_model_probe/stripped_models/peft_adapter_model.safetensors",
}
NOT_MERGEABLE = {
    "cloneofsimo__lora/contents/lora_disney.pt": "only that model can name them",
    "cloneofsimo__lora/contents/lora_kiriko.pt": "only that model can name them",
    "cloneofsimo__lora/contents/lora_kiriko.text_encoder.pt": "only that model can name them",
    "cloneofsimo__lora/example_loras/lora_illust.pt": "only that model can name them",
    "huggingface__peft/examples/conditional_generation/bigscience/mt0-large_IA3_SEQ_2_SEQ_LM/adapter_model.bin": "IA3",
    "huggingface__peft/outputs/peft_mrpc_run/adapter_model.safetensors": "FineGates",
    "huggingface__peft/results_glue/adapter_ckpt/adapter_model.safetensors": "Uni-LoRA",
    f"{REGRESSION}/ia3_opt-350m/0.6.1/adapter_model.bin": "IA3",
}


def weight_files() -> list[str]:
    suffixes = {".safetensors", ".bin", ".pt"}
    return sorted(str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*") if file.suffix in suffixes)


def test_all_files_are_known_here() -> None:
    assert len(weight_files()) == 38
    assert {*REFUSED, *NOT_MERGEABLE} <= set(weight_files())


@pytest.mark.parametrize("place", weight_files() if FOLDER.is_dir() else [])
def test_status_of_every_file(place: str) -> None:
    file = FOLDER / place
    path = file.parent if (file.parent / "adapter_config.json").exists() else file
    if place in REFUSED:
        with pytest.raises(FormatError, match="JSON text") as caught:
            reading.inspect(path, allow_pickle=True)
        assert "\n" not in str(caught.value)
        return
    found = reading.inspect(path, allow_pickle=True)
    assert len(reading.fingerprint(path, allow_pickle=True)) == 64
    assert found.mergeable is (place not in NOT_MERGEABLE)
    if found.mergeable:
        assert found.modules > 0
        assert found.reason is None
        adapter = reading.read(path, allow_pickle=True)
        assert any(adapter.modules[name].norm() > 0 for name in list(adapter.modules)[:4])
        return
    assert NOT_MERGEABLE[place] in (found.reason or "")
    with pytest.raises(IncompatibleAdapters, match=NOT_MERGEABLE[place]):
        reading.read(path, allow_pickle=True)


@pytest.mark.parametrize("pickles", [False, True])
def test_add_accounts_for_every_file(pickles: bool, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lorahub")), "add", str(FOLDER), "--json", "--no-index"]
    run = subprocess.run(
        [*command, *(["--allow-pickle"] if pickles else [])],
        env={**os.environ, "LORAHUB_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0
    assert "Traceback" not in run.stderr
    found = {one["path"]: one for one in json.loads(run.stdout)}
    expected = {}
    for place in weight_files():
        file = FOLDER / place
        expected[str(file.parent if (file.parent / "adapter_config.json").exists() else file)] = place
    assert set(found) == set(expected)
    for path, place in expected.items():
        unread = not pickles and not place.endswith(".safetensors")
        status, reason = found[path]["status"], found[path]["reason"] or ""
        assert "\n" not in reason
        if place in REFUSED or unread:
            assert status == "rejected"
            assert ("JSON text" if place in REFUSED else "--allow-pickle") in reason
        else:
            assert status in {"added", "duplicate"}
            assert found[path]["mergeable"] is (place not in NOT_MERGEABLE)
            assert NOT_MERGEABLE.get(place, "") in reason
