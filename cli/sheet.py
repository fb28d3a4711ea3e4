"""Sheets of labelled pictures, and PNG files that know how they were made. Importing this needs Pillow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from ..hub.errors import FormatError

if TYPE_CHECKING:
    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

LEAST = 192  # pixels a side: smaller pictures are enlarged in sheets
LETTERS = 15  # pixels
GAP = 12
PAPER, INK = (255, 255, 255), (40, 40, 40)
RECIPE_KEY = "lorahub"
PARAMETERS_KEY = "parameters"  # where image tools look for how a picture was made


@dataclass(frozen=True)
class Panel:
    """A picture of a sheet and what stands above it."""

    picture: Image.Image
    label: str


def sheet(panels: Sequence[Panel], *, columns: int | None = None, title: str = "") -> Image.Image:
    """Labelled pictures in rows of `columns` (None: all in one row), under a title, as one RGB picture.

    Small pictures are enlarged by whole factors without smoothing; labels that are too long for their column are cut.
    Raises ValueError where there are no panels.
    """
    if not panels:
        raise ValueError("a sheet needs at least one panel")
    columns = min(columns or len(panels), len(panels))
    factor = enlargement([panel.picture for panel in panels])
    width = max(panel.picture.width for panel in panels) * factor
    height = max(panel.picture.height for panel in panels) * factor
    font = ImageFont.load_default(LETTERS)
    line = LETTERS + LETTERS // 2
    top = GAP + (line + GAP // 2 if title else 0)
    rows = -(-len(panels) // columns)
    size = (GAP + columns * (width + GAP), top + rows * (line + height + GAP))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((GAP, GAP), shortened(title, size[0] - 2 * GAP, font), INK, font)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, upper = GAP + column * (width + GAP), top + row * (line + height + GAP)
        draw.text((left, upper), shortened(panel.label, width, font), INK, font)
        canvas.paste(enlarged(panel.picture, factor), (left, upper + line))
    return canvas


def enlargement(pictures: Sequence[Image.Image]) -> int:
    """By how much pictures of a sheet are enlarged, all alike: until the largest side is at least LEAST, or 1."""
    side = max(max(picture.size) for picture in pictures)
    return max(1, -(-LEAST // side))


def enlarged(picture: Image.Image, factor: int) -> Image.Image:
    """Every pixel as a square of factor x factor equal ones."""
    rgb = picture.convert("RGB")
    return rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)


def shortened(text: str, width: int, font: Font) -> str:
    """The text on one line, its end left out where it is wider than `width` pixels."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    kept = next((n for n in range(len(line), 0, -1) if font.getlength(f"{line[:n].rstrip()} ...") <= width), 0)
    return f"{line[:kept].rstrip()} ..."


# --- files ----------------------------------------------------------------------------------------------------------


def write_png(picture: Image.Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a PNG with its recipe: as JSON under "lorahub", and as the line that image tools read."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text(RECIPE_KEY, json.dumps(recipe, sort_keys=True))  # ASCII, so a plain text chunk
    texts.add_itxt(PARAMETERS_KEY, parameters(recipe))
    picture.save(path, format="PNG", pnginfo=texts)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that a PNG of ours carries. Raises FormatError where it carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            found = json.loads(picture.text[RECIPE_KEY])  # type: ignore[attr-defined]
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, KeyError, AttributeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: is no PNG with a recipe of lorahub's; expected one that `imagine` wrote")
    return found


def parameters(recipe: Mapping[str, Any]) -> str:
    """A recipe as image tools write it: the prompt with its adapters, then settings on one line."""
    adapters = recipe["adapters"]
    prompt = " ".join([recipe["prompt"], *(f"<lora:{one['name']}:{one['weight']:g}>" for one in adapters)])
    hashes = ", ".join(f"{one['name']}: {one['digest'][:12]}" for one in adapters)
    settings = {
        "Steps": recipe["steps"],
        "Sampler": recipe["sampler"],
        "CFG scale": recipe["guidance"],
        "Seed": recipe["seeds"][0],
        "Size": "x".join(map(str, recipe["size"])),
        "Model hash": recipe["base_fingerprint"][:10],
        "Model": recipe["base"] or Path(recipe["pipeline"]).name,
        "Lora hashes": json.dumps(hashes, ensure_ascii=False) if hashes else None,
        "Fusion": recipe["fuse"],
        "Version": f"lorahub {recipe['version']['lorahub']}",
    }
    return prompt + "\n" + ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
