"""What makes two files the same adapter: everything it computes with, and nothing else. And the canonical bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.errors import FormatError
from lorahub.hub.tensorfile import open_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

STEM = "lora_unet_mid_block_attentions_0_proj_in"


def tensors() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        f"{STEM}.lora_down.weight": torch.randn(2, 6, generator=chance),
        f"{STEM}.lora_up.weight": torch.randn(8, 2, generator=chance),
        f"{STEM}.alpha": torch.tensor(3.0),
    }


def written(path: Path, content: dict[str, Tensor], **metadata: str) -> Path:
    save_file(content, path, metadata or None)
    return path


def by_hand(path: Path, content: dict[str, Tensor], order: Callable[[str], Any], **metadata: str) -> Path:
    """A valid file with the tensors in an order of our own."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    body = b""
    for key in sorted(content, key=order):
        data = content[key].numpy().tobytes()
        shape = list(content[key].shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def test_the_header_does_not_count(tmp_path: Path) -> None:
    first = written(tmp_path / "a.safetensors", tensors())
    second = written(tmp_path / "b.safetensors", tensors(), ss_output_name="other", **{"modelspec.title": "Other"})
    third = by_hand(tmp_path / "c.safetensors", tensors(), lambda key: [-ord(sign) for sign in key], note="order")
    assert len({file.read_bytes() for file in (first, second, third)}) == 3
    assert len({reading.fingerprint(file) for file in (first, second, third)}) == 1


def changed(key: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    content = tensors()
    content[f"{STEM}.{key}"] = change(content[f"{STEM}.{key}"]).contiguous()
    return content


def flipped(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.view(torch.int32)[0, 0] ^= 1  # the last bit of one number
    return copy


@pytest.mark.parametrize(
    "content",
    [
        changed("alpha", lambda alpha: alpha + 1),
        changed("lora_up.weight", flipped),
        changed("lora_up.weight", torch.Tensor.half),
        changed("lora_down.weight", lambda down: down.reshape(2, 6, 1, 1)),
        {key.replace("proj_in", "proj_out"): tensor for key, tensor in tensors().items()},
        {key: tensor for key, tensor in tensors().items() if not key.endswith("alpha")},
        {**tensors(), "word": torch.ones(3)},
    ],
    ids=["alpha", "one bit", "dtype", "shape", "name", "no alpha", "an extra"],
)
def test_what_the_adapter_computes_with_counts(content: dict[str, Tensor], tmp_path: Path) -> None:
    first = written(tmp_path / "a.safetensors", tensors())
    second = written(tmp_path / "b.safetensors", content)
    assert reading.fingerprint(first) != reading.fingerprint(second)


def folder(path: Path, **settings: Any) -> Path:
    path.mkdir()
    content = {
        f"base_model.model.{key.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}": tensor
        for key, tensor in tensors().items()
        if not key.endswith("alpha")
    }
    save_file(content, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_settings_count_as_far_as_they_change_the_delta(tmp_path: Path) -> None:
    plain = reading.fingerprint(folder(tmp_path / "plain"))
    same = {
        "words": {"base_model_name_or_path": "x", "lora_dropout": 0.5, "inference_mode": True, "task_type": "X"},
        "pattern": {"alpha_pattern": {".*proj_in": 4}, "lora_alpha": 99},
        "r": {"r": 16},
    }
    for name, settings in same.items():
        assert reading.fingerprint(folder(tmp_path / name, **settings)) == plain, name
    other = {
        "alpha": {"lora_alpha": 5},
        "rslora": {"use_rslora": True},
        "pattern2": {"alpha_pattern": {".*proj_in": 5}},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "type": {"peft_type": "SOMETHING"},
    }
    found = {name: reading.fingerprint(folder(tmp_path / name, **settings)) for name, settings in other.items()}
    assert plain not in found.values()
    assert found["alpha"] == found["pattern2"]


def test_scale_one_is_the_same_with_and_without_a_configuration(tmp_path: Path) -> None:
    place = folder(tmp_path / "one", lora_alpha=2)
    alone = written(tmp_path / "alone.safetensors", load_file(place / "adapter_model.safetensors"))
    assert reading.fingerprint(place) == reading.fingerprint(alone)


def test_canonical_bytes_are_the_same_adapter(tmp_path: Path) -> None:
    sources = [
        folder(tmp_path / "peft", alpha_pattern={".*proj_in": 5}),
        written(tmp_path / "kohya.safetensors", tensors(), ss_output_name="ünïcödé ☃", **{"modelspec.title": "Snow"}),
    ]
    for number, source in enumerate(sources):
        header, chunks = reading.canonical(source)
        content = b"".join([header, *chunks])
        blob = tmp_path / f"{number:064x}"
        blob.write_bytes(content)
        assert set(open_tensors(blob).metadata) == {"lorahub.source"}
        assert reading.fingerprint(blob) == reading.fingerprint(source)
        one, other = reading.read(source), reading.read(blob)
        assert set(one.modules) == set(other.modules)
        for name in one.modules:
            assert torch.equal(one.modules[name].dense(), other.modules[name].dense())
        first, second = reading.inspect(source), reading.inspect(blob)
        told = ("format", "base", "base_from", "ranks", "modules", "mergeable", "title", "metadata", "scales")
        assert [getattr(first, name) for name in told] == [getattr(second, name) for name in told]
        # canonical bytes are a fixed point, and equal in every process
        again, pieces = reading.canonical(blob)
        assert b"".join([again, *pieces]) == content
        assert load_file(blob).keys() == open_tensors(blob).tensors.keys()


def test_canonical_bytes_do_not_depend_on_the_order_on_disk(tmp_path: Path) -> None:
    one = by_hand(tmp_path / "a.safetensors", tensors(), lambda key: key, b="2", a="1")
    other = by_hand(tmp_path / "b.safetensors", tensors(), lambda key: [-ord(sign) for sign in key], a="1", b="2")
    first, second = (b"".join([header, *chunks]) for header, chunks in map(reading.canonical, (one, other)))
    assert first == second


@pytest.mark.parametrize("value", ["[]", "{", '{"metadata": [1]}', '{"metadata": {"a": 1}}', '{"config": "x"}', "7"])
def test_a_blob_with_another_ones_words_is_refused(value: str, tmp_path: Path) -> None:
    path = written(tmp_path / "blob.safetensors", tensors(), **{"lorahub.source": value})
    with pytest.raises(FormatError, match=r"blob\.safetensors"):
        reading.inspect(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    content = tensors()
    content[f"{STEM}.lora_up.weight"][5, 1] = bad
    content = {key: tensor.to(dtype) for key, tensor in content.items() if not key.endswith("alpha")}
    path = written(tmp_path / "bad.safetensors", content)
    for refuse in (reading.fingerprint, reading.examine):
        with pytest.raises(FormatError, match="NaN or Inf"):
            refuse(path)
    assert reading.inspect(path).modules == 1  # its header is in order


def test_a_nan_in_alpha_or_an_extra_is_refused_too(tmp_path: Path) -> None:
    for key in (f"{STEM}.alpha", "word"):
        path = written(tmp_path / "bad.safetensors", {**tensors(), key: torch.tensor([float("nan")])})
        with pytest.raises(FormatError, match="NaN or Inf"):
            reading.fingerprint(path)
    path = written(tmp_path / "bad.safetensors", {**tensors(), f"{STEM}.alpha": torch.tensor(float("nan"))})
    with pytest.raises(FormatError, match="alpha"):
        reading.inspect(path)


def test_empty_extras_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {**tensors(), "nothing": torch.zeros(0, 4)})
    assert reading.read(path).extras["nothing"].shape == (0, 4)
    assert reading.fingerprint(path)
