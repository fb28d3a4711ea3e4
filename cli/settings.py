"""Where things lie: the home folder and the catalogue, from the environment. Nothing else in lorahub reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hub.catalog import Catalog


def home() -> Path:
    """$LORAHUB_HOME, or the user's data directory of this system."""
    told = os.environ.get("LORAHUB_HOME")
    if told:
        return Path(told).expanduser()
    from platformdirs import user_data_path

    return user_data_path("lorahub", appauthor=False)


def open_catalog() -> Catalog:
    """The user's catalogue: SQLite in the home folder, or the database that $LORAHUB_DATABASE names."""
    from ..hub.catalog import Catalog

    return Catalog(home(), os.environ.get("LORAHUB_DATABASE"))


def algebra_on_one_thread() -> None:
    """Give torch one thread: factors are thin, and their QR gains nothing from a second one (it loses where the
    machine is busy; `benchmarks/merge_speed.py --threads` shows it)."""
    import torch

    torch.set_num_threads(1)
