"""The weight encoder that ships finds the example's adapters by their weights, when nothing is said of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import lorahub.cli.example
import numpy as np
import pytest
from lorahub.generate.pictures import BASE
from lorahub.hub.catalog import Catalog
from lorahub.hub.reading import read
from lorahub.index.embed import fill, fill_encoded
from lorahub.index.encoders.text import text
from lorahub.index.fitted import encoders
from lorahub.index.search import search
from lorahub.index.weight_encoder import WeightEncoder, encoder_for

PICTURES = Path(lorahub.cli.example.__path__[0]) / "pictures"
NAMES = {path.stem.replace("-", " "): path for path in sorted(PICTURES.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> WeightEncoder:
    found = encoder_for(tmp_path_factory.mktemp("home"), BASE)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def silent(
    tmp_path_factory: pytest.TempPathFactory, encoder: WeightEncoder
) -> Iterator[tuple[Catalog, dict[str, str]]]:
    """The example's adapters under numbers, without a word; and id -> the name that each had."""
    room = tmp_path_factory.mktemp("room")
    (room / "files").mkdir()
    names = {}
    for number, (name, path) in enumerate(NAMES.items()):
        shutil.copy(path, room / "files" / f"{number:05d}.safetensors")
        names[f"{number:05d}"] = name
    with Catalog(room / "home") as catalog:
        known = {one.id: names[Path(one.path).stem] for one in catalog.add([room / "files"], base=BASE)}
        assert not any(entry.description or entry.tags or entry.title for entry in catalog.entries())
        fill(catalog, text())
        assert fill_encoded(catalog, encoder) == len(NAMES)
        yield catalog, known


def test_every_style_and_thing_comes_first_for_its_name(silent: tuple[Catalog, dict[str, str]]) -> None:
    catalog, known = silent
    used = encoders(catalog)
    for mode in ("weights", "hybrid"):
        first = {}
        for name in NAMES:
            hits = search(catalog, name, mode=mode, encoder=text(), encoders=used, limit=1)
            first[name] = known[hits[0].entry.id] if hits else None
        assert first == {name: name for name in NAMES}


def test_words_that_mean_nothing_find_next_to_nothing(silent: tuple[Catalog, dict[str, str]]) -> None:
    catalog, _ = silent
    for query in ("xyzzy", "qwpoeiru zmxnv", "translate English to French", "protein folding"):
        hits = search(catalog, query, encoder=text(), encoders=encoders(catalog))
        assert all((hit.confidence or 0) < 0.2 for hit in hits)


def test_it_knows_its_base_and_where_it_comes_from(encoder: WeightEncoder) -> None:
    assert encoder.base == BASE
    assert encoder.queries.cases > 1000
    vectors = encoder.encode_all(read(path) for path in NAMES.values())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder_for(Path("nowhere"), "sentence-transformers/all-MiniLM-L6-v2") is None
