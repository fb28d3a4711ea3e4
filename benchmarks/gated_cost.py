"""What adapters cost at run time: gated fusion and the plain sum against diffusers' own layers, in one run.

A pass is one call of the model for one step of guided sampling, so on twice as many inputs as pictures. Three adapters
of rank 8 act on all linear layers that such adapters commonly have (attention, feed-forward, output). Rows:

    base                   the model alone
    set_adapters           diffusers: load_lora_adapter three times, set_adapters (PEFT's layers); the reference
    sum                    lorahub's `fused` without gates: the same outputs
    gated, no global       AutoLoRA's gates
    gated                  with the global adapter of rank 2 as a fourth

Models: the picture world's transformer, and a small UNet of Stable Diffusion's make, with random weights. Passes of all
rows take turns; figures are medians over turns, and ratios the medians of ratios within a turn. `ready` is what it
costs once to enter the block, for a picture's some thirty passes. Bar: gated at most 1.6 times set_adapters.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorahub.hub.adapter import Adapter
    from lorahub.merge.gates import Gates
    from torch import Tensor, nn

COUNT, RANK, BAR = 3, 8, 1.6
WEIGHTS = [1.0, 0.7, 0.5]
REFERENCE = "set_adapters"
LEAVES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out")
Row = dict[str, Any]


def models() -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """Name -> its component's name, what makes it with random weights."""
    from diffusers import UNet2DConditionModel
    from lorahub.generate.pictures import transformer

    def unet() -> nn.Module:
        kinds = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
        made: nn.Module = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192), layers_per_block=1,
            down_block_types=kinds, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=384, attention_head_dim=8,
        )  # fmt: skip
        return made

    return {"picture transformer": ("transformer", transformer), "small UNet": ("unet", unet)}


def adaptable(model: nn.Module) -> Any:
    """A copy that can load adapters by itself, as models of diffusers do that its pipelines load adapters into."""
    from diffusers.loaders import PeftAdapterMixin

    kind = type(model)
    if not issubclass(kind, PeftAdapterMixin):
        kind = type(kind.__name__, (kind, PeftAdapterMixin), {})
    twin: Any = kind.from_config(model.config)  # type: ignore[attr-defined]
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False).eval()


def made(model: nn.Module, component: str, seed: int) -> Adapter:
    """An adapter with normally distributed factors, a tenth of the size of what the layers put out."""
    import torch
    from lorahub.hub.adapter import Adapter
    from lorahub.hub.lowrank import LowRank

    chance, modules = torch.Generator().manual_seed(seed), {}
    for path, layer in model.named_modules():
        if path.endswith(LEAVES) and isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            down = torch.randn(RANK, columns, generator=chance) / columns**0.5
            up = 0.1 * torch.randn(rows, RANK, generator=chance) / RANK**0.5
            modules[f"{component}.{path}"] = LowRank(down, up)
    return Adapter(modules, "random", {}, {"name": f"random{seed}"})


def given(model: Any, pictures: int, chance: Any) -> dict[str, Tensor]:
    """A guided step's inputs: noise, 16 token states a prompt, the timestep."""
    import torch

    count, size = 2 * pictures, model.config.sample_size
    return {
        "noise": torch.randn(count, model.config.in_channels, size, size, generator=chance),
        "timestep": torch.full((count,), 500.0),
        "encoder_hidden_states": torch.randn(count, 16, 384, generator=chance),
    }


def passed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """One pass."""
    rest = {name: value for name, value in inputs.items() if name != "noise"}
    result: Tensor = model(inputs["noise"], **rest, return_dict=False)[0]
    return result


class Bench:
    """One base with its adapters; every row has a copy of its own, on which its adapters act until `close`."""

    def __init__(self, component: str, make: Callable[[], nn.Module], seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        self.component, self.base = component, make().requires_grad_(False).eval()
        self.adapters = [made(self.base, component, COUNT * seed + i) for i in range(COUNT)]
        self.blocks, self.ready = ExitStack(), dict[str, float]()
        self.rows = {"base": self.base, REFERENCE: self.theirs()}
        for name, gates in {"sum": None, "gated, no global": self.gates(0, seed), "gated": self.gates(2, seed)}.items():
            self.rows[name] = self.ours(name, gates)

    def gates(self, rank: int, seed: int) -> Gates:
        """Untrained gates, as published, with a global adapter of `rank`."""
        from lorahub.merge.gated import carried, widths
        from lorahub.merge.gates import Gates, Recipe

        layers = widths(self.base, list(carried(self.adapters, WEIGHTS, self.component)))
        return Gates(layers, Recipe(global_rank=rank), seed=seed).requires_grad_(False)

    def theirs(self) -> Any:
        """The base with the adapters as diffusers loads them."""
        from lorahub.hub.writing import save

        model = adaptable(self.base)
        with tempfile.TemporaryDirectory() as folder:
            for one in self.adapters:
                file = save(one, Path(folder) / one.name, "diffusers")
                model.load_lora_adapter(str(file), prefix=self.component, adapter_name=one.name)
        model.set_adapters([one.name for one in self.adapters], WEIGHTS)
        return model

    def ours(self, name: str, gates: Gates | None) -> nn.Module:
        """A copy of the base inside a block of `fused`."""
        from lorahub.merge.gated import fused

        model = copy.deepcopy(self.base)
        began = time.perf_counter()
        self.blocks.enter_context(fused(model, self.adapters, gates, WEIGHTS, component=self.component))
        self.ready[name] = time.perf_counter() - began
        return model


def turns(bench: Bench, inputs: dict[str, Tensor], count: int) -> dict[str, list[float]]:
    """Seconds of every row's passes, `count` after one that warms up."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in bench.rows}
    with torch.inference_mode():
        for _ in range(count + 1):
            for name, model in bench.rows.items():
                began = time.perf_counter()
                passed(model, inputs)
                seconds[name].append(time.perf_counter() - began)
    return {name: all_[1:] for name, all_ in seconds.items()}


def distance(bench: Bench, inputs: dict[str, Tensor]) -> float:
    """How far our plain sum is from diffusers', relative to what the adapters change."""
    import torch

    with torch.inference_mode():
        base, theirs, ours = (passed(bench.rows[name], inputs) for name in ("base", REFERENCE, "sum"))
    return float((ours - theirs).norm() / (theirs - base).norm())


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Every model's table at each number of pictures."""
    import torch

    rows = []
    for name, (component, make) in models().items():
        for pictures, count in ((1, 20), (4, 5)) if arguments.quick else ((1, 100), (4, 40), (16, 12)):
            seconds: dict[str, list[float]] = {}
            ready: dict[str, list[float]] = {}
            off = 0.0
            for seed in range(arguments.seeds):
                bench = Bench(component, make, seed)
                with bench.blocks:
                    inputs = given(bench.base, pictures, torch.Generator().manual_seed(seed))
                    off = max(off, distance(bench, inputs))
                    for row, values in turns(bench, inputs, count).items():
                        seconds.setdefault(row, []).extend(values)
                for row, value in bench.ready.items():
                    ready.setdefault(row, []).append(value)
            rows += table(name, pictures, seconds, ready, off)
    return rows


def table(
    model: str, pictures: int, seconds: dict[str, list[float]], ready: dict[str, list[float]], off: float
) -> list[Row]:
    """The rows of one model and number of pictures."""
    theirs = seconds[REFERENCE]
    return [
        {
            "model": model,
            "pictures": pictures,
            "row": row,
            "seconds": statistics.median(values),
            "ratio": statistics.median(value / other for value, other in zip(values, theirs, strict=True)),
            "ready": statistics.median(ready[row]) if row in ready else None,
            **({"sum_off": off} if row == "sum" else {}),
        }
        for row, values in seconds.items()
    ]


def print_table(rows: list[Row]) -> None:
    """All figures."""
    for (model, pictures), group in groupby(rows, key=lambda row: (row["model"], row["pictures"])):
        print(f"{model}, {pictures} picture{'s' if pictures > 1 else ''}\n")
        print(f"{'':20} {'ms a pass':>10} {'x set_adapters':>15} {'ready, ms':>10}")
        for row in group:
            ready = f"{1000 * row['ready']:10.1f}" if row["ready"] is not None else ""
            print(f"{row['row']:20} {1000 * row['seconds']:10.2f} {row['ratio']:15.2f} {ready}")
        print()
    gated = max(row["ratio"] for row in rows if row["row"] == "gated")
    off = max(row.get("sum_off", 0.0) for row in rows)
    print(f"gated: at most {gated:.2f} times set_adapters; expected: at most {BAR}")
    print(f"sum: off by {off:.1e} of what the adapters change")


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer passes, and no more than 4 pictures at once")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch's, for all rows")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    # threads that spin while they wait ruin all times on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    print_table(rows)
    if arguments.json:
        result = {"threads": arguments.threads, "seeds": arguments.seeds, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
