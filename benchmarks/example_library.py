"""Trains the built-in example library: one rank-4 LoRA of all-MiniLM-L6-v2 for each task of example_tasks.toml.

    .venv/bin/python benchmarks/example_library.py [--data DIR] [--out DIR] [--only NAME] [--quick] [--seeds N]
        [--json OUT]

Every adapter is trained on its own, on public sentences, so that a sentence's embedding lies nearest to its label's
name (cross-entropy over cosines; LoRA on query and value of all layers). The script writes a PEFT directory with a
model card for each into `--out` (cli/example by default), tasks.json with held-out sentences that no adapter has seen,
and NOTICE.md. Accuracies are measured on the float16 files as written. `--seeds N` trains every adapter N times and
reports the spread; the first one is kept. `--quick` trains three tasks briefly into a temporary folder. Needs the extra
`train`.

`--data` (default ../shared/data beside the checkout) holds checkouts of public repositories: see example_sources.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from example_sources import HELD_OUT, SOURCES, Pairs, balanced, letters, tidy
from lorahub.generate.sentences import SentenceModel, SentenceTask, load_tasks, unit_means
from lorahub.hub.reading import read
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
BASE = "sentence-transformers/all-MiniLM-L6-v2"
RANK, ALPHA = 4, 8
STEPS, BATCH, RATE, SHARPNESS = 80, 32, 2e-3, 20.0
QUICK_TASKS, QUICK_STEPS = ("clinc-banking", "banking77-top-ups", "trec-questions"), 8
SCRIPT = ".venv/bin/python benchmarks/example_library.py"


@dataclass(frozen=True)
class Lesson:
    """A task, and what its adapter is trained on."""

    task: SentenceTask
    train: Pairs
    source: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies over the seeds, the first of which is the adapter that is kept."""

    name: str
    labels: int
    train_sentences: int
    test_sentences: int
    base: float
    adapter: float
    mean: float
    spread: float
    seconds: float


def lessons(data: Path) -> list[Lesson]:
    """All tasks; what any of them holds out is taken out of everybody's training sentences."""
    specs = tomllib.loads((ROOT / "benchmarks/example_tasks.toml").read_text(encoding="utf-8"))["task"]
    drafts = [_lesson(number, spec, data) for number, spec in enumerate(specs)]
    held_out = {letters(sentence) for draft in drafts for sentence in draft.task.sentences}
    return [replace(draft, train=[p for p in draft.train if letters(p[0]) not in held_out]) for draft in drafts]


def _lesson(number: int, spec: Mapping[str, Any], data: Path) -> Lesson:
    source = SOURCES[spec["source"]]
    train, test = map(tidy, source.read(data / source.folder, spec.get("part", ""), spec.get("labels", ())))
    labels = tuple(spec.get("labels") or sorted({label for _, label in test}))
    drawn = balanced(test, labels, HELD_OUT)
    task = SentenceTask(
        name=spec["name"],
        description=spec["description"],
        labels=labels,
        sentences=tuple(text for text, _ in drawn),
        targets=tuple(labels.index(label) for _, label in drawn),
        source=f"{source.title} ({source.url})",
        licence=source.licence,
        queries=tuple(spec["queries"]),
    )
    return Lesson(task, train, spec["source"], seed=number)


def train(
    model: SentenceModel, lessons: Sequence[Lesson], seed: int, steps: int, rank: int = RANK
) -> dict[str, Tensor]:
    """PEFT's tensors of the adapter trained on one lesson, or on several in turn; each step is one lesson's."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(seed)
    draw = random.Random(seed)
    config = LoraConfig(r=rank, lora_alpha=rank * ALPHA // RANK, target_modules=["query", "value"])
    adapted = get_peft_model(copy.deepcopy(model.encoder), config)
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    pupils = [(lesson.task.labels, _piles(lesson)) for lesson in lessons]
    for step in range(steps):
        labels, piles = pupils[step % len(pupils)]
        targets = [draw.randrange(len(labels)) for _ in range(BATCH)]
        sentences = [draw.choice(piles[target]) for target in targets]
        with torch.autocast("cpu", torch.bfloat16):
            cosines = _vectors(adapted, model, sentences) @ _vectors(adapted, model, labels).T
        loss = nn.functional.cross_entropy(SHARPNESS * cosines.float(), torch.tensor(targets))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)  # type: ignore[no-any-return]


def _piles(lesson: Lesson) -> list[list[str]]:
    """The sentences to train on, label by label."""
    return [[text for text, name in lesson.train if name == label] for label in lesson.task.labels]


def _vectors(encoder: nn.Module, model: SentenceModel, sentences: Sequence[str]) -> Tensor:
    ids, mask = model.tokens(sentences)
    states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    vectors: Tensor = unit_means(states.float(), mask)
    return vectors


def write_adapter(folder: Path, state: Mapping[str, Tensor], rank: int = RANK) -> None:
    """A PEFT directory in float16 with scale 1: half of alpha / rank, as a root, in either factor."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    root = math.sqrt(ALPHA / RANK)
    tensors = {name: (tensor.detach() * root).to(torch.float16).contiguous() for name, tensor in sorted(state.items())}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = {
        "base_model_name_or_path": BASE,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["query", "value"],
        "task_type": "FEATURE_EXTRACTION",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def card(lesson: Lesson, row: Row, steps: int) -> str:
    """The model card: front matter as the Hugging Face hub reads it, then what the adapter does and how well."""
    task, source = lesson.task, SOURCES[lesson.source]
    return f"""---
library_name: peft
base_model: {BASE}
license: apache-2.0
tags:
- lora
- sentence-classification
- {lesson.source}
---

# {task.name}

{task.description}

A rank-{RANK} LoRA on query and value of all six layers. A sentence belongs to the label whose name lies nearest by
cosine, sentence and label names both embedded with this adapter (mean pooling, length 1); there is no task head.

Labels: {", ".join(task.labels)}.

| {len(task.sentences)} held-out sentences | accuracy |
|---|---|
| base model | {row.base:.3f} |
| with this adapter | {row.adapter:.3f} |

Trained on {len(lesson.train)} sentences of {source.title}, {source.url}
({source.licence}; {source.credit}), {steps} steps of {BATCH} sentences, seed {lesson.seed}:

    {SCRIPT} --only {task.name}
"""


def notice() -> str:
    """Who made what the example is built from, and the terms it comes under."""
    lines = [
        "# Sources of the example library",
        "",
        f"The adapters change {BASE} (Apache-2.0), are trained by",
        "benchmarks/example_library.py and are licensed as lorahub is (Apache-2.0). The sentences in tasks.json",
        "come from the data sets below, under their terms; white space was made even and HTML entities were",
        "resolved, nothing else was changed. A licence given as distributed in a repository is the one that the",
        "repository states for itself; the authors of those sentences publish them for research and state no",
        "licence there.",
        "",
    ]
    for source in SOURCES.values():
        lines += [f"- **{source.title}**: {source.credit}. {source.url}. {source.licence}."]
    return "\n".join(lines) + "\n"


def learn(model: SentenceModel, lesson: Lesson, out: Path, steps: int, seeds: int) -> Row:
    """Trains, writes and measures one lesson's adapter; the first seed's is kept in `out`."""
    task, start, reached = lesson.task, time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for run in range(seeds):
            folder = out / task.name if run == 0 else Path(scratch) / str(run)
            write_adapter(folder, train(model, [lesson], lesson.seed + 1000 * run, steps))
            reached.append(model.accuracy(read(folder), task))
    row = Row(
        name=task.name,
        labels=len(task.labels),
        train_sentences=len(lesson.train),
        test_sentences=len(task.sentences),
        base=round(model.accuracy(None, task), 4),
        adapter=round(reached[0], 4),
        mean=round(statistics.mean(reached), 4),
        spread=round(statistics.stdev(reached), 4) if seeds > 1 else 0.0,
        seconds=round(time.perf_counter() - start, 1),
    )
    (out / task.name / "README.md").write_text(card(lesson, row, steps), encoding="utf-8")
    return row


def write_task(path: Path, lesson: Lesson, row: Row) -> None:
    """Adds one task to tasks.json; the others keep their records."""
    tasks = load_tasks(path) if path.exists() else {}
    tasks[row.name] = replace(lesson.task, base_accuracy=row.base, adapter_accuracy=row.adapter)
    path.write_text("[\n" + ",\n".join(map(_record, tasks.values())) + "\n]\n", encoding="utf-8")


def _record(task: SentenceTask) -> str:
    """One field a line, so that a change of one task is a small difference."""
    fields = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in asdict(task).items())
    return "{" + ",\n ".join(fields) + "}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the built-in example library.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of data set checkouts")
    parser.add_argument("--out", type=Path, default=ROOT / "cli/example")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="train this task; repeatable")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if options.quick else options.out
        steps = QUICK_STEPS if options.quick else STEPS
        names = options.only or (QUICK_TASKS if options.quick else ())
        chosen = [lesson for lesson in lessons(options.data) if not names or lesson.task.name in names]
        model, rows = SentenceModel(), []
        print(f"{'task':26} {'labels':>6} {'base':>6} {'adapter':>8} {'mean':>6} {'spread':>7} {'seconds':>8}")
        for lesson in chosen:
            row = learn(model, lesson, out, steps, options.seeds)
            rows.append(row)
            write_task(out / "tasks.json", lesson, row)
            figures = f"{row.base:6.3f} {row.adapter:8.3f} {row.mean:6.3f} {row.spread:7.3f} {row.seconds:8.1f}"
            print(f"{row.name:26} {row.labels:6} {figures}", flush=True)
        (out / "NOTICE.md").write_text(notice(), encoding="utf-8")
    if options.json:
        report = {"base": BASE, "rank": RANK, "steps": steps, "seeds": options.seeds, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
