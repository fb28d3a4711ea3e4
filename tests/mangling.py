"""Adapter files as an enemy or a broken disk makes them: every kind there is, each a function that writes one sample.

A kind is called with seeded chance and a folder of its own, so a failure comes back with its number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import mangling_headers as headers
import mangling_places as places

Mangle = Callable[[random.Random, Path], Path]

KINDS: list[Mangle] = [
    headers.truncated,
    headers.length_lies,
    headers.flipped_bytes,
    headers.shifted,
    headers.no_header,
    headers.huge_header,
    headers.wrong_entry,
    headers.wrong_offsets,
    headers.wrong_shape,
    headers.wrong_dtype,
    headers.wrong_name,
    headers.half_a_pair,
    headers.doubled_module,
    headers.not_finite,
    headers.strange_alpha,
    headers.bomb,
    headers.strange_metadata,
    places.wrong_config_text,
    places.wrong_config_value,
    places.wrong_pattern,
    places.many_patterns,
    places.strange_card,
    places.strange_sidecar,
    places.strange_file,
    places.mangled_pickle,
    places.evil_pickle,
]
