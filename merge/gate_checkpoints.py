"""Checkpoints of a training of gates. Importing this needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..hub.errors import FormatError, IncompatibleAdapters
from ..hub.writing import replacing
from .gates import Gates

METADATA_KEY = "lorahub_gate_training"


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds, beside the number of steps done: gates, AdamW's moments, and which run it is of."""

    gates: Gates
    optimiser: torch.optim.AdamW
    identity: Mapping[str, Any]

    def save(self, path: Path, step: int) -> None:
        """Write a checkpoint in place of the one before; there is never half of one."""
        from safetensors.torch import save

        tensors = {f"gates/{name}": value for name, value in self.gates.tensors().items()}
        for index, parameter in enumerate(self.gates.parameters()):
            tensors |= {f"adamw/{index}/{key}": value for key, value in self.optimiser.state[parameter].items()}
        header = json.dumps({**self.identity, "step": step}, sort_keys=True)
        content = save({name: value.contiguous() for name, value in tensors.items()}, {METADATA_KEY: header})
        with replacing(path, force=True) as place:
            place.write_bytes(content)

    def resume(self, path: Path | None) -> int:
        """Take up a checkpoint where there is one; returns the number of steps done."""
        from safetensors import SafetensorError, safe_open

        if path is None or not path.exists():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            step = int(header.pop("step"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{path} is no checkpoint of gates ({error}); delete it to start anew") from None
        differing = [name for name, value in self.identity.items() if header.get(name) != value]
        if differing:
            raise IncompatibleAdapters(
                f"{path} is of another run ({', '.join(differing)} differ); delete it or name another checkpoint"
            )
        self.gates.take({key.removeprefix("gates/"): value for key, value in tensors.items() if key[0] == "g"})
        for index, parameter in enumerate(self.gates.parameters()):
            stem = f"adamw/{index}/"
            state = {key.removeprefix(stem): value for key, value in tensors.items() if key.startswith(stem)}
            if state:
                self.optimiser.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        return step
