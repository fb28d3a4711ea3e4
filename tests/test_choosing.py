"""Which adapters a prompt asks for: by name, by trigger words, by what its words mean; one for each thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from concepts import CONCEPTS, concept_adapter, shelf
from lorahub.generate.choosing import SURE, UNASKED, choose, lacking_triggers
from lorahub.hub.catalog import Catalog
from lorahub.hub.entries import Entry
from lorahub.hub.errors import BadOption, RetrievalError
from lorahub.index.embed import fill, fill_encoded
from lorahub.index.encoders.text import TextEncoder, text
from lorahub.index.fitting import Example, fit
from lorahub.index.weight_encoder import WeightEncoder

LIBRARY = {
    "watercolor_v2": ("Watercolor", "Wet, pale colours that pool and run on rough paper.", "watercolor painting"),
    "pixel-art-lora": ("Pixel art", "A video game sprite of few, large pixels.", "pixel art sprite"),
    "pop-art": ("Pop art", "A screen print in four loud inks on a flat bright ground.", "pop art print"),
    "stained glass": ("Stained glass", "Pieces of bright glass between dark lead.", "stained glass window"),
    "oil": ("Oil painting", "Thick dabs of saturated oil paint on a brown canvas.", "impasto"),
    "fruit": ("Fruit", "Apples, pears, cherries and bananas.", "emoji fruit"),
    "sea-life": ("Sea life", "Fish, whales, crabs and other animals of the sea.", "emoji sea animal"),
    "vehicles": ("Vehicles", "Cars, buses, trains and ships seen from the side.", "emoji vehicle"),
    "complaints": ("Complaints", "Sorts letters of complaint by product.", ""),
}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return text()


@pytest.fixture
def library(lora: Callable[..., Path], tmp_path: Path, encoder: TextEncoder) -> Iterator[Catalog]:
    for seed, (name, (title, description, trigger)) in enumerate(LIBRARY.items()):
        lora(
            f"{name}.safetensors", seed, modelspec__title=title, modelspec__description=description,
            modelspec__trigger_phrase=trigger,
        )  # fmt: skip
    with Catalog(tmp_path / "home") as catalog:
        list(catalog.add([tmp_path / "library"]))
        fill(catalog, encoder)
        yield catalog


def anything(_: Entry) -> str | None:
    return None


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a watercolor fox", {"watercolor_v2"}),
        ("WATERCOLORS of a chair", {"watercolor_v2"}),
        ("pixel art of a table", {"pixel-art-lora"}),
        ("a whale in stained glass", {"stained glass", "sea-life"}),
        ("an impasto chair", {"oil"}),
        ("a truck", {"vehicles"}),
        ("pop art cherries", {"pop-art", "fruit"}),
        ("a chair", set()),
        ("a high quality picture of a dog", set()),
        ("blue", set()),
        ("?!", set()),
        ("", set()),
    ],
)
def test_a_prompt_gets_what_it_asks_for(library: Catalog, encoder: TextEncoder, prompt: str, wanted: set[str]) -> None:
    chosen, _ = choose(library, prompt, anything, encoder=encoder)
    assert {one.entry.name for one in chosen} == wanted


def test_a_word_of_a_long_list_is_asked_for(library: Catalog, encoder: TextEncoder, lora: Callable[..., Path]) -> None:
    listed = "Coat, scarf, gloves, socks, dress, kimono, sari, shorts, purse, satchel, sandal, boots, crown, ring."
    list(library.add([lora("wardrobe.safetensors", 50, modelspec__title="Garments", modelspec__description=listed)]))
    fill(library, encoder)
    for prompt, wanted in (("a purse", {"wardrobe"}), ("watercolor socks", {"watercolor_v2", "wardrobe"})):
        assert {one.entry.name for one in choose(library, prompt, anything, encoder=encoder)[0]} == wanted
    # near to the list, but not in it; in a description, but not what it is about
    for prompt in ("a turban", "rough ground"):
        assert not choose(library, prompt, anything, encoder=encoder)[0]


def test_names_come_first_and_say_why(library: Catalog, encoder: TextEncoder) -> None:
    chosen, spared = choose(library, "a whale in stained glass", anything, encoder=encoder)
    assert [(one.entry.name, one.score == 1.0) for one in chosen] == [("stained glass", True), ("sea-life", False)]
    assert chosen[0].why == ("named: stained glass",)
    assert chosen[1].why[0].startswith("whale: cosine 0.")
    assert {one.reason for one in spared} <= {UNASKED}


def test_words_that_name_an_adapter_ask_for_nothing_else(library: Catalog, encoder: TextEncoder) -> None:
    chosen, _ = choose(library, "pixel art", anything, encoder=encoder)
    assert [one.entry.name for one in chosen] == ["pixel-art-lora"]
    refused = {"pixel-art-lora"}
    chosen, spared = choose(
        library, "a pixel art sprite", lambda one: "is too old" if one.name in refused else None, encoder=encoder
    )
    assert "pixel-art-lora" not in {one.entry.name for one in chosen}
    assert [one.reason for one in spared if one.entry.name in refused] == ["is too old"]


def test_modes(library: Catalog, encoder: TextEncoder) -> None:
    def names(mode: str, prompt: str) -> set[str]:
        given = encoder if mode != "text" else None
        return {one.entry.name for one in choose(library, prompt, anything, mode=mode, encoder=given)[0]}

    assert names("text", "a truck, stained glass") == {"stained glass"}
    assert names("meaning", "stained glass") == {"stained glass"}
    assert names("meaning", "an impasto truck") >= {"vehicles"}
    for mode, error in (("weights", RetrievalError), ("guess", BadOption)):
        with pytest.raises(error):
            choose(library, "a truck", anything, mode=mode, encoder=encoder)


def test_limit_and_doubles(library: Catalog, encoder: TextEncoder, lora: Callable[..., Path]) -> None:
    prompt = "a watercolor of a whale, a truck and a pear in stained glass"
    assert len(choose(library, prompt, anything, limit=9, encoder=encoder)[0]) == 5
    chosen, spared = choose(library, prompt, anything, limit=2, encoder=encoder)
    assert {one.entry.name for one in chosen} == {"stained glass", "watercolor_v2"}
    assert {one.entry.name for one in spared if one.reason == "beyond --limit 2"} == {"sea-life", "vehicles", "fruit"}
    assert choose(library, prompt, anything, limit=0, encoder=encoder) == ([], [])
    with pytest.raises(BadOption, match="limit is -1"):
        choose(library, prompt, anything, limit=-1)

    list(library.add([lora("aquarelle.safetensors", 40, modelspec__title="Watercolors")]))
    fill(library, encoder)
    chosen, spared = choose(library, "a watercolor fox", anything, encoder=encoder)
    [style] = (one.entry.name for one in chosen)
    assert {"aquarelle", "watercolor_v2"} - {style} == {
        one.entry.name for one in spared if one.reason == f"{style} answers to the same words"
    }


def test_an_empty_catalogue_has_nothing(tmp_path: Path, encoder: TextEncoder) -> None:
    with Catalog(tmp_path / "empty") as catalog:
        assert choose(catalog, "a watercolor fox", anything, encoder=encoder) == ([], [])


def test_lacking_triggers() -> None:
    triggers = ("Watercolor painting", "wtrclr", "", "!!")
    assert lacking_triggers("watercolor  paintings of a fox", triggers) == ["wtrclr"]
    assert lacking_triggers("a painting, WTRCLR", triggers) == ["Watercolor painting"]
    assert lacking_triggers("", ()) == []


@pytest.fixture(scope="module")
def weights() -> WeightEncoder:
    """Fitted to other adapters of the four concepts."""
    examples = [Example(concept_adapter(n % 4, 500 + n), (CONCEPTS[n % 4],)) for n in range(20)]
    return fit("ridge", examples, text())


@pytest.fixture
def shelves(tmp_path: Path, encoder: TextEncoder, weights: WeightEncoder) -> Iterator[Catalog]:
    """Two adapters a concept: of watercolor and kittens both say nothing, of the others the first."""
    with Catalog(tmp_path / "home") as catalog:
        list(catalog.add(shelf(tmp_path / "shelf", 2, bare=(0, 4, 1, 2, 3, 7))))
        fill(catalog, encoder)
        fill_encoded(catalog, weights)
        yield catalog


def test_what_says_nothing_is_asked_for_by_what_it_does(
    shelves: Catalog, encoder: TextEncoder, weights: WeightEncoder
) -> None:
    def chosen(prompt: str, mode: str = "hybrid", given: Sequence[WeightEncoder] = (weights,)) -> set[str]:
        found, _ = choose(shelves, prompt, anything, mode=mode, encoder=encoder, encoders=given)
        return {one.entry.name for one in found}

    kitten = {"lora-003", "lora-007"}
    assert len(chosen("kitten photos") & kitten) == 1
    assert len(chosen("kitten photos", "weights") & kitten) == 1
    assert not chosen("kitten photos", given=())
    assert not chosen("kitten photos", "meaning")
    assert chosen("a robot") == {"robot-5"}  # its words are asked before the weights of one that says nothing
    assert chosen("a bicycle wheel") == set()
    found, _ = choose(shelves, "kitten photos", anything, encoder=encoder, encoders=[weights])
    assert "weights, score" in found[0].why[0]
    assert found[0].score >= SURE


def test_weights_choose_nothing_that_is_refused(shelves: Catalog, encoder: TextEncoder, weights: WeightEncoder) -> None:
    def refusal(entry: Entry) -> str | None:
        return "broken" if entry.name == first else None

    first = ""
    [one], _ = choose(shelves, "kitten photos", refusal, mode="weights", encoder=encoder, encoders=[weights])
    first = one.entry.name
    [other], spared = choose(shelves, "kitten photos", refusal, mode="weights", encoder=encoder, encoders=[weights])
    assert other.entry.name != first
    assert (first, "broken") in {(one.entry.name, one.reason) for one in spared}
