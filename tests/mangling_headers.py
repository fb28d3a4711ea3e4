"""Damaged and hostile safetensors files: each function writes one sample and returns its path. Part of `mangling`."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

Content = dict[str, np.ndarray[Any, Any]]
ODD: list[Any] = [
    None, True, -1, 0, 2**62, 2**64, 10**400, 1.5, float("nan"), float("inf"), "", "x", "\x1b[2J", "\n", [], {}, [None],
    {"a": {"b": []}}, [[1, 2], [3]], "\ud800", "../../etc/passwd", "9" * 5000,
]  # fmt: skip
NAMES = [
    "../../../../etc/passwd.lora_A.weight", "/etc/shadow.lora_A.weight", "a\0b.lora_A.weight", "a\nb.lora_A.weight",
    "\x1b]0;title\x07.lora_A.weight", "x" * 20_000 + ".lora_A.weight", "", ".", ".lora_A.weight", "\ud800.lora_A",
    "\u202egnp.lora_A.weight", "__metadata__", "lora_unet_.lora_down.weight", "base_model.model..lora_A.weight",
    "unet:99999999999999999999:up", "w_a_000", "C:\\evil.lora_A.weight", "%s%n{0}.lora_A.weight", "lora_unet_" * 200,
    "transformer.double_blocks.0.img_attn.qkv.٣.lora_A.weight", "unet.input_blocks.99999.1.x.lora_A.weight",
]  # fmt: skip


def kohya() -> Content:
    """A small, good file: LoRA, a convolution, LoHa and LoKr."""
    chance = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray[Any, Any]:
        return chance.standard_normal(shape).astype("<f4")

    stem = "lora_unet_mid_block_attentions_0_"
    return {
        f"{stem}proj_in.lora_down.weight": some(2, 6), f"{stem}proj_in.lora_up.weight": some(8, 2),
        f"{stem}proj_in.alpha": some(), "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": some(2, 4, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": some(6, 2, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": some(2, 2, 3, 3),
        f"{stem}a.hada_w1_a": some(8, 2), f"{stem}a.hada_w1_b": some(2, 6), f"{stem}a.hada_w2_a": some(8, 2),
        f"{stem}a.hada_w2_b": some(2, 6), f"{stem}b.lokr_w1": some(2, 3), f"{stem}b.lokr_w2_a": some(4, 2),
        f"{stem}b.lokr_w2_b": some(2, 2), f"{stem}b.alpha": some(1), "extra": some(3),
    }  # fmt: skip


def peft() -> Content:
    """Good tensors of a PEFT directory, an embedding among them."""
    chance = np.random.default_rng(1)
    stem = "base_model.model.layers"
    shapes = {
        f"{stem}.0.q.lora_A.weight": (2, 6), f"{stem}.0.q.lora_B.weight": (8, 2), f"{stem}.1.q.lora_A.weight": (2, 6),
        f"{stem}.1.q.lora_B.weight": (8, 2), "base_model.model.words.lora_embedding_A": (2, 9),
        "base_model.model.words.lora_embedding_B": (6, 2), "base_model.model.score.weight": (2, 6),
    }  # fmt: skip
    return {key: chance.standard_normal(shape).astype("<f4") for key, shape in shapes.items()}


def entries(content: Content) -> tuple[dict[str, Any], bytes]:
    """Header and body of a good file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "ss_output_name": "made"}}
    body = b""
    for key, value in content.items():
        data = value.tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        body += data
    return header, body


def packed(header: Any, body: bytes) -> bytes:
    """The bytes of a file; `header` may be text already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def good(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    return entries(kohya() if chance.random() < 0.6 else peft())


def put(folder: Path, data: bytes, name: str = "mangled.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


# --- bytes --------------------------------------------------------------------------------------------------------


def truncated(chance: random.Random, folder: Path) -> Path:
    data = packed(*good(chance))
    return put(folder, data[: chance.randrange(len(data))])


def length_lies(chance: random.Random, folder: Path) -> Path:
    data = packed(*good(chance))
    length = struct.unpack("<Q", data[:8])[0]
    lie = chance.choice([0, 1, length - 1, length + 1, length - 40, length + 400, len(data), 2**32, 2**63, 2**64 - 1])
    return put(folder, struct.pack("<Q", lie) + data[8:])


def flipped_bytes(chance: random.Random, folder: Path) -> Path:
    data = bytearray(packed(*good(chance)))
    end = 8 + struct.unpack("<Q", data[:8])[0] if chance.random() < 0.8 else len(data)
    for _ in range(chance.randint(1, 6)):
        data[chance.randrange(end)] = chance.randrange(256)
    return put(folder, bytes(data))


def shifted(chance: random.Random, folder: Path) -> Path:
    data, place = packed(*good(chance)), chance.randrange(2000)
    more = chance.randbytes(chance.randint(1, 50))
    return put(folder, data[:place] + more + data[place + chance.choice([0, len(more)]) :])


def no_header(chance: random.Random, folder: Path) -> Path:
    body = good(chance)[1]
    texts = [
        b"", b"[]", b"null", b"7", b'"x"', b"{", b"[" * 200_000, b'{"a":' * 100_000, "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}", b"{}" + b" " * 9000, chance.randbytes(500), b'{"a":' + b"9" * 6000 + b"}",
        b'{"__metadata__":{"a":"1","a":"2"}}', b'{"x":1,"x":2}', b'{"__metadata__":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ]  # fmt: skip
    return put(folder, packed(chance.choice(texts), chance.choice([b"", body])))


def huge_header(chance: random.Random, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, size = folder / "huge.safetensors", chance.choice([30, 99, 101, 2000]) * 1024 * 1024
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size) + b'{"a' + bytes([chance.choice([0, 32, 34])]))
        file.truncate(size + 8)  # a hole: takes no room on the disk
    return path


# --- headers ------------------------------------------------------------------------------------------------------


def wrong_entry(chance: random.Random, folder: Path) -> Path:
    header, body = good(chance)
    key = chance.choice([name for name in header if name != "__metadata__"])
    field = chance.choice(["dtype", "shape", "data_offsets", None])
    if field is None:
        header[key] = chance.choice(ODD)
    elif chance.random() < 0.2:
        del header[key][field]
    else:
        header[key][field] = chance.choice([*ODD, ["F32"], "BF16", "F8_E4M3", "I32", "BOOL", [0, 0], [6, 2], [1] * 300])
    return put(folder, packed(header, body))


def wrong_offsets(chance: random.Random, folder: Path) -> Path:
    header, body = good(chance)
    keys = [name for name in header if name != "__metadata__"]
    one, other = chance.sample(keys, 2)
    change = chance.randrange(6)
    first, last = header[one]["data_offsets"]
    if change == 0:
        header[one]["data_offsets"] = header[other]["data_offsets"]  # overlap
    elif change == 1:
        header[one]["data_offsets"] = [first + 4, last + 4]
    elif change == 2:
        header[one]["data_offsets"] = [last, first]
    elif change == 3:
        del header[one]  # a hole
    elif change == 4:
        header[one]["data_offsets"] = [chance.choice(ODD), chance.choice(ODD)]
    else:
        body += chance.randbytes(8)
    return put(folder, packed(header, body))


def wrong_shape(chance: random.Random, folder: Path) -> Path:
    """Offsets that agree with the shape, and a shape that makes no sense for the tensor's role."""
    content = kohya() if chance.random() < 0.6 else peft()
    key = chance.choice(list(content))
    size = content[key].size
    shapes = [(size,), (1, size), (size, 1), (0, size), (size, 0, 2**40), (1,) * 40, (), (1, 1, size, 1), (0,), (3, 3)]
    shape = chance.choice(shapes)
    header, body = entries({name: value for name, value in content.items() if name != key})
    data = content[key].ravel()[: math.prod(shape)].tobytes()
    header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
    return put(folder, packed(header, body + data))


def wrong_dtype(chance: random.Random, folder: Path) -> Path:
    header, body = good(chance)
    kinds = {"I32": 1, "U32": 1, "BF16": 2, "F16": 2, "I16": 2, "U8": 4, "BOOL": 4, "F8_E5M2": 4, "F8_E4M3": 4}
    for key in chance.sample([name for name in header if name != "__metadata__"], 3):
        dtype = chance.choice(list(kinds))
        shape = header[key]["shape"]
        if shape:
            header[key] |= {"dtype": dtype, "shape": [*shape[:-1], shape[-1] * kinds[dtype]]}
    return put(folder, packed(header, body))


def wrong_name(chance: random.Random, folder: Path) -> Path:
    header, body = good(chance)
    old = chance.choice([name for name in header if name != "__metadata__"])
    name = chance.choice(NAMES)
    return put(folder, packed({name if key == old else key: value for key, value in header.items()}, body))


def half_a_pair(chance: random.Random, folder: Path) -> Path:
    content = kohya() if chance.random() < 0.6 else peft()
    for key in chance.sample(list(content), chance.randint(1, 4)):
        del content[key]
    return put(folder, packed(*entries(content)))


def doubled_module(chance: random.Random, folder: Path) -> Path:
    content = kohya()
    stem = chance.choice(["unet.mid_block.attentions.0.proj_in", "diffusion_model.middle_block.1.proj_in", "x"])
    content |= {f"{stem}.lora_A.weight": content["extra"][None], f"{stem}.lora_B.weight": content["extra"][:, None]}
    return put(folder, packed(*entries(content)))


def not_finite(chance: random.Random, folder: Path) -> Path:
    content = kohya() if chance.random() < 0.6 else peft()
    value = content[chance.choice(list(content))]
    value.flat[chance.randrange(value.size)] = chance.choice([math.nan, math.inf, -math.inf])
    return put(folder, packed(*entries(content)))


def strange_alpha(chance: random.Random, folder: Path) -> Path:
    content = kohya()
    values = ([], [1, 2], [[1], [2]], math.nan, math.inf, -3, 0, 1e38, 1e-38, [[[4.0]]])
    content["lora_unet_mid_block_attentions_0_proj_in.alpha"] = np.array(chance.choice(values), "<f4")
    return put(folder, packed(*entries(content)))


def bomb(chance: random.Random, folder: Path) -> Path:
    """A small file whose factors, once multiplied out, would fill any memory."""
    n = chance.choice([2_000, 50_000])
    column, row = np.ones((n, 1), "<f4"), np.ones((1, n), "<f4")
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    choices: list[Content] = [
        {f"{stem}.lokr_w1": np.ones((300, 300), "<f4"), f"{stem}.lokr_w2": np.ones((300, 300), "<f4")},
        {f"{stem}.lokr_w1_a": column, f"{stem}.lokr_w1_b": row, f"{stem}.lokr_w2_a": column, f"{stem}.lokr_w2_b": row},
        {f"{stem}.hada_w{i}_{side}": np.ones((900, 900), "<f4") for i in (1, 2) for side in "ab"},
    ]
    return put(folder, packed(*entries(chance.choice(choices))))


def strange_metadata(chance: random.Random, folder: Path) -> Path:
    header, body = good(chance)
    keys = ["ss_tag_frequency", "lora_adapter_metadata", "lorahub.source", "modelspec.tags", "ss_training_comment"]
    keys += ["modelspec.title", "modelspec.description", "ss_base_model_version", "ss_sd_model_name", "ss_v2"]
    texts = [
        '{"a": {"b": NaN, "c": Infinity, "d": "x", "e": 1e999}, "f": 7, "g": [1]}', "[" * 50_000, "{", "[1]", "null",
        "\x1b[31m\x07 red \u202e", "x" * 3_000_000, ", " * 200_000, "trigger" * 1000 + " " * 3000, "<" * 100_000,
        '{"metadata": [1], "config": 3}', '{"config": {"peft_type": "LORA", "lora_alpha": "x"}}', '"\\ud800"',
        '{"unet.lora_alpha": {}, "unet.alpha_pattern": {"(a+)+": 1}}', '{"\\ud800": {"\\ud801": 3}}', "\0",
    ]  # fmt: skip
    odd = chance.random() < 0.2
    header["__metadata__"] = (
        chance.choice(ODD) if odd else {key: chance.choice(texts) for key in chance.sample(keys, 4)}
    )
    return put(folder, packed(header, body))
