"""LyCORIS' families against its formulas, written out densely here: LoCon, LoHa and LoKr, with and without a core.

The formulas were checked once against lycoris-lora 4.1.3 over 288 combinations of layer, rank and option.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.errors import IncompatibleAdapters
from lorahub.hub.lowrank import LowRank
from safetensors.torch import save_file
from torch import Tensor

STEM = "lora_unet_mid_block_attentions_0_proj_in"
NAME = "unet.mid_block.attentions.0.proj_in"
KERNELS = [(), (1, 1), (3, 3), (5,), (3, 1, 2)]
TENSORS = dict[str, Tensor]


class Chance:
    """Tensors that differ from each other, the same in every run."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def read(folder: Path, tensors: TENSORS, stem: str = STEM, name: str = NAME) -> LowRank:
    """The one module of a file."""
    path = folder / "lycoris.safetensors"
    save_file({f"{stem}.{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)
    adapter = reading.read(path)
    assert list(adapter.modules) == [name]
    found = reading.inspect(path)
    module = adapter.modules[name]
    assert found.ranks == (module.rank, module.rank)
    assert found.parameters == module.up.numel() + module.down.numel()
    return module


def assert_delta(module: LowRank, right: Tensor) -> None:
    got = module.dense()
    assert got.shape == right.shape
    assert float((got - right).norm()) <= 1e-6 * float(right.norm())


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """LyCORIS' rebuild: core (i, j, *kernel), left (i, outputs), right (j, inputs) -> (outputs, inputs, *kernel)."""
    return torch.einsum("ijk,io,jc->ock", core.flatten(2), left, right).reshape(
        left.shape[1], right.shape[1], *core.shape[2:]
    )


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5,), (3, 1, 2)])
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_locon_with_a_core(kernel: tuple[int, ...], alpha: float | None, tmp_path: Path) -> None:
    chance, ones = Chance(), (1,) * len(kernel)
    down, up, mid = chance(3, 6, *ones), chance(8, 3, *ones), chance(3, 3, *kernel)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
    if alpha:
        tensors["alpha"] = torch.tensor(alpha)
    right = tucker(mid, up.flatten(1).T, down.flatten(1)) * ((alpha or 3) / 3)
    module = read(tmp_path, tensors)
    assert module.rank == 3
    assert_delta(module, right)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_loha(kernel: tuple[int, ...], rank: int, tmp_path: Path) -> None:
    chance = Chance(rank)
    left = [chance(8, rank), chance(8, rank)]
    right = [chance(rank, 6, *kernel), chance(rank, 6, *kernel)]
    tensors = {"hada_w1_a": left[0], "hada_w1_b": right[0], "hada_w2_a": left[1], "hada_w2_b": right[1]}
    tensors["alpha"] = torch.tensor(4.0)
    wanted = (left[0] @ right[0].flatten(1)) * (left[1] @ right[1].flatten(1)) * (4.0 / rank)
    module = read(tmp_path, tensors)
    assert module.rank <= min(rank**2, 8)
    assert_delta(module, wanted.reshape(8, 6, *kernel))


@pytest.mark.parametrize("kernel", [(3, 3), (5,), (3, 1, 2)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_loha_with_cores(kernel: tuple[int, ...], rank: int, tmp_path: Path) -> None:
    chance = Chance(rank)
    parts = [(chance(rank, rank, *kernel), chance(rank, 8), chance(rank, 6)) for _ in range(2)]
    tensors = {"alpha": torch.tensor(3.0)}
    for number, (core, left, right) in enumerate(parts, 1):
        tensors |= {f"hada_t{number}": core, f"hada_w{number}_a": left, f"hada_w{number}_b": right}
    assert_delta(read(tmp_path, tensors), tucker(*parts[0]) * tucker(*parts[1]) * (3.0 / rank))


def lokr_side(which: str, form: str, shape: tuple[int, ...], rank: int, chance: Chance) -> tuple[TENSORS, Tensor]:
    """A side of the Kronecker product, stored dense, factored or with a core; and the side itself."""
    outputs, inputs, *kernel = shape
    if form == "dense":
        side = chance(*shape)
        return {f"lokr_{which}": side}, side
    if form == "core":
        core, left, right = chance(rank, rank, *kernel), chance(rank, outputs), chance(rank, inputs)
        return {"lokr_t2": core, f"lokr_{which}_a": left, f"lokr_{which}_b": right}, tucker(core, left, right)
    left, right = chance(outputs, rank), chance(rank, inputs, *kernel)
    return {f"lokr_{which}_a": left, f"lokr_{which}_b": right}, (left @ right.flatten(1)).reshape(shape)


@pytest.mark.parametrize(
    ("kernel", "second"),
    [(kernel, form) for kernel in KERNELS for form in ("dense", "factored", "core") if kernel or form != "core"],
)
@pytest.mark.parametrize("first", ["dense", "factored"])
@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, 6.0])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_lokr(kernel: tuple[int, ...], first: str, second: str, alpha: float | None, rank: int, tmp_path: Path) -> None:
    chance = Chance(rank)
    stored1, side1 = lokr_side("w1", first, (4, 3), rank, chance)
    stored2, side2 = lokr_side("w2", second, (2, 5, *kernel), rank, chance)
    tensors = {**stored1, **stored2, **({} if alpha is None else {"alpha": torch.tensor(alpha)})}
    scale = 1.0 if not alpha or (first, second) == ("dense", "dense") else alpha / rank
    wanted = torch.kron(side1, side2.flatten(1)).reshape(8, 15, *kernel) * scale
    module = read(tmp_path, tensors)
    assert module.scale == pytest.approx(scale)
    assert_delta(module, wanted)


def test_lokr_takes_the_smaller_rank(tmp_path: Path) -> None:
    chance = Chance()
    tensors = {"lokr_w1": chance(16, 2), "lokr_w2_a": chance(10, 3), "lokr_w2_b": chance(3, 20)}
    assert read(tmp_path, tensors).rank == 2 * 3


def test_early_files_flattened_their_convolutions(tmp_path: Path) -> None:
    chance = Chance()
    stem, name = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
    parts = [chance(8, 2), chance(2, 6 * 9), chance(8, 2), chance(2, 6 * 9)]
    loha = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), parts, strict=True))
    wanted = ((parts[0] @ parts[1]) * (parts[2] @ parts[3])).reshape(8, 6, 3, 3)
    assert_delta(read(tmp_path, loha, stem, name), wanted)
    lokr = {"lokr_w1": chance(4, 2), "lokr_w2_a": chance(2, 2), "lokr_w2_b": chance(2, 3 * 9)}
    wanted = torch.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"]).reshape(8, 6, 3, 3)
    assert_delta(read(tmp_path, lokr, stem, name), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_multiplied_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    chance = Chance()
    left = [chance(8, 2).to(dtype), chance(8, 2).to(dtype)]
    right = [chance(2, 6).to(dtype), chance(2, 6).to(dtype)]
    tensors = {"hada_w1_a": left[0], "hada_w1_b": right[0], "hada_w2_a": left[1], "hada_w2_b": right[1]}
    wanted = (left[0].double() @ right[0].double()) * (left[1].double() @ right[1].double())
    assert_delta(read(tmp_path, tensors), wanted.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    chance = Chance()
    down, up = chance(2, 6).to(dtype), chance(8, 2).to(dtype)
    module = read(tmp_path, {"lora_down.weight": down, "lora_up.weight": up})
    assert module.dtype == torch.float16
    assert_delta(module, up.float() @ down.float())


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"), "GLoRA"), (("weight", "on_input"), "IA3"),
        (("oft_blocks", "rescale", "alpha"), "OFT"), (("oft_diag",), "OFT"), (("w_norm", "b_norm"), "normalisation"),
        (("lora_down.weight", "lora_up.weight", "dora_scale"), "DoRA"),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "dora_scale"), "DoRA"),
    ],
)  # fmt: skip
def test_what_depends_on_the_base_is_kept_apart(leaves: tuple[str, ...], words: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({f"{STEM}.{leaf}": torch.ones(4, 4) if leaf != "alpha" else torch.ones(1) for leaf in leaves}, path)
    found = reading.inspect(path)
    assert not found.mergeable
    assert words in (found.reason or "")
    assert reading.fingerprint(path)
    with pytest.raises(IncompatibleAdapters, match=words):
        reading.read(path)


def test_full_differences_are_extras(tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    pair = {f"{STEM}.lora_down.weight": torch.ones(2, 6), f"{STEM}.lora_up.weight": torch.ones(8, 2)}
    save_file(
        {**pair, "lora_unet_mid_block_resnets_0_norm1.diff": torch.ones(4), f"{STEM}.diff_b": torch.ones(8)}, path
    )
    adapter = reading.read(path)
    assert list(adapter.modules) == [NAME]
    assert set(adapter.extras) == {"lora_unet_mid_block_resnets_0_norm1.diff", f"{STEM}.diff_b"}
