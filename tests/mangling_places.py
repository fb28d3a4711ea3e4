"""Hostile surroundings of an adapter: configurations, cards, sidecars, odd files and pickles. Part of `mangling`."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

from mangling_headers import ODD, entries, good, packed, peft, put

PATTERNS = ["(a+)+$", "(.*)*x", "(a|a)" * 40, "a?" * 50, "(", "[", "(?P<n>a)(?P=n)", "x{99999999999}", ".*" * 30, "\\"]


# --- directories --------------------------------------------------------------------------------------------------


def config(**settings: Any) -> dict[str, Any]:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "b"}
    return {**plain, **settings}


def directory(folder: Path, settings: bytes | dict[str, Any]) -> Path:
    text = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    put(folder / "adapter", packed(*entries(peft())), "adapter_model.safetensors")
    put(folder / "adapter", text, "adapter_config.json")
    return folder / "adapter"


def wrong_config_text(chance: random.Random, folder: Path) -> Path:
    texts = [
        b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"[" * 200_000, b'{"r":' + b"9" * 6000 + b"}",
        b"{}" + b" " * (17 * 1024 * 1024), json.dumps(config()).encode()[: chance.randrange(60)], b'{"a": "\\ud800"}',
    ]  # fmt: skip
    return directory(folder, chance.choice(texts))


def wrong_config_value(chance: random.Random, folder: Path) -> Path:
    keys = """r lora_alpha rank_pattern alpha_pattern use_rslora use_dora peft_type target_modules init_lora_weights
        base_model_name_or_path fan_in_fan_out modules_to_save layer_replication alpha lora_parameters task_type"""
    settings = {key: chance.choice(ODD) for key in chance.sample(keys.split(), chance.randint(1, 3))}
    if chance.random() < 0.3:
        settings["peft_type"] = chance.choice(["LOHA", "LOKR", "IA3", "ADALORA", "lora", "\x1b[31m", "X" * 5000])
    return directory(folder, config(**settings))


def wrong_pattern(chance: random.Random, folder: Path) -> Path:
    table = {chance.choice([*PATTERNS, "q", "layers.0.q"]): chance.choice([1, 8, *ODD]) for _ in range(4)}
    return directory(folder, config(**{chance.choice(["alpha_pattern", "rank_pattern"]): table}))


def many_patterns(chance: random.Random, folder: Path) -> Path:
    count = chance.choice([100, 1_000, 20_000])
    return directory(folder, config(alpha_pattern={f"layers.{n}.{chance.random()}": 1 for n in range(count)}))


def strange_card(chance: random.Random, folder: Path) -> Path:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    heads = [
        bomb + "base_model: *a29\ntags: *a29\ninstance_prompt: *a29", "a: 2024-99-99", "base_model: !!timestamp x",
        "tags: 7", "base_model: {a: b}", "[" * 3000, "? [1]\n: 2", "base_model: !!python/object:os.system {}",
        "tags: [1, null, {a: b}]", "base_model: [[x]]", "\x1b: \x07", "a: &a [*a]", "base_model: \ud800",
    ]  # fmt: skip
    bodies = ["<!--" * 50_000, "[" * 100_000, "```" * 9999, "# T\n" * 9999, "|" * 90_000, "\0\x1b[2J", "![a](" * 20_000]
    text = f"---\n{chance.choice(heads)}\n---\n{chance.choice(bodies)}"
    path = directory(folder, config())
    put(path, text.encode("utf-8", "surrogatepass"), "README.md")
    return path


def strange_sidecar(chance: random.Random, folder: Path) -> Path:
    keys = ["trainedWords", "tags", "model", "civitai", "description", "notes", "base_model", "name", "activation text"]
    data: Any = {key: chance.choice([*ODD, "<" * 90_000, {"tags": 7}, ["a", 1]]) for key in chance.sample(keys, 5)}
    path = put(folder, packed(*good(chance)))
    ending = chance.choice([".metadata.json", ".civitai.info", ".json"])
    text = chance.choice([json.dumps(data).encode(), b"[" * 90_000, b"\xff", b"7"])
    put(folder, text, f"mangled{ending}")
    return path


def strange_file(chance: random.Random, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, kind = folder / "odd.safetensors", chance.randrange(11)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("nowhere")
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind == 5:
        (folder / "a").mkdir()
        (folder / "a" / "b").symlink_to(folder)
        return put(folder / "a", packed(*good(chance)))
    elif kind == 6:
        put(folder, b"", path.name)
    elif kind == 7:
        put(folder / "adapter", json.dumps(config()).encode(), "adapter_config.json")
        return folder / "adapter"
    elif kind == 8:
        (folder / "adapter" / "adapter_config.json").mkdir(parents=True)
        put(folder / "adapter", packed(*entries(peft())), "adapter_model.safetensors")
        return folder / "adapter"
    elif kind == 9:
        path = folder / ("n" * 300)  # no file system holds such a name
    else:
        return put(folder, packed(*good(chance)), "li\nne\x1b[31m.safetensors")
    return path


# --- pickles ------------------------------------------------------------------------------------------------------


class Malicious:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


def mangled_pickle(chance: random.Random, folder: Path) -> Path:
    import torch

    state = {key: torch.from_numpy(value.copy()) for key, value in peft().items()}
    path = put(folder, b"", "adapter.bin")
    torch.save(state, path, _use_new_zipfile_serialization=chance.random() < 0.5)
    data = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        return put(folder, bytes(data[: chance.randrange(len(data))]), path.name)
    for _ in range(chance.randint(1, 5)):
        data[chance.randrange(min(len(data), 3000))] = chance.randrange(256)
    return put(folder, bytes(data), path.name)


def evil_pickle(chance: random.Random, folder: Path) -> Path:
    import torch

    mark = folder.parent / "owned"
    state: dict[Any, Any] = {key: torch.from_numpy(value.copy()) for key, value in peft().items()}
    name = "base_model.model.layers.0.q.lora_A.weight"
    evils: list[Any] = [
        Malicious(f"touch {mark}"), {**state, "x": Malicious(f"touch {mark}")}, {"state_dict": Malicious("true")},
        {**state, name: torch.ones(1).expand(2**20, 2**20)}, {**state, name: torch.eye(3).to_sparse()},
        {**state, name: torch.ones(2, 6, dtype=torch.complex64)}, {**state, name: torch.ones(2, 6, device="meta")},
        {**state, name: torch.ones(2, 6, dtype=torch.int8)}, {**state, "\ud800": torch.ones(2)}, {**state, 7: 8},
        {**state, "a\n\x1b": torch.ones(1)}, [], {}, None, 7, "x", [1, torch.ones(2)], state[name], [state[name]] * 3,
        {**state, "base_model.model.layers.0.q.alpha": torch.ones(3)}, {"state_dict": state}, {"state_dict": 7},
        {**state, name: torch.nn.Parameter(torch.ones(2, 6))}, {**state, name: torch.ones(6, 2).T},
    ]  # fmt: skip
    path = put(folder, b"", chance.choice(["adapter.bin", "adapter.pt", "adapter.CKPT"]))
    if chance.random() < 0.1:
        return put(folder, pickle.dumps(Malicious(f"touch {mark}")), path.name)
    torch.save(chance.choice(evils), path)
    return path
