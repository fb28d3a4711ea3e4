"""Is a merge the weighted sum? lorahub's `exact` and PEFT's `linear`, `cat` and `svd` on the same adapters.

Value: ||got - wanted|| / ||wanted|| (Frobenius) with wanted = sum_i w_i * scale_i * B_i A_i in float64; 0.00 is right,
1.00 is an error as large as the sum itself. A 64 x 48 linear layer, random adapters, written to disk by PEFT itself.
Each cell is the worst of the seeds. `exact, loaded by PEFT` is lorahub's written result as PEFT applies it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.run import merge
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

OUTPUTS, INPUTS = 64, 48
REFUSES = "refuses"


@dataclass(frozen=True)
class Made:
    """An adapter to be trained: its configuration in PEFT's words, and the seed of its factors."""

    seed: int
    rank: int = 8
    alpha: int = 16
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Case:
    """A column of the table: adapters and their weights. Equal adapters are one adapter under two names."""

    name: str
    made: tuple[Made, ...]
    weights: tuple[float, ...]

    @property
    def exact_rank(self) -> int:
        """The rank that holds the sum exactly."""
        return sum(one.rank for one in self.made)


def cases(seed: int) -> list[Case]:
    """The columns, on adapters of this seed."""
    x, y = Made(2 * seed), Made(2 * seed + 1)
    return [
        Case("one, w=1", (x,), (1.0,)),
        Case("one, w=.5", (x,), (0.5,)),
        Case("x+x at .5/.5", (x, x), (0.5, 0.5)),
        Case("x+y at .5/.5", (x, y), (0.5, 0.5)),
        Case("x-y", (x, y), (1.0, -1.0)),
        Case("ranks 8+4", (x, Made(2 * seed + 1, rank=4, alpha=8)), (1.0, 1.0)),
        Case("alphas 16+4", (x, Made(2 * seed + 1, alpha=4)), (1.0, 1.0)),
        Case("rsLoRA pair", (Made(2 * seed, rslora=True), Made(2 * seed + 1, rslora=True)), (1.0, 1.0)),
    ]


class Model(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, OUTPUTS, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.layer(value)  # type: ignore[no-any-return]


def trained(case: Case) -> Any:
    """A PEFT model that holds the case's adapters as `0`, `1` ..., with normally distributed factors."""
    model: Any = None
    for index, made in enumerate(case.made):
        config = LoraConfig(r=made.rank, lora_alpha=made.alpha, use_rslora=made.rslora, target_modules=["layer"])
        if model is None:
            model = get_peft_model(Model(), config, adapter_name="0")
        else:
            model.add_adapter(str(index), config)
        chance = torch.Generator().manual_seed(made.seed)
        layer = model.base_model.model.layer
        for factor in (layer.lora_A[str(index)], layer.lora_B[str(index)]):
            factor.weight.data = torch.randn(factor.weight.shape, generator=chance)
    return model


@torch.no_grad()
def wanted(case: Case, model: Any) -> Tensor:
    """The weighted sum by its definition, in float64."""
    layer = model.base_model.model.layer
    total = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for index, (made, weight) in enumerate(zip(case.made, case.weights, strict=True)):
        down, up = (side[str(index)].weight.double() for side in (layer.lora_A, layer.lora_B))
        total += weight * made.scale * (up @ down)
    return total


Combine = Callable[[Case, Any, Path], Tensor | None]  # None: the tool refuses


def by_peft(combination: str) -> Combine:
    """PEFT's own combination; `svd` at the rank that is exact."""

    def combine(case: Case, model: Any, room: Path) -> Tensor | None:
        names = [str(index) for index in range(len(case.made))]
        rank = {"svd_rank": min(case.exact_rank, INPUTS)} if combination == "svd" else {}
        try:
            model.add_weighted_adapter(names, list(case.weights), "merged", combination_type=combination, **rank)
        except ValueError as refusal:
            if "same r value" not in str(refusal):
                raise
            return None
        change: Tensor = model.base_model.model.layer.get_delta_weight("merged")
        return change.detach()

    return combine


def by_lorahub(*, truncated: bool = False, loaded: bool = False) -> Combine:
    """Read what PEFT wrote, merge; truncated to the exact rank, or written and loaded by PEFT, where asked."""

    def combine(case: Case, model: Any, room: Path) -> Tensor | None:
        model.save_pretrained(str(room / "inputs"))
        inputs = [read(room / "inputs" / str(index)) for index in range(len(case.made))]
        given = {"rank": case.exact_rank} if truncated else {}
        result = merge(inputs, weights=list(case.weights), given=given).adapter
        if not loaded:
            return result.modules["layer"].dense()
        path = save(result, room / "merged")
        again: Any = PeftModel.from_pretrained(Model(), str(path))
        change: Tensor = again.base_model.model.layer.get_delta_weight("default")
        return change.detach()

    return combine


ROWS: dict[str, Combine] = {
    "lorahub exact": by_lorahub(),
    "lorahub exact, to the exact rank": by_lorahub(truncated=True),
    "lorahub exact, loaded by PEFT": by_lorahub(loaded=True),
    f"PEFT {peft.__version__} linear": by_peft("linear"),
    f"PEFT {peft.__version__} cat": by_peft("cat"),
    f"PEFT {peft.__version__} svd (exact rank)": by_peft("svd"),
}


def error(case: Case, combine: Combine) -> float | None:
    """The relative error of one cell for one seed; None where the tool refuses."""
    model = trained(case)
    target = wanted(case, model)
    with tempfile.TemporaryDirectory() as room:
        got = combine(case, model, Path(room))
    return None if got is None else float((got.double() - target).norm() / target.norm())


def measure(seeds: int) -> dict[str, dict[str, list[float | None]]]:
    """Row -> column -> the error for each seed."""
    return {
        row: {case.name: [error(cases(seed)[i], combine) for seed in range(seeds)] for i, case in enumerate(cases(0))}
        for row, combine in ROWS.items()
    }


def cell(values: list[float | None]) -> str:
    """The worst seed; `refuses` if any does."""
    worst = max((math.inf if value is None else value) for value in values)
    return REFUSES if math.isinf(worst) else f"{worst:.2f}"


def rounding(cells: dict[str, list[float | None]]) -> float:
    """The largest error of a row among the cells that are right."""
    right = [value for values in cells.values() if cell(values) == "0.00" for value in values if value is not None]
    return max(right, default=math.nan)


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 seeds")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = min(arguments.seeds, 3) if arguments.quick else arguments.seeds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    table = measure(seeds)
    columns = [case.name for case in cases(0)]
    width = max(map(len, table)) + 1
    print(f"relative error against the wanted sum, worst of {seeds} seeds; 0.00 is right\n")
    print(" " * width, *(f"{column:>13}" for column in columns))
    for row, cells in table.items():
        print(f"{row:{width}}", *(f"{cell(cells[column]):>13}" for column in columns))
    largest = {row: rounding(cells) for row, cells in table.items()}
    print("\nlargest error among the cells that are 0.00 (float32 rounding):")
    for row, value in largest.items():
        print(f"{row:{width}} {value:.1e}")
    if arguments.json:
        rows = [
            {"row": row, "column": column, "errors": values, "shown": cell(values)}
            for row, cells in table.items()
            for column, values in cells.items()
        ]
        versions = {"peft": peft.__version__, "torch": torch.__version__}
        result = {"seeds": seeds, **versions, "rows": rows, "largest": largest}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
