"""Immutable files named by the hash of their bytes: blobs/ab/cdef….safetensors.

A blob is written to a temporary file beside the others, flushed to the disk, and only then given its name: whatever
happens, a blob that has a name is whole. Storing the same bytes twice keeps one file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import CatalogError, CorruptBlob

_SUFFIX = ".safetensors"
_UNFINISHED = ".part"
_ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's


@dataclass(frozen=True)
class Blobs:
    """The blobs in `folder`, which appears with the first one."""

    folder: Path

    def put(self, pieces: Iterable[bytes]) -> str:
        """Store the bytes; returns their sha256 in hex. Raises CatalogError, leaving nothing, if the disk refuses."""
        unfinished: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self.folder, suffix=_UNFINISHED)
            unfinished = Path(name)
            with os.fdopen(number, "wb") as file:
                digest = _copied(pieces, file)
                file.flush()
                os.fsync(file.fileno())
            self._name(unfinished, digest)
        except OSError as error:
            where = error.filename or self.folder
            raise CatalogError(f"{where}: the copy cannot be written: {error.strerror}; free some space") from error
        finally:
            if unfinished:
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
        return digest

    def path(self, digest: str) -> Path:
        """Where the blob with that hash lies, or would lie."""
        return self.folder / digest[:2] / (digest[2:] + _SUFFIX)

    def verify(self, digest: str) -> None:
        """Raises CorruptBlob if the blob is missing, unreadable or no longer what its name says."""
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CorruptBlob(f"{path}: the copy cannot be read: {error.strerror}; add the adapter again") from error
        if found != digest:
            raise CorruptBlob(
                f"{path}: the copy has changed (sha256 {found[:12]}…); delete it and add the adapter again"
            )

    def remove(self, digest: str) -> None:
        """Forget the blob; not an error if it is gone already."""
        with suppress(OSError):
            self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """The hashes of all blobs, by name alone."""
        for path in sorted(self.folder.glob(f"??/*{_SUFFIX}")):
            yield path.parent.name + path.stem

    def sweep(self) -> None:
        """Delete what killed processes left unfinished more than an hour ago."""
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def _name(self, unfinished: Path, digest: str) -> None:
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        unfinished.replace(target)  # the same bytes, unless the old file had been damaged
        _flush_folder(target.parent)


def _copied(pieces: Iterable[bytes], file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make the new name last through a power failure, where folders can be flushed at all."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
