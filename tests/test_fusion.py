"""Gated where gates belong to the base and have a place for every layer, else the sum; and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lorahub.cli.fusion import FILE, FOLDER, MEASURED, Passes, by_role, fusion, trained_on
from lorahub.generate.painting import Painter, open_painter
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank
from lorahub.merge.gated import fingerprint
from small_pictures import adapter, gated_paths, picture_pipeline, write_gates


@pytest.fixture
def painter(tmp_path: Path) -> Painter:
    picture_pipeline().save_pretrained(tmp_path / "base")
    return open_painter(tmp_path / "base")


@pytest.fixture
def two(painter: Painter) -> list[Adapter]:
    return [adapter(painter.denoiser, seed) for seed in (1, 2)]


def decided(
    painter: Painter,
    adapters: list[Adapter],
    home: Path,
    asked: str | None = None,
    given: Path | None = None,
) -> tuple[str, str]:
    found = fusion(painter, adapters, asked=asked, given=given, home=home)
    assert (found.gates is None) == (found.path is None)
    assert found.gates is None or not any(one.requires_grad for one in found.gates.parameters())
    return found.kind, found.reason


def test_without_gates_it_is_the_sum(painter: Painter, two: list[Adapter], tmp_path: Path) -> None:
    kind, reason = decided(painter, two, tmp_path)
    assert (kind, "no gates in" in reason, str(painter.folder) in reason) == ("sum", True, True)
    assert decided(painter, two, tmp_path, "sum")[0] == "sum"
    assert decided(painter, [], tmp_path) == ("none", "no adapters")
    for adapters in (two, []):
        with pytest.raises(BadOption, match="give --gates FILE"):
            decided(painter, adapters, tmp_path, "gated")
    with pytest.raises(BadOption, match="composed, gated, sum"):
        decided(painter, two, tmp_path, "average")


def test_adapters_are_composed_where_that_was_measured_best(
    painter: Painter, two: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def how(asked: str | None = None, passes: Passes | None = None, guidance: float | None = None) -> list[object]:
        made = fusion(painter, two, asked=asked, given=None, home=tmp_path, guidance=guidance, passes=passes)
        return [made.kind, made.reason, made.passes]

    mixed = by_role([True, False])
    assert how("composed") == ["composed", "as asked", [[1.0, 0.0], [0.0, 1.0]]]
    assert how("composed", mixed) == ["composed", "as asked", mixed]
    assert how(None, mixed)[::2] == ["sum", None]
    monkeypatch.setattr("lorahub.cli.fusion.shipped", lambda: painter.folder)
    assert how(None, mixed) == ["composed", MEASURED, mixed]
    assert how("sum", mixed) == ["sum", "as asked", None]
    assert how()[0] == how(None, mixed, 1.0)[0] == "sum"
    with pytest.raises(BadOption, match=r"guidance scale above 1.*say --fuse sum"):
        how("composed", guidance=1.0)
    write_gates(painter.denoiser, gated_paths(painter.denoiser), tmp_path / "base" / FILE)
    assert how(None, mixed)[::2] == ["gated", None]


def test_what_is_no_style_gets_a_pass_without_styles() -> None:
    assert by_role([True, False, False]) == [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    assert [by_role(one) for one in ([], [True], [True, True], [False, False])] == [None] * 4


def test_flux_is_refused_in_one_line(painter: Painter, two: list[Adapter], tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1)
    painter.pipeline.transformer = flux
    with pytest.raises(BadOption, match=r"FluxTransformer2DModel takes guidance as an input.*say --fuse sum"):
        decided(painter, two, tmp_path, "composed")


@pytest.mark.parametrize("place", [f"base/{FILE}", f"{FOLDER}/any.safetensors", "given.safetensors"])
def test_gates_of_the_base_are_used(painter: Painter, two: list[Adapter], tmp_path: Path, place: str) -> None:
    file = tmp_path / place
    made = write_gates(painter.denoiser, gated_paths(painter.denoiser), file)
    given = file if place.startswith("given") else None
    found = fusion(painter, two, asked=None, given=given, home=tmp_path)
    assert (found.kind, found.path, found.reason) == ("gated", file, f"gates {file}")
    assert found.gates is not None
    assert all(torch.equal(value, made.tensors()[name]) for name, value in found.gates.tensors().items())
    assert decided(painter, two, tmp_path, "sum", given) == ("sum", "as asked")
    assert decided(painter, [], tmp_path, given=given)[0] == "none"


def test_gates_of_another_base_are_not(painter: Painter, two: list[Adapter], tmp_path: Path) -> None:
    other = picture_pipeline(seed=1).transformer
    file = tmp_path / FOLDER / "a.safetensors"
    write_gates(other, gated_paths(other), file)
    (tmp_path / FOLDER / "b.safetensors").write_bytes(b"torn")
    kind, reason = decided(painter, two, tmp_path)
    assert (kind, "were trained on another base" in reason) == ("sum", True)
    assert trained_on(file) == fingerprint(other)
    assert trained_on(tmp_path / FOLDER / "b.safetensors") is None
    with pytest.raises(IncompatibleAdapters, match="another base"):
        decided(painter, two, tmp_path, given=file)
    with pytest.raises(FormatError, match="holds no gates"):
        decided(painter, two, tmp_path, given=tmp_path / FOLDER / "b.safetensors")
    write_gates(painter.denoiser, gated_paths(painter.denoiser), tmp_path / FOLDER / "c.safetensors")
    assert decided(painter, two, tmp_path)[0] == "gated"


def test_gates_without_a_place_for_a_layer_are_not_used(painter: Painter, two: list[Adapter], tmp_path: Path) -> None:
    file = tmp_path / FOLDER / "few.safetensors"
    write_gates(painter.denoiser, gated_paths(painter.denoiser, ("to_q",)), file)
    kind, reason = decided(painter, two, tmp_path)
    assert (kind, "other layers than transformer_blocks.0.attn1.to_out.0" in reason) == ("sum", True)
    for asked, given in ((None, file), ("gated", None)):
        with pytest.raises(IncompatibleAdapters, match="other layers than"):
            decided(painter, two, tmp_path, asked, given)
    place = "transformer.pos_embed.proj"  # a convolution: it has no gate, and its delta is added
    conv = Adapter({place: LowRank(torch.ones(1, 48), torch.ones(16, 1), 1.0, (4, 4))}, None, {}, {"name": "conv"})
    few = [adapter(painter.denoiser, 3, kinds=("to_q",)), conv]
    assert decided(painter, few, tmp_path)[0] == "gated"


def test_a_base_is_known_in_any_dtype(painter: Painter, tmp_path: Path) -> None:
    write_gates(painter.denoiser, gated_paths(painter.denoiser), tmp_path / "base" / FILE)
    half = open_painter(painter.folder, dtype=torch.bfloat16)
    assert decided(half, [adapter(half.denoiser, 1)], tmp_path)[0] == "gated"
