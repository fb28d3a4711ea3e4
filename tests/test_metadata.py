"""What an adapter says of itself: header, configuration, card and sidecars, and what base it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.bases import family, from_metadata, from_shapes, same_base
from lorahub.hub.reading import Inspection
from safetensors.torch import save_file

STEM = "lora_unet_mid_block_attentions_0_proj_in"


def kohya(folder: Path, name: str = "made.safetensors", **metadata: Any) -> Inspection:
    """A file with these header entries; `__` in a name stands for a dot, values that are no text become JSON."""
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 6), f"{STEM}.lora_up.weight": torch.ones(8, 2)}
    texts = {key.replace("__", "."): v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}
    save_file(tensors, folder / name, texts or None)
    return reading.inspect(folder / name)


def peft(folder: Path, card: str = "", **settings: Any) -> Inspection:
    """A PEFT directory with a model card."""
    tensors = {"base_model.model.layers.0.q.lora_A.weight": torch.ones(2, 6)}
    tensors["base_model.model.layers.0.q.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return reading.inspect(folder)


def test_kohya_and_modelspec_entries(tmp_path: Path) -> None:
    found = kohya(
        tmp_path,
        modelspec__title="Watercolour",
        modelspec__description="Soft washes.",
        modelspec__usage_hint="Use at 0.7",
        modelspec__trigger_phrase="wtrclr, wet on wet",
        modelspec__tags="style, painting",
        ss_output_name="watercolour_v3",
        ss_training_comment="trigger words: paper texture",
        ss_tag_frequency={
            "10_a": {"lighthouse": 3, "boat": 9, " boat ": 2},
            "5_b": {"lighthouse": 9, "odd\\(one\\)": 1},
        },
        ss_sd_model_name="v1-5-pruned.safetensors",
        custom_entry="kept",
    )
    assert found.title == "Watercolour"
    assert found.description == "Soft washes. Use at 0.7 trigger words: paper texture"
    assert found.triggers == ("wtrclr", "wet on wet", "paper texture")
    assert found.tags == ("style", "painting", "lighthouse", "boat", "odd(one)")
    assert (found.base, found.base_from) == ("sd-1", "guessed from header's ss_sd_model_name 'v1-5-pruned.safetensors'")
    assert found.metadata["custom_entry"] == "kept"
    assert json.loads(found.metadata["ss_tag_frequency"])["10_a"]["boat"] == 9


def test_words_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    found = kohya(
        tmp_path, ss_output_name="last", ss_training_comment="None", modelspec__tags=" , ;", ss_tag_frequency="null",
        ss_sd_model_name="None",
    )  # fmt: skip
    assert (found.title, found.description, found.triggers, found.tags) == (None, "", (), ())


def test_only_the_most_frequent_tags_are_kept(tmp_path: Path) -> None:
    counts = {f"tag{number:03d}": number for number in range(100)}
    found = kohya(tmp_path, ss_tag_frequency={"a": counts})
    assert found.tags[:2] == ("tag099", "tag098")
    assert len(found.tags) == 24


@pytest.mark.parametrize(
    "value",
    [
        "{", "[" * 9999, "7", '{"a": 7}', '{"a": {"b": NaN}}', '{"a": {"b": 1e999}}', '{"a": {"b": "x", "c": [1]}}',
        '{"a": {"\\ud800": 1}}', '{"a": {"": 5}}',
    ],
)  # fmt: skip
def test_tag_tables_that_make_no_sense_do_no_harm(value: str, tmp_path: Path) -> None:
    found = kohya(tmp_path, ss_tag_frequency=value, modelspec__title="T")
    assert found.title == "T"
    assert all(tag.isprintable() for tag in found.tags)


CARD = """---
base_model: org/base
tags:
- lora
- text-generation
instance_prompt: a photo of sks dog
widget:
- text: hi
---
<!-- a remark
over two lines -->
# A title

Too short.

It answers [questions](https://example.org) about **ships** and
harbours.

## Use

```python
print("not prose")
```
More prose after a heading.

| a | table |
|---|---|
![picture](x.png)
"""


def test_a_model_card(tmp_path: Path) -> None:
    found = peft(tmp_path, CARD)
    assert found.title == "A title"
    assert found.description == "It answers questions about **ships** and harbours."
    assert found.tags == ("lora", "text-generation")
    assert found.triggers == ("a photo of sks dog",)
    assert (found.base, found.base_from) == ("org/base", "model card")


@pytest.mark.parametrize(
    ("head", "base"),
    [
        ("base_model: a/b", "a/b"), ("base_model: [a/b, c/d]", "a/b"), ("base_model:\n- a/b\n- c", "a/b"),
        ("base_model: null", None), ("base_model: ~", None), ("base_model:", None), ("base_model: {a: b}", None),
        ("base_model: [[a]]", None), ("base_model: 'q'", "q"), ("base_model: 2024-13-45", "2024-13-45"),
        ("tags: null\ninstance_prompt: null", None), ("tags: x", None), ("[1, 2]", None), ("{", None),
        ("a: !!python/object:os.system {}", None), ("a: *b", None), ("\x1b: \x07", None), ("[" * 3000, None),
        ("base_model: a/b\nx: " + "y" * 5000, "a/b"), ("base_model: a/b\n" + "- [x]\n" * 1500, None),
    ],
)  # fmt: skip
def test_the_head_of_a_card(head: str, base: str | None, tmp_path: Path) -> None:
    found = peft(tmp_path, f"---\n{head}\n---\n# Title\nsome prose of five words")
    assert found.base == base
    assert (found.title, found.description) == ("Title", "some prose of five words")
    assert found.triggers == ()
    assert found.tags in {(), ("x",)}


def test_a_bomb_in_a_card_does_not_go_off(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    found = peft(tmp_path, f"---\n{bomb}base_model: *a39\ntags: *a39\ninstance_prompt: *a39\n---\n")
    assert (found.base, found.tags, found.triggers) == (None, (), ())


def test_the_template_that_peft_writes_is_no_description(tmp_path: Path) -> None:
    found = peft(tmp_path, "---\nbase_model: x\n---\n# Model Card for Model ID\n[More Information Needed]\n")
    assert (found.title, found.description, found.base) == (None, "", "x")


def test_the_configuration_speaks_before_the_card(tmp_path: Path) -> None:
    found = peft(tmp_path, CARD, base_model_name_or_path="the/real-one")
    assert (found.base, found.base_from) == ("the/real-one", "adapter_config.json")
    for odd in (None, "", 7, ["a", "b"], {}):
        assert peft(tmp_path, "", base_model_name_or_path=odd).base in {None, "a"}


def test_a_readme_beside_a_single_file_is_not_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A collection\nof many adapters")
    found = kohya(tmp_path)
    assert (found.title, found.description) == (None, "")


SIDECARS = {
    ".metadata.json": {
        "model_name": "Neon", "modelDescription": "<p>Bright &amp; loud</p>", "base_model": "SDXL 1.0",
        "tags": ["style", "night"], "civitai": {"trainedWords": ["nnlght", "neon, glow"]}, "notes": "at 0.8",
    },
    ".civitai.info": {
        "name": "v2", "model": {"name": "Neon", "tags": ["style"]}, "trainedWords": ["nnlght"], "baseModel": "SDXL 1.0",
        "description": None,
    },
    ".json": {"activation text": "nnlght, glow", "preferred weight": 0.7, "notes": "at 0.8"},
}  # fmt: skip


@pytest.mark.parametrize("ending", SIDECARS)
def test_sidecars_are_read_and_never_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"made{ending}"
    path.write_text(json.dumps(SIDECARS[ending]))
    before = path.read_bytes(), path.stat().st_mtime_ns
    found = kohya(tmp_path, modelspec__trigger_phrase="from the header")
    assert found.triggers[0] == "nnlght"
    assert found.triggers[-1] == "from the header"
    if ending != ".json":
        assert (found.title, found.base, found.base_from) == ("Neon", "SDXL 1.0", "sidecar")
        assert "style" in found.tags
    if ending != ".civitai.info":
        assert "at 0.8" in found.description
        assert "<p>" not in found.description
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "key", ["trainedWords", "tags", "model", "civitai", "notes", "base_model", "name", "description"]
)
@pytest.mark.parametrize("value", [7, 1.5, True, None, {}, {"a": 1}, [], [None, 7, ["x"], {"y": 1}], "", "<" * 50_000])
def test_sidecars_that_make_no_sense_do_no_harm(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "made.json").write_text(json.dumps({key: value}))
    assert kohya(tmp_path, modelspec__title="T").modules == 1


def test_words_are_kept_short_and_on_one_line(tmp_path: Path) -> None:
    found = kohya(
        tmp_path,
        modelspec__title="a\x1b[31m red\n title " + "x" * 5000,
        modelspec__description="one\n\n  two\x07 three " + "y" * 9000,
        modelspec__trigger_phrase="\x1b[2Jgone\x07word, " + ", ".join(f"w{n}" for n in range(1000)),
        ss_base_model_version="z" * 5000,
    )
    assert (found.title or "").startswith("a [31m red title xxx")
    assert len(found.title or "") == 200
    assert found.description.startswith("one two three yyy")
    assert len(found.description) == 2000
    assert found.triggers[0] == "[2Jgone word"
    assert len(found.triggers) == 100
    assert len(found.base or "") == 200
    for text in (found.title or "", found.description, *found.triggers, found.base or "", found.base_from or ""):
        assert text.isprintable()


# --- bases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd-1", True),
        ("sd_v1", "stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl_base_v1-0", True), ("SDXL 1.0", "sdxl", True),
        ("black-forest-labs/FLUX.1-dev", "flux1", True), ("FLUX.1-dev", "FLUX.2-dev", False), ("sd-1", "sdxl", False),
        ("stable-diffusion-xl-v1-base/lora", "sdxl", True), ("flux-1-dev/lora", "flux-1", True),
        ("SD 1.5", "sd-1", True),
        ("stable-diffusion-2-1", "sd-1", False), ("gpt2", "openai-community/gpt2", True),
        ("gpt2", "gpt2-medium", False),
        ("/models/bert-base", "bert-base", True), ("C:\\models\\bert-base\\", "bert-base", True), (None, "sdxl", True),
        ("models--org--bert-base", "bert-base", True), ("meta-llama/Llama-3.1-8B", "llama-3.1-8b", True),
        ("stable-diffusion-3-medium", "sd-1", False), ("Pony", "SDXL 1.0", True), ("SD 2.1", "sd-2", True),
        ("stable-diffusion-v1/lora", "sd_v1", True), ("SD 3.5 Large", "sd-3", True), ("Illustrious", "sdxl", True),
    ],
)  # fmt: skip
def test_names_of_one_base(one: str | None, other: str, same: bool) -> None:
    assert same_base(one, other) is same
    assert same_base(other, one) is same


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"), ({"ss_base_model_version": "sd_v1"}, "sd-1"),
        ({"ss_base_model_version": "flux1"}, "flux-1"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd-1"),
        ({"modelspec.architecture": "wan-2.1"}, "wan-2.1"), ({"ss_sd_model_name": "myModel_v10.safetensors"}, None),
        ({"ss_sd_model_name": "animefull-final"}, "sd-1"), ({"ss_v2": "True"}, "sd-2"), ({"ss_v2": "False"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_base_from_the_header(metadata: dict[str, str], name: str | None) -> None:
    found = from_metadata(metadata)
    assert found.name == name
    assert (found.origin is None) is (name is None)


@pytest.mark.parametrize(
    ("module", "inputs", "outputs", "name"),
    [
        ("unet.a.attn2.to_k", 768, 320, "sd-1"), ("unet.a.attn2.to_k", 1024, 320, "sd-2"),
        ("unet.a.attn2.to_v", 2048, 320, "sdxl"), ("unet.a.attn1.to_k", 768, 320, None),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072, "flux-1"),
        ("image_encoder.blocks.0.attn.qkv.q", 768, 768, "sam-vit-b"), ("image_encoder.blocks.0.attn.qkv.q", 7, 7, None),
        ("transformer.h.0.attn.c_attn", 768, 2304, "gpt2"), ("h.3.attn.c_attn", 1600, 4800, "gpt2-xl"),
        ("transformer.h.0.attn.c_attn", 768, 768, None), ("model.layers.0.self_attn.q_proj", 4096, 4096, None),
    ],
)  # fmt: skip
def test_a_base_from_shapes_says_that_it_is_guessed(module: str, inputs: int, outputs: int, name: str | None) -> None:
    found = from_shapes([(module, inputs, outputs)])
    assert found.name == name
    assert name is None or (found.origin or "").startswith("guessed from")


def test_family_of_any_text_is_quick_and_harmless() -> None:
    for text in ("", "/", "\\", " ", "-" * 10_000, "xl-" * 5000, "sd" * 5000, "\ud800"):
        assert isinstance(family(text), str)
