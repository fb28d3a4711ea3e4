"""AutoLoRA's weight encoder: one token a module, a small Transformer over them, a unit vector among those of words.

Li et al., "AutoLoRA: Automatic LoRA Retrieval and Fine-Grained Gated Fusion for Text-to-Image Generation", 2025. A
token is what a module answers to learned probes, `up @ (down @ x)`, through one linear map for every kind of module.
`PUBLISHED` is that encoder as its authors' code has it. By default it is mended: a token for absent modules, the norm
as a feature of its own, no causal mask, several probes; and modules are read by `reading="energy"`, which is ours.

Adapters that were trained from independent random `down` agree in where they write, but what they answer to a probe is
a mixture of those directions with random signs and weights. Energies (quadratic in the columns of `up`, see
`_energies`) do not see the mixture. Any energy along learned directions is a linear function of the fixed sketch that
is read here, so learning the linear maps learns the probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...hub.adapter import Adapter
from ...hub.errors import BadOption
from ..modules import Manifest
from ..ridge import Blend, Straight
from ._energies import Sizes, sketches
from ._factors import by_group, canonical, joined
from ._tokens import Aside, ByKind, Centre, Features, Standard, collated, log_norms, place_order, transformer

READINGS = ("energy", "response")

PUBLISHED: Mapping[str, Any] = {
    "reading": "response", "probes": 1, "width": 768, "layers": 2, "heads": 12, "widening": 4, "causal": True,
    "normalise": False, "absent": False, "dropout": 0.0,
}  # fmt: skip


def autolora(
    manifest: Manifest,
    *,
    dim: int = 384,
    width: int = 192,
    probes: int = 4,
    layers: int = 1,
    heads: int = 4,
    reading: str = "energy",
    left: int = 128,
    right: int = 64,
    both: int = 64,
    start: int = 256,
    widening: int = 2,
    causal: bool = False,
    normalise: bool = True,
    absent: bool = True,
    dropout: float = 0.1,
) -> AutoLoRA:
    """An encoder for the manifest's modules, not yet fitted; see AutoLoRA for what the options mean."""
    if reading not in READINGS:
        raise BadOption(f"reading is {reading!r}; expected one of {', '.join(READINGS)}")
    counts = {"width": width, "probes": probes, "heads": heads, "dim": dim, "widening": widening}
    for name, value in counts.items():
        if value < 1:
            raise BadOption(f"{name} is {value}; expected a whole number of at least 1")
    if width % heads:
        raise BadOption(f"width {width} cannot be shared by {heads} heads; choose a multiple of {heads}")
    reader: _Energies | _Probes
    if reading == "energy":
        reader = _Energies(manifest, width, Sizes(left, right, both), dim, start)
    else:
        reader = _Probes(manifest, width, probes, normalise)
    blocks = transformer(width, layers, heads, widening=widening, dropout=dropout)
    return AutoLoRA(manifest, reader, blocks, width, dim, causal=causal, normalise=normalise, absent=absent)


class AutoLoRA(nn.Module):
    """Features of adapters -> unit vectors (n, dim).

    The reader makes a token of each module. normalise: deltas are read at unit norm and the norm's logarithm is added
    as a feature; the mean of all vectors is taken from each, since the loss hardly sees it. absent: a module that is
    missing, or does nothing, gets a learned token; otherwise one of zeros. causal: a token sees only those before it,
    as in the published code. The tokens' mean is the adapter's vector; a last linear map takes it to `dim` where the
    width is another.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: _Energies | _Probes,
        blocks: nn.TransformerEncoder,
        width: int,
        dim: int,
        *,
        causal: bool,
        normalise: bool,
        absent: bool,
    ) -> None:
        super().__init__()
        places = len(manifest.places)
        self.manifest, self.reader, self.blocks, self.causal = manifest, reader, blocks, causal
        self.positions = nn.Parameter(torch.zeros(places, width))
        self.absent = nn.Parameter(torch.zeros(width)) if absent else None
        self.standard = Standard(places) if normalise else None
        self.strength = nn.Parameter(torch.zeros(width)) if normalise else None  # how strongly says little of what
        self.centre = Centre(dim) if normalise else None
        self.aside = Aside(dim)  # nothing is aside until it is measured
        self.head: nn.Module = nn.Linear(width, dim) if width != dim else nn.Identity()
        if reader.begins:
            self.head = nn.Linear(width, dim)
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)

    def features(self, adapter: Adapter) -> Features:
        """What is read of one adapter. Raises IncompatibleAdapters as `Manifest.check` does."""
        return self.reader.features(adapter)

    def prepare(self, items: Sequence[Features], targets: Tensor) -> None:
        """Before the first step of a fit to targets (n, dim): what is measured or solved on all examples at once."""
        if self.standard is not None:
            batch = collated([{name: item[name] for name in ("norms", "present")} for item in items])
            self.standard.measure(batch["norms"], batch["present"])
            self.aside.measure(targets)
        self.reader.prepare(items, targets)

    def forward(self, items: Sequence[Features], present: Tensor | None = None) -> Tensor:
        """One unit vector for each. present (n, places): zeros make modules absent that are there."""
        batch = collated(items)
        if present is not None:
            batch["present"] = batch["present"] * present
        tokens, straight = self.reader(batch)
        if self.standard is not None and self.strength is not None:
            tokens = tokens + self.strength * self.standard(batch["norms"])[..., None]
        missing = 0.0 if self.absent is None else self.absent
        tokens = torch.where(batch["present"][..., None] > 0, tokens, missing) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]) if self.causal else None
        states = self.blocks(tokens, mask=mask, is_causal=self.causal)
        vectors: Tensor = self.head(states.mean(dim=1)) + straight
        if self.centre is not None:
            vectors = self.centre(vectors)
        unit: Tensor = self.aside(vectors)
        return unit


class _Energies(nn.Module):
    """Fixed sketches of every module, through one linear map for each place: tokens, and vectors to be added.

    A direction of one layer's outputs means nothing in another's, so places share no map. With `start` components the
    sketches also go straight to words, by a map that begins as the ridge regression and is learned on, while the
    Transformer begins with no say; without, that part is 0.
    """

    def __init__(self, manifest: Manifest, width: int, sizes: Sizes, dim: int, start: int) -> None:
        super().__init__()
        self.manifest, self.sizes, self.begins = manifest, sizes, start > 0
        places = len(manifest.places)
        self.blend = Blend(places, sizes)
        self.maps = nn.Parameter(0.1 * torch.randn(places, sum(sizes), width))
        self.straight = Straight(places * sum(sizes), dim, start) if start else None

    def features(self, adapter: Adapter) -> Features:
        return sketches(adapter, self.manifest, self.sizes)

    def prepare(self, items: Sequence[Features], targets: Tensor) -> None:
        batch = collated(items)
        found = self.blend.measure(batch["sketches"], batch["present"], targets)
        if self.straight is not None:
            self.straight.take(found, self.blend(batch["sketches"], batch["present"]))

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        blended = self.blend(batch["sketches"], batch["present"])
        tokens = torch.einsum("nmd,mdw->nmw", blended, self.maps)
        return tokens, 0.0 if self.straight is None else self.straight(blended)


class _Probes(nn.Module):
    """What every module answers to its own learned probes, through one linear map for each kind."""

    def __init__(self, manifest: Manifest, width: int, probes: int, normalise: bool) -> None:
        super().__init__()
        self.manifest, self.normalise, self.begins = manifest, normalise, False
        self.probes = nn.ParameterList(torch.randn(len(group.rows), group.inputs, probes) for group in manifest.groups)
        self.kinds = ByKind([group.outputs * probes for group in manifest.groups], width)
        self.register_buffer("order", place_order(manifest), persistent=False)

    def features(self, adapter: Adapter) -> Features:
        deltas = canonical(adapter, self.manifest)
        norms, present = log_norms(joined([each.norms for each in deltas], deltas))
        found = {"norms": norms, "present": present}
        for index, each in enumerate(by_group(deltas, self.manifest)):
            sizes = each.values
            if self.normalise:  # so that an answer to a probe of unit variance has unit variance
                sizes = sizes * (each.left.shape[1] ** 0.5 / each.norms.clamp_min(1e-30))[:, None]
            found[f"left {index}"] = each.left * sizes[:, None]
            found[f"right {index}"] = each.right
        return found

    def prepare(self, items: Sequence[Features], targets: Tensor) -> None:
        """Nothing is measured."""

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        tokens = []
        for index, probes in enumerate(self.probes):
            answers = batch[f"left {index}"] @ (batch[f"right {index}"].mT @ probes)
            tokens.append(self.kinds(index, answers.flatten(2)))
        whole = torch.cat(tokens, dim=1)
        order: Any = self.order
        return whole[:, order], 0.0
