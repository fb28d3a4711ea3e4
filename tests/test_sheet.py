"""Sheets of labelled pictures, and PNG files that carry their recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lorahub.cli.sheet import (
    GAP,
    LEAST,
    Panel,
    enlarged,
    enlargement,
    parameters,
    read_recipe,
    sheet,
    shortened,
    write_png,
)
from lorahub.hub.errors import FormatError
from PIL import Image, ImageFont

COLOURS = ("red", "green", "blue", "orange", "purple")


def square(colour: str, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "a watercolor fox", "fuse": "gated", "seeds": [7, 8], "steps": 30, "guidance": 3.5, "base": None,
        "pipeline": "/models/small", "sampler": "Euler", "size": [8, 8], "base_fingerprint": "ab" * 32,
        "adapters": [{"id": "1" * 16, "name": "watercolor", "digest": "c" * 64, "weight": 0.7}],
        "version": {"lorahub": "0.1.0"}, **changes,
    }  # fmt: skip


def panels_of(picture: Image.Image, side: int) -> list[tuple[int, ...]]:
    """The colours of the squares of `side` pixels in a sheet, in the order in which they are read."""
    pixels = np.asarray(picture).astype(int)
    found = []
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            colour = tuple(pixels[y, x])
            corner = max(colour) > min(colour) + 60 and (y == 0 or tuple(pixels[y - 1, x]) != colour)
            if corner and (x == 0 or tuple(pixels[y, x - 1]) != colour):
                assert (pixels[y : y + side, x : x + side] == pixels[y, x]).all()
                found.append(tuple(map(int, colour)))
    return found


@pytest.mark.parametrize(("count", "columns"), [(1, None), (4, None), (5, 2), (3, 9)])
def test_a_sheet_holds_every_picture_once_and_in_order(count: int, columns: int | None) -> None:
    pictures = [square(colour) for colour in COLOURS[:count]]
    made = sheet([Panel(one, "label") for one in pictures], columns=columns, title="a title")
    assert panels_of(made, LEAST) == [one.getpixel((0, 0)) for one in pictures]
    across = min(columns or count, count)
    assert made.width == GAP + across * (LEAST + GAP)


def test_labels_and_title_are_written_above() -> None:
    plain, labelled = (sheet([Panel(square("white"), label)]) for label in ("", "watercolor"))
    assert plain.size == labelled.size
    changed = np.argwhere((np.asarray(plain) != np.asarray(labelled)).any(axis=-1))
    assert len(changed) > 50
    assert changed[:, 0].max() < plain.height - LEAST - GAP
    titled = sheet([Panel(square("white"), "watercolor")], title="a fox")
    assert titled.height > labelled.height
    assert sheet([Panel(square("red"), "x" * 400)], title="y" * 400).width == LEAST + 2 * GAP


def test_small_pictures_grow_by_whole_factors_and_large_ones_stay() -> None:
    assert [enlargement([square("red", size)]) for size in (8, 32, 100, LEAST, 512)] == [24, 6, 2, 1, 1]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    grown = np.asarray(enlarged(noise, 3))
    assert (grown == np.asarray(noise).repeat(3, axis=0).repeat(3, axis=1)).all()
    mixed = sheet([Panel(square("red", 64), "a"), Panel(square("blue", 16), "b")])
    assert mixed.width == 3 * GAP + 2 * LEAST


def test_long_labels_are_cut_to_their_width() -> None:
    font = ImageFont.load_default(15)
    assert shortened("short\n one", 200, font) == "short one"
    cut = shortened("a label that goes on and on and on", 100, font)
    assert cut.endswith(" ...")
    assert font.getlength(cut) <= 100
    assert shortened("", 10, font) == ""
    assert shortened("word", 0, font) == " ..."
    with pytest.raises(ValueError, match="at least one panel"):
        sheet([])


@pytest.mark.parametrize("prompt", ["a watercolor fox", "ein Füchslein, 狐, \U0001f98a", 'quotes " and\nlines'])
def test_a_recipe_comes_back_whole(tmp_path: Path, prompt: str) -> None:
    write_png(square("red"), tmp_path / "a.png", recipe(prompt=prompt))
    assert read_recipe(tmp_path / "a.png") == recipe(prompt=prompt)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["parameters"].startswith(prompt)
        assert np.array_equal(np.asarray(picture), np.asarray(square("red")))


def test_the_parameters_are_as_image_tools_write_them() -> None:
    prompt, settings = parameters(recipe()).split("\n")
    assert prompt == "a watercolor fox <lora:watercolor:0.7>"
    for pair in ("Steps: 30", "Sampler: Euler", "CFG scale: 3.5", "Seed: 7", "Size: 8x8", "Model: small"):
        assert pair in settings.split(", ")
    assert 'Lora hashes: "watercolor: cccccccccccc"' in settings
    assert "Lora hashes" not in parameters(recipe(adapters=[], guidance=None))
    assert "CFG" not in parameters(recipe(guidance=None))


def test_other_files_carry_no_recipe(tmp_path: Path) -> None:
    square("red").save(tmp_path / "plain.png")
    square("red").save(tmp_path / "photo.jpg")
    (tmp_path / "torn.png").write_bytes((tmp_path / "plain.png").read_bytes()[:30])
    for name in ("plain.png", "photo.jpg", "torn.png", "none.png"):
        with pytest.raises(FormatError, match=name):
            read_recipe(tmp_path / name)
