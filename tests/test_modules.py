"""Laws of the manifest: a union of modules, blind to their order, that refuses other bases and shapes by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import FormatError, IncompatibleAdapters
from lorahub.index.modules import Manifest, kind_of
from making import BASE, Place, adapter, low_rank


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.transformer_blocks.11.attn1.to_q", "transformer.transformer_blocks.*.attn1.to_q"),
        ("unet.down_blocks.0.attentions.1.to_out.0", "unet.down_blocks.*.attentions.*.to_out.*"),
        ("h.3.attn.c_attn", "h.*.attn.c_attn"),
        ("layer.12", "layer.*"),
        ("attn1.conv2d.fc1", "attn1.conv2d.fc1"),
        ("words", "words"),
    ],
)
def test_a_kind_is_the_path_without_layer_numbers(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_manifest_is_the_union_of_modules_in_any_order() -> None:
    one, two = adapter("layer.0.query", "words"), adapter("layer.0.value", "words", seed=1)
    manifest = Manifest.of([one, two])
    assert [place.name for place in manifest.places] == ["layer.0.query", "layer.0.value", "words"]
    assert manifest == Manifest.of([two, one])
    assert manifest.base == "tiny"
    for place in manifest.places:
        assert (place.outputs, place.inputs) == (BASE[place.name].outputs, BASE[place.name].inputs)
    assert manifest.kinds == ("layer.*.query", "layer.*.value", "words")


def test_a_group_is_of_one_kind_and_one_shape() -> None:
    shapes = {"b.0.q": (8, 4), "b.1.q": (8, 4), "b.2.q": (6, 4), "b.0.v": (8, 4)}
    manifest = Manifest.of([Adapter({name: low_rank(Place(*shape), 2) for name, shape in shapes.items()})])
    named = [(group.kind, [manifest.places[row].name for row in group.rows]) for group in manifest.groups]
    assert sorted(named) == [("b.*.q", ["b.0.q", "b.1.q"]), ("b.*.q", ["b.2.q"]), ("b.*.v", ["b.0.v"])]
    for group in manifest.groups:
        assert {(manifest.places[r].inputs, manifest.places[r].outputs) for r in group.rows} == {group[1:3]}


def test_missing_and_unknown_modules_are_counted() -> None:
    manifest = Manifest.of([adapter("layer.0.query", "layer.0.value", "words")])
    fit = manifest.check(adapter("layer.0.query", "conv.wide", "conv.line"))
    assert (fit.known, fit.unknown, fit.missing) == (1, 2, 2)


def test_another_base_is_refused_by_name() -> None:
    manifest = Manifest.of([adapter()])
    with pytest.raises(IncompatibleAdapters, match=r"stray: is for gpt2, the encoder for tiny"):
        manifest.check(adapter(base="gpt2", called="stray"))
    with pytest.raises(IncompatibleAdapters, match="gpt2"):
        Manifest.of([adapter(), adapter(base="gpt2")])
    manifest.check(adapter(base=None))
    assert Manifest.of([adapter(base="stable-diffusion-v1-5")], "sd-1").check(adapter(base="stable-diffusion-v1-4"))


def test_another_shape_is_refused_by_the_modules_name() -> None:
    odd = Adapter({"layer.0.query": low_rank(Place(12, 18), 2)}, "tiny", meta={"name": "odd"})
    for refused in (lambda: Manifest.of([adapter(), odd]), lambda: Manifest.of([adapter()]).check(odd)):
        with pytest.raises(IncompatibleAdapters, match=r"odd: layer\.0\.query is 12x18, .* 12x17"):
            refused()


def test_an_adapter_that_shares_nothing_is_refused() -> None:
    manifest = Manifest.of([adapter("words")])
    for other in (adapter("conv.wide"), Adapter({}, "tiny")):
        with pytest.raises(IncompatibleAdapters, match="none of its"):
            manifest.check(other)
    for nothing in ([], [Adapter({}, "tiny")]):
        with pytest.raises(IncompatibleAdapters, match="at least one"):
            Manifest.of(nothing)


def test_json_brings_it_back() -> None:
    manifest = Manifest.of([adapter()])
    assert Manifest.from_json(json.loads(json.dumps(manifest.as_json()))) == manifest
    assert Manifest.from_json(replace(manifest, base=None).as_json()).base is None


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, {"places": []}, {"places": "x"}, {"places": [["a", 1]]}, {"places": [["a", 0, 1]]},
        {"places": [["a", 1.5, 1]]}, {"places": [[1, 1, 1]]}, {"base": 3, "places": [["a", 1, 1]]},
        {"places": [["a", 1, 1], ["a", 1, 1]]}, {"places": [["a", True, 1]]},
    ],
)  # fmt: skip
def test_other_data_is_no_manifest(data: object) -> None:
    with pytest.raises(FormatError, match="manifest"):
        Manifest.from_json(data)
