"""The steps of a fit: batches, the loss, looks at what is held out, and the journal that a stopped fit goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..hub.errors import FormatError, RetrievalError
from .contrast import Pairs, both_ways, contrast
from .encoders._tokens import Features

if TYPE_CHECKING:
    from .fitting import Settings

BATCH = 64  # examples encoded at once
LARGEST_SCALE = 100.0  # of the cosines in the loss, as CLIP has it


@dataclass(frozen=True, eq=False)
class Bench:
    """What is fitted: features of every example, who fits whom, and the texts' vectors (texts, dim)."""

    items: Sequence[Features]
    pairs: Pairs
    vectors: Tensor

    def targets(self, owned: Sequence[Sequence[int]] | None = None) -> Tensor:
        """For every example the mean direction of its own texts (examples, dim), or of those that are said to be."""
        means = torch.stack([self.vectors[list(own)].mean(dim=0) for own in owned or self.pairs.owned])
        return nn.functional.normalize(means, dim=1)

    def digest(self) -> str:
        """Tells one set of examples from another."""
        found = hashlib.sha256("\0".join(self.pairs.texts).encode("utf-8", "replace"))
        found.update(np.packbits(self.pairs.fitting.numpy()).tobytes())
        for item in self.items:
            for name in sorted(item):
                found.update(item[name].numpy().tobytes())
        return found.hexdigest()


class Course:
    """Steps of a fit on the examples `train`, judged on `held`; `state` is all that a resumed one needs."""

    def __init__(self, network: Any, bench: Bench, settings: Settings, train: Tensor, held: Tensor) -> None:
        self.network, self.bench, self.settings, self.train, self.held = network, bench, settings, train, held
        self.texts = bench.vectors
        if settings.centred:
            self.texts = nn.functional.normalize(bench.vectors - bench.vectors.mean(dim=0), dim=1)
        start = 1.0 if settings.temperature is None else 1 / settings.temperature
        self.sharpness = nn.Parameter(torch.tensor(math.log(start)), requires_grad=settings.temperature is not None)
        matrices = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1] + [self.sharpness]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.rate,
        )
        self.done, self.best_at, self.best_score = 0, 0, -1.0
        self.best: dict[str, Tensor] = {}
        self.score: float | None = None

    def scale(self) -> Tensor:
        """What cosines are multiplied by in the loss."""
        return self.sharpness.exp().clamp(max=LARGEST_SCALE)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """From a stored state, or from the start: what is measured or solved at once, and a first look."""
        if state is None:
            rows = self.train.tolist()
            self.network.prepare([self.bench.items[row] for row in rows], self.bench.targets()[rows])
            self.look()
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sharpness.data.copy_(state["sharpness"])
        self.best, self.done, self.best_at = state["best"], state["done"], state["best_at"]
        self.best_score, self.score = state["best_score"], state["score"]

    def state(self) -> dict[str, Any]:
        """Tensors and numbers, as torch.save takes them."""
        return {
            "network": self.network.state_dict(), "sharpness": self.sharpness.detach(), "best": self.best,
            "optimizer": self.optimizer.state_dict(), "done": self.done, "best_at": self.best_at,
            "best_score": self.best_score, "score": self.score,
        }  # fmt: skip

    def running(self, steps: int) -> bool:
        """Whether there are steps left, and hope."""
        stale = len(self.held) > 0 and self.done - self.best_at >= self.settings.patience * self.settings.look
        return self.done < steps and not stale

    def step(self, steps: int) -> float:
        """One step, and a look at the held-out examples where it is time, or where it was the last of `steps`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(self.settings.seed, self.done))
            loss = self._loss()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(loss)):
            raise RetrievalError(f"the loss is {loss.item()} after {self.done} steps; fit again with a smaller rate")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * share(self.done, self.settings.steps)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        if self.done % self.settings.look == 0 or self.done == steps:
            self.look()
        return float(loss.detach())

    def _loss(self) -> Tensor:
        pairs, settings = self.bench.pairs, self.settings
        if settings.distinct:
            rows = self.train[torch.randperm(len(self.train))[: settings.batch]]
        else:
            rows = self.train[torch.randint(len(self.train), (settings.batch,))]
        texts = torch.tensor([pairs.owned[row][int(torch.randint(len(pairs.owned[row]), ()))] for row in rows.tolist()])
        fitting = pairs.fitting[texts][:, rows] if settings.distinct else torch.eye(len(rows), dtype=torch.bool)
        items = [self.bench.items[row] for row in rows.tolist()]
        present = None
        if settings.absent:
            present = (torch.rand(len(items), len(items[0]["present"])) >= settings.absent).float()
        self.network.train()
        vectors = self.network(items, present)
        return contrast(self.texts[texts], vectors, fitting, self.scale())

    def encoded(self, rows: Tensor) -> Tensor:
        """Unit vectors of some examples, (n, dim)."""
        self.network.eval()
        with torch.inference_mode():
            parts = [self.network([self.bench.items[row] for row in some.tolist()]) for some in _batches(rows)]
        return torch.cat(parts)

    def _settle(self) -> None:
        """Measure, on whole examples, the mean that is taken from their vectors, where the network takes one."""
        centre, seen = getattr(self.network, "centre", None), list[Tensor]()
        if centre is None:
            return
        with centre.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            self.encoded(self.train)
        centre.mean.copy_(torch.cat(seen).mean(dim=0).clone())

    def look(self) -> None:
        """Measure on the held-out examples; keep the state if it is the best so far."""
        self._settle()
        if len(self.held):
            self.score = both_ways(self.bench.vectors, self.encoded(self.held), self.bench.pairs.fitting[:, self.held])
        if self.score is None or not self.best or self.score > self.best_score + self.settings.gain:
            self.best_score, self.best_at = self.score if self.score is not None else -1.0, self.done
            self.best = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}


class Journal:
    """The checkpoint of a fit: the states of its courses, by stage; kept in memory alone where there is no path."""

    def __init__(self, path: Path | None, identity: str, parts: dict[str, Any]) -> None:
        self.path, self.identity, self.parts = path, identity, parts

    @classmethod
    def open(cls, path: Path | None, settings: Settings, network: nn.Module, bench: Bench) -> Journal:
        """What is stored there, if anything. Raises FormatError if it is damaged or of another fit."""
        identity = _identity(settings, network, bench) if path else ""
        if path is None or not path.exists():
            return cls(path, identity, {})
        try:
            found = torch.load(path, weights_only=True)
            known, parts = found["identity"], found["parts"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FormatError(f"{path}: is no checkpoint of a fit ({reason}); delete it to start anew") from None
        if known != identity:
            raise FormatError(
                f"{path}: is of another fit (adapters, texts or settings differ); delete it to start anew"
            )
        return cls(path, identity, parts)

    def write(self, stage: str, course: Course) -> None:
        """Store a course's state, in one replacement of the file."""
        from ..hub.writing import replacing

        self.parts[stage] = course.state()
        if self.path:
            with replacing(self.path, force=True) as place:
                torch.save({"identity": self.identity, "parts": self.parts}, place)


def _identity(settings: Settings, network: nn.Module, bench: Bench) -> str:
    said = asdict(settings) | {"save_every": 0}  # which may differ between the parts of one fit
    start = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        start.update(name.encode() + tensor.numpy().tobytes())
    told = f"{json.dumps(said, sort_keys=True)} {type(network).__name__} {start.hexdigest()} {bench.digest()}"
    return hashlib.sha256(told.encode()).hexdigest()


def _batches(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def number(seed: int, step: int) -> int:
    """A seed for one step of a fit."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def share(done: int, steps: int) -> float:
    """Of the full rate: up in a straight line for a twentieth of the steps, then down half a cosine."""
    warm = max(1, steps // 20)
    if done < warm:
        return (done + 1) / warm
    return (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm))) / 2
