"""Blobs: named by their hash, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import time

import pytest
from lorahub.hub.blobs import Blobs
from lorahub.hub.errors import CatalogError, CorruptBlob


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


def everything(blobs):
    return sorted(path.name for path in blobs.folder.rglob("*") if path.is_file())


def test_put_names_the_bytes_by_their_hash(blobs):
    digest = blobs.put([b"lo", b"ra"])
    assert digest == hashlib.sha256(b"lora").hexdigest()
    assert blobs.path(digest).read_bytes() == b"lora"
    assert blobs.path(digest).parent.name == digest[:2]
    assert list(blobs.digests()) == [digest]
    blobs.verify(digest)


def test_storing_twice_keeps_one_file(blobs):
    assert blobs.put([b"lora"]) == blobs.put([b"l", b"ora"])
    assert len(everything(blobs)) == 1


def test_a_changed_blob_is_found_and_healed_by_storing_it_again(blobs):
    digest = blobs.put([b"lora"])
    blobs.path(digest).write_bytes(b"lorb")
    with pytest.raises(CorruptBlob, match="has changed"):
        blobs.verify(digest)
    blobs.put([b"lora"])
    blobs.verify(digest)


def test_a_missing_blob_is_found(blobs):
    digest = blobs.put([b"lora"])
    blobs.remove(digest)
    blobs.remove(digest)
    with pytest.raises(CorruptBlob, match="cannot be read"):
        blobs.verify(digest)


def test_a_full_disk_is_one_line_and_leaves_nothing(blobs, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CatalogError, match="No space left") as caught:
        blobs.put([b"lora"])
    assert str(blobs.folder) in str(caught.value)
    assert everything(blobs) == []


def test_an_interrupted_source_leaves_nothing(blobs):
    def pieces():
        yield b"lo"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blobs.put(pieces())
    assert everything(blobs) == []


def test_sweep_deletes_what_is_abandoned_and_nothing_else(blobs):
    digest = blobs.put([b"lora"])
    old, young = blobs.folder / "old.part", blobs.folder / "young.part"
    for path in (old, young):
        path.write_bytes(b"lo")
    os.utime(old, (time.time() - 7200,) * 2)
    blobs.sweep()
    assert not old.exists()
    assert young.exists()
    blobs.verify(digest)
