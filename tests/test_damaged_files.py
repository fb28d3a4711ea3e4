"""Hundreds of damaged and hostile files: each is refused in one line, none hangs, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from lorahub.hub.catalog import Catalog


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def mutations(data, chance):
    """An endless series of (kind, bytes)."""
    header, body = split(data)
    down, up = (key for key in header if key != "__metadata__")

    def changed(key, **entry):
        return joined({**header, key: {**header[key], **entry}}, body)

    def renamed(name):
        return joined({name if key == up else key: entry for key, entry in header.items()}, body)

    size = len(body)
    while True:
        cut = chance.randrange(len(data))
        yield "truncated", data[:cut]
        yield "length lies", joined(header, body, chance.choice([0, 1, len(data), 2**31, 2**63, 2**64 - 1, cut]))
        yield "offsets", changed(up, data_offsets=[chance.randrange(size), chance.randrange(size)])
        yield "negative", changed(up, data_offsets=[-chance.randrange(1, 99), 8])
        yield "shape", changed(up, shape=[chance.choice([-1, 0, 3, 2**40, 2**70, "2", None, 1.5]), 2])
        yield "dtype", changed(up, dtype=chance.choice(["F16", "I64", "X9", "", None, 7, "BOOL", "../F32"]))
        yield "entry", joined({**header, up: chance.choice([None, [], 3, "x", {}])}, body)
        yield "metadata", joined({**header, "__metadata__": chance.choice([3, [], {"a": 1}, {"a": None}, "x"])}, body)
        yield "not finite", joined(header, body[: cut % size // 4 * 4] + chance.choice(NOT_FINITE) + body[4:])
        yield (
            "path tricks",
            renamed(chance.choice(["../../etc/passwd", "/tmp/x", "a\0b", "\ud800", "..", "", "x" * 9999])),
        )
        yield "deep", joined(b"[" * chance.randrange(1, 200_000), body)
        yield (
            "twice",
            joined(json.dumps(header).encode()[:-1] + f', "{up}": {json.dumps(header[down])}}}'.encode(), body),
        )
        yield "huge header", joined(header, body, 100_000_001)
        yield "no text", joined(bytes(chance.randrange(256) for _ in range(300)), body)
        yield "empty header", joined({}, body)
        flipped = bytearray(data)
        for _ in range(chance.randrange(1, 20)):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        yield "bits", bytes(flipped)


NOT_FINITE = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"]


@pytest.fixture
def library(lora):
    folder = lora("good.safetensors", 1, ss_output_name="good").parent
    chance = random.Random(0)
    data = (folder / "good.safetensors").read_bytes()
    for number, (kind, damaged) in zip(range(320), mutations(data, chance), strict=False):
        (folder / f"{number:03d} {kind}.safetensors").write_bytes(damaged)
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent.parent)
    return folder


def fingerprints(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_every_damaged_file_is_accounted_for_and_nothing_else_is_touched(library, tmp_path):
    before = fingerprints(tmp_path)
    home = tmp_path / "home"
    with Catalog(home) as catalog:
        outcomes = list(catalog.add([library], copy=True))
        assert len(outcomes) == 321
        refused = [outcome for outcome in outcomes if outcome.status == "rejected"]
        assert len(refused) > 280
        for outcome in refused:
            assert outcome.reason, outcome.path
            assert "\n" not in outcome.reason, outcome.path
            assert outcome.id is None
        accepted = [outcome for outcome in outcomes if outcome.status != "rejected"]
        assert {outcome.id for outcome in accepted} == {entry.id for entry in catalog.entries()}
        assert all(entry.locations and entry.blob for entry in catalog.entries())
        assert catalog.verify() == []
        assert [outcome for outcome in catalog.add([library]) if outcome.status == "rejected"] == refused
    after = {path: digest for path, digest in fingerprints(tmp_path).items() if home not in path.parents}
    assert after == before
