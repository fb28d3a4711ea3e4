"""How fast many adapters are trained at once, against the same ones one by one, and against PEFT.

Two worlds: all-MiniLM-L6-v2 on the example's tasks (query and value, losses by label names), and a diffusion
transformer of 6 layers, width 192, for 32 x 32 pictures, with random weights (attention and feed-forward, flow
matching). Sixteen adapters of ranks 4 and 8 in turn, with 4, 8 or 32 samples each a step, in float32 and with autocast
to bfloat16. `at once` is one call of `train` for all; `one by one` a call for each; `PEFT` a usual loop for each, with
the same beginnings and batches (of four of the adapters, taken four times). As a row's passes hold at most so many
samples, `a pass` says how many adapters shared one. Seconds are those of one step of all 16 adapters, without each
run's first. `apart` is the largest difference between an adapter at once and alone, relative to what it has learned,
after all steps of the row; the first steps of AdamW are signs, so that entries whose gradient is little but rounding
weigh most there. --quick trains 2 to 6 at
once and takes one of them alone and by PEFT for all, for one step after the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorahub.generate.experts import Pupil, Trained
    from lorahub.hub.adapter import Adapter
    from torch import Tensor, nn

COUNT = 16
QUICK_COUNT = {4: 6, 8: 4, 32: 2}  # by samples an adapter
STEPS = {4: 50, 8: 10, 32: 3}  # after the first, by samples an adapter
BRIEFER = 5  # times fewer where nothing but the speed is of interest: with autocast
PEFT_COUNT = 4  # adapters that PEFT trains; its time is that of these, times COUNT / PEFT_COUNT
RATE = 2e-3
SPEED_BAR, EQUALITY_BAR = 2.0, 1e-4
ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A frozen model, its layers that learn, their loss, pupils for a batch size and seed, and samples a pass."""

    name: str
    model: nn.Module
    paths: list[str]
    loss: Callable[[Any, Sequence[Any]], Tensor]
    pupils: Callable[[int, int], list[Pupil[Any]]]
    samples: int


def sentences() -> World:
    """The sentence model and the tasks of the built-in example."""
    from lorahub.generate.experts import Pupil, linear_paths
    from lorahub.generate.lessons import label_names, sorting
    from lorahub.generate.sentences import SentenceModel, load_tasks

    model = SentenceModel()
    tasks = list(load_tasks(ROOT / "cli/example/tasks.json").values())[:COUNT]

    def pupils(size: int, seed: int) -> list[Pupil[Any]]:
        return [
            Pupil(t.name, sorting(model, t.sentences, t.targets, t.labels, size=size), 100 * seed + n, 4 + n % 2 * 4)
            for n, t in enumerate(tasks)
        ]

    paths = linear_paths(model.encoder, ["query", "value"])
    return World("sentences", model.encoder, paths, label_names, pupils, samples=128)


def pictures() -> World:
    """A diffusion transformer with random weights, and noise for pictures: the time does not depend on either."""
    import torch
    from diffusers import PixArtTransformer2DModel
    from lorahub.generate.experts import Pupil, linear_paths
    from lorahub.generate.lessons import flow_matching, noising

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=48, in_channels=3, out_channels=3, num_layers=6, sample_size=32,
        patch_size=4, cross_attention_dim=192, caption_channels=384, use_additional_conditions=False,
    ).eval()  # fmt: skip
    data = torch.rand(64, 3, 32, 32) * 2 - 1
    words = {"encoder_hidden_states": torch.randn(64, 16, 384), "encoder_attention_mask": torch.ones(64, 16)}

    def pupils(size: int, seed: int) -> list[Pupil[Any]]:
        draw = noising(data, words, size=size)
        return [Pupil(f"style-{n}", draw, 100 * seed + n, 4 + n % 2 * 4) for n in range(COUNT)]

    paths = linear_paths(model, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"])
    return World("pictures", model, paths, flow_matching, pupils, samples=64)


WORLDS = {"sentences": sentences, "pictures": pictures}


# --- what is measured -----------------------------------------------------------------------------------------------


def ours(world: World, pupils: list[Pupil[Any]], steps: int, autocast: bool, together: int) -> tuple[float, Trained]:
    """Seconds a step, without the first, and what was trained."""
    from lorahub.generate.experts import one_cycle, train

    clock: list[float] = []
    result = train(
        world.model, world.paths, pupils, world.loss, steps=steps + 1, rate=RATE, schedule=one_cycle, autocast=autocast,
        together=together, checkpoints=[0], progress=lambda *_: clock.append(time.perf_counter()),
    )  # fmt: skip
    return (clock[-1] - clock[0]) / steps, result


def peft(world: World, pupil: Pupil[Any], start: Adapter, steps: int, autocast: bool) -> tuple[float, Adapter]:
    """The same by PEFT, as a user writes it."""
    import torch
    from lorahub.generate.experts import generator, one_cycle
    from lorahub.hub.adapter import Adapter
    from lorahub.hub.lowrank import LowRank
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=pupil.rank, lora_alpha=pupil.scale * pupil.rank, target_modules=world.paths)
    model = get_peft_model(copy.deepcopy(world.model), config).eval()
    layers: dict[str, Any] = {path: model.base_model.model.get_submodule(path) for path in world.paths}
    for path, layer in layers.items():
        layer.lora_A["default"].weight.data = start.modules[path].down.clone()
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=RATE)
    rates = one_cycle(optimizer, steps + 1)
    clock = []
    for step in range(steps + 1):
        batch = pupil.batch(step, generator(pupil.seed, f"batch {step}"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = world.loss(model, [batch])[0]
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        rates.step()
        clock.append(time.perf_counter())
    factors = {path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for path, layer in layers.items()}
    modules = {path: LowRank(down.detach(), up.detach(), pupil.scale) for path, (down, up) in factors.items()}
    return (clock[-1] - clock[0]) / steps, Adapter(modules)


def apart(one: Adapter, other: Adapter) -> float:
    """||delta - delta'|| / ||delta'|| over all modules, multiplied out."""
    pairs = [(one.modules[name].dense().double(), other.modules[name].dense().double()) for name in other.modules]
    distance = sum(float((a - b).square().sum()) for a, b in pairs)
    return (distance / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def row(world: World, size: int, autocast: bool, seed: int, quick: bool) -> Row:
    """One row of the table for one seed."""
    count, alone, steps = (QUICK_COUNT[size], 1, 1) if quick else (COUNT, COUNT, STEPS[size])
    if autocast:
        steps = max(steps // BRIEFER, min(steps, 3))
    by_loop = min(alone, PEFT_COUNT)
    together = max(1, min(count, world.samples // size))
    pupils = world.pupils(size, seed)[:count]
    seconds, trained = ours(world, pupils, steps, autocast, together)
    singles = [ours(world, [pupil], steps, autocast, 1) for pupil in pupils[:alone]]
    starts = trained.checkpoints[0]
    loops = [peft(world, pupil, starts[n], steps, autocast) for n, pupil in enumerate(pupils[:by_loop])]
    by_ones = sum(own for own, _ in singles) * count / alone
    by_peft = sum(own for own, _ in loops) * count / by_loop
    return {
        "world": world.name,
        "arithmetic": "bfloat16" if autocast else "float32",
        "samples": size,
        "adapters": count,
        "pass": together,
        "steps": steps + 1,
        "at_once": seconds,
        "one_by_one": by_ones,
        "peft": by_peft,
        "times_one_by_one": by_ones / seconds,
        "times_peft": by_peft / seconds,
        "apart": max(apart(trained.adapters[n], one.adapters[0]) for n, (_, one) in enumerate(singles)),
        "apart_peft": max(apart(trained.adapters[n], one) for n, (_, one) in enumerate(loops)),
    }


# --- the table ------------------------------------------------------------------------------------------------------


def merged(rows: Sequence[Row]) -> Row:
    """Medians over the seeds; the largest of differences."""
    return {
        key: value
        if isinstance(value, (str, int))
        else (max if key.startswith("apart") else statistics.median)([one[key] for one in rows])
        for key, value in rows[0].items()
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The table's rows, each as soon as it is there."""
    for name, make in WORLDS.items():
        if arguments.world not in (name, "both"):
            continue
        world = make()
        for autocast in (True, False):
            for size in STEPS:
                yield merged([row(world, size, autocast, seed, arguments.quick) for seed in range(arguments.seeds)])


def printed(one: Row) -> str:
    """A row as the table shows it."""
    return (
        f"{one['world']:10} {one['arithmetic']:9} {one['samples']:>7} {one['adapters']:>8} {one['pass']:>6} "
        f"{one['steps']:>5} {one['at_once']:8.3f} {one['one_by_one']:10.3f} {one['peft']:8.3f} "
        f"{one['times_one_by_one']:13.2f} {one['times_peft']:7.2f} {one['apart']:9.1e} {one['apart_peft']:9.1e}"
    )


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer adapters, one of them alone, one timed step")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--world", choices=[*WORLDS, "both"], default="both")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    # threads that spin while they wait ruin all times on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; seconds for a step of all adapters\n")
    print(
        f"{'world':10} {'':9} {'samples':>7} {'adapters':>8} {'a pass':>6} {'steps':>5} {'at once':>8} "
        f"{'one by one':>10} {'PEFT':>8} {'x one by one':>13} {'x PEFT':>7} {'apart':>9} {'from PEFT':>9}"
    )
    rows = []
    for one in measure(arguments):
        rows.append(one)
        print(printed(one), flush=True)
    print(
        f"\nexpected: in float32 at most {EQUALITY_BAR} apart after {STEPS[4] + 1} steps; at least "
        f"{SPEED_BAR:.0f} times as fast as one by one in some row"
    )
    if arguments.json:
        report = {"threads": arguments.threads, "seeds": arguments.seeds, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
