"""Which merge is best? Every method of lorahub and of PEFT on eight tasks, with experts trained here.

    .venv/bin/python benchmarks/merging.py [--quick] [--seeds N] [--experts DIR] [--data DIR] [--json OUT]

For each seed one LoRA of all-MiniLM-L6-v2 is trained for each of eight tasks, from an initialisation of its own; a
merge of them is asked to do all eight. Figures are accuracies on test sentences divided by that of the task's own
expert, 1 where the merge is as good as the expert: the mean over the tasks and over the seeds, and the spread (standard
deviation) over the seeds. Three tasks that no expert was trained for are measured beside, as plain accuracies. Options
and the common weight of the adapters are chosen on validation sentences, with the same plan for every row
(merging_search.py). Ceiling: one LoRA trained on all tasks together.

`--experts DIR` keeps the trained adapters, so that the next run starts from them. `--quick` shows every row within a
minute, hardly trained, on few sentences: that it runs, not what is better. Needs the extra `train`; `--data` (default
../shared/data beside the checkout) holds checkouts of public repositories: see example_sources.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from example_library import ROOT, STEPS
from merging_experts import QUICK_STEPS, wanted
from merging_judge import Workplace
from merging_pool import crew, measurer, train_missing
from merging_study import Study
from merging_tables import show
from merging_tasks import IN_DOMAIN, OUT_OF_DOMAIN, TEST

QUICK_TASKS, QUICK_OTHERS, QUICK_LIMIT = ("trec-questions", "mpqa-phrases", "snips-assistant"), ("clinc-meta",), 20


def run(place: Workplace, tasks: Sequence[str], others: Sequence[str], seeds: int, workers: int, brief: bool) -> Any:
    """Trains what is missing, chooses, measures; everything that is known afterwards."""
    start = time.perf_counter()
    with crew(place, workers) as pool:
        trained = train_missing(wanted(tasks, seeds), place, tasks, pool)
        training = time.perf_counter() - start
        study = Study(measurer(pool), tasks, others, seeds, brief=brief)
        report = study.report()
    whole = time.perf_counter() - start
    seconds = {
        "training, one thread": round(trained),
        "training, this run": round(training),
        "evaluation, this run": round(whole - training),
        **study.seconds,
    }
    return {"workers": workers, "steps": place.steps, "seconds": seconds, **report}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merges of eight experts by every method, measured on their tasks.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of data set checkouts")
    parser.add_argument("--experts", type=Path, help="where trained experts are kept and found")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    tasks, others = (QUICK_TASKS, QUICK_OTHERS) if options.quick else (IN_DOMAIN, OUT_OF_DOMAIN)
    kept = options.experts is not None and not options.quick
    with nullcontext(options.experts) if kept else tempfile.TemporaryDirectory() as room:
        place = Workplace(
            data=options.data,
            room=Path(room),
            tasks=(*tasks, *others),
            steps=QUICK_STEPS if options.quick else STEPS,
            limit=QUICK_LIMIT if options.quick else TEST,
        )
        report = run(place, tasks, others, 1 if options.quick else options.seeds, options.workers, options.quick)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
