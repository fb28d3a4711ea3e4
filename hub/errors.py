"""The errors that lorahub raises on purpose; anything else that escapes is a bug.

    LoraHubError
    ├── FormatError             a file is damaged, or is no adapter that lorahub can read
    │   └── UnsafeFile          reading it could run code (a pickle without consent)
    ├── CatalogError
    │   ├── UnknownAdapter      no adapter has that name, id or path
    │   ├── NameTaken           another adapter has that name
    │   └── CorruptBlob         stored bytes no longer match their hash
    ├── IncompatibleAdapters    adapters that cannot be combined: which module, both shapes, both names
    ├── UnknownMethod           no plug-in of that name; the message lists what there is
    ├── BadOption               an option that a method does not have, or a value outside its range
    ├── TargetExists            the output exists and `--force` was not given
    ├── RetrievalError          an index or encoder cannot answer
    └── GenerationError         no adapter can honestly be generated
        └── Abstained           the description is far from everything in the library

Every message is one line and says what was found, what was expected and what to do.
"""

from __future__ import annotations


class LoraHubError(Exception):
    """Root of the tree; the command line turns it into one line and exit code 1."""

    exit_code = 1


class FormatError(LoraHubError):
    """A file is damaged or is not an adapter that lorahub can read."""


class UnsafeFile(FormatError):
    """Reading the file could run code, and the caller did not consent; exit code 4."""

    exit_code = 4


class CatalogError(LoraHubError):
    """The catalogue cannot do what was asked."""


class UnknownAdapter(CatalogError):
    """No adapter has that name, id prefix or path."""


class NameTaken(CatalogError):
    """Another adapter already has that name."""


class CorruptBlob(CatalogError):
    """Stored bytes no longer match the hash that names them."""


class IncompatibleAdapters(LoraHubError):
    """Adapters that cannot be combined, or one that cannot be used in arithmetic at all."""


class UnknownMethod(LoraHubError):
    """No plug-in of that name."""


class BadOption(LoraHubError):
    """An option that does not exist, or a value outside its range."""


class TargetExists(LoraHubError):
    """The output exists already and overwriting was not asked for."""


class RetrievalError(LoraHubError):
    """An index or an encoder cannot answer."""


class GenerationError(LoraHubError):
    """No adapter can honestly be generated."""


class Abstained(GenerationError):
    """The description is far from everything in the library; exit code 3."""

    exit_code = 3
