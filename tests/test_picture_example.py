"""The pictures' part of the built-in example: a base that opens, adapters that fit it and are found by their words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lorahub.cli.tour import EXAMPLE, PICTURES
from lorahub.generate.pictures import BASE, PicturePipeline, shipped
from lorahub.hub.catalog import Catalog
from lorahub.hub.reading import inspect, read
from lorahub.index.search import search

FILES = sorted((EXAMPLE / PICTURES).glob("*.safetensors"))
STYLES, CONTENTS = 10, 8


def told(file: Path) -> dict:
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def test_there_are_styles_and_contents_each_with_words_and_a_picture() -> None:
    kinds = [told(file)["tags"][1] for file in FILES]
    assert kinds.count("style") >= STYLES
    assert kinds.count("content") >= CONTENTS
    for file in FILES:
        words = told(file)
        assert len(words["description"].split()) >= 5
        assert words["trainedWords"]
        assert words["license"]
        assert file.with_suffix(".png").stat().st_size < 40_000


def test_the_base_opens_as_a_pipeline_and_stays_small() -> None:
    pipeline = PicturePipeline.from_pretrained(shipped())
    assert sum(parameter.numel() for parameter in pipeline.transformer.parameters()) < 5e6
    assert "Apache-2.0" in (shipped() / "README.md").read_text(encoding="utf-8")
    assert max(file.stat().st_size for file in shipped().rglob("*") if file.is_file()) < 9e6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_adapter_is_for_the_base_and_says_what_it_does(file: Path) -> None:
    from lorahub.generate.painting import misfit, open_painter

    found = inspect(file)
    assert found.base == BASE
    assert found.description
    assert found.triggers
    assert misfit(open_painter(shipped()), read(file)) is None


def test_words_find_the_adapter(tmp_path: Path) -> None:
    with Catalog(tmp_path) as catalog:
        assert all(one.status == "added" for one in catalog.add([EXAMPLE / PICTURES]))
        for file in FILES:
            first = search(catalog, file.stem.replace("-", " "), mode="text", limit=1)[0]
            assert first.entry.name == file.stem
