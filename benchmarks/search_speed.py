"""How fast a large library is searched, and how fast adapters are encoded.

Search: a million vectors of 384 numbers, exact and in lists (`index.ann`), in one run: recall of the lists against the
exact index, time of a query, memory, time to build. The vectors are made from all-MiniLM-L6-v2 embeddings of real
sentences, because vectors without structure are like no library's. "texts": each lies somewhere between one sentence
and a second (up to half way), with noise of length 0.1 to 0.4. "mixtures", which is harder: each is a random mixture of
three sentences with noise of length 0.2, so that it has no near neighbour. The sentences are those of the built-in
example; queries are the embeddings of others among them, which no vector was made from.

Encoding: files in the built-in picture base's shapes (60 modules, 192x192 or its feed-forward widths, rank 4), read in
turn as often as it takes; each encoder's time for an adapter beside what reading its file takes, and its bytes alone.
All of it on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from lorahub.generate.sentences import load_tasks
from lorahub.index import ann
from lorahub.index.encoders.text import text
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lorahub.hub.adapter import Adapter
    from lorahub.index.weight_encoder import WeightEncoder

Vectors = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[1]
PORTION = 50_000
DIM = 384
BARS = {"recall@10": 0.98, "speedup": 20.0, "speedup aimed at": 100.0, "times reading aimed at": 2.0}


class Sizes(NamedTuple):
    """How much is measured."""

    vectors: int
    sentences: int
    queries: int
    adapters: int
    files: int


FULL = Sizes(1_000_000, 2_800, 400, 10_000, 300)
QUICK = Sizes(20_000, 150, 50, 40, 16)


# --- search ---------------------------------------------------------------------------------------------------------


def embedded(sizes: Sizes) -> tuple[Vectors, Vectors]:
    """Unit vectors of sentences to make a library from, and of others to ask with."""
    tasks = load_tasks(ROOT / "cli/example/tasks.json").values()
    said = sorted({sentence for task in tasks for sentence in task.sentences})
    chosen = np.random.default_rng(0).permutation(len(said))[: sizes.sentences + sizes.queries]
    vectors = text().encode([said[place] for place in chosen])
    return vectors[sizes.queries :], vectors[: sizes.queries]


def library(kind: str, count: int, origins: Vectors) -> Vectors:
    """`count` unit vectors made from the sentences' (n, dim); see the top of this file for the kinds."""
    chance = np.random.default_rng(1)
    made = np.empty((count, DIM), np.float32)
    for start in range(0, count, PORTION):
        size = min(PORTION, count - start)
        picked = origins[chance.integers(len(origins), size=(size, 2 if kind == "texts" else 3))]
        if kind == "texts":
            part = chance.uniform(0, 0.5, (size, 1)).astype(np.float32)
            shares, length = np.hstack([1 - part, part]), chance.uniform(0.1, 0.4, (size, 1)).astype(np.float32)
        else:
            shares, length = chance.dirichlet([0.5] * 3, size).astype(np.float32), np.float32(0.2)
        noise = chance.standard_normal((size, DIM), np.float32) * (length / np.float32(np.sqrt(DIM)))
        made[start : start + size] = ann.unit(ann.unit(np.einsum("nk,nkd->nd", shares, picked)) + noise)
    return made


def clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def per_query(index: Any, queries: Vectors, limit: int) -> float:
    """Median seconds of a query, asked one by one."""
    seconds = []
    for query in queries:
        began = time.perf_counter()
        ann.nearest(index, query[None], limit)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def size_of(index: Any) -> int:
    """Bytes of an index, which lie in memory as they do in its file."""
    import faiss

    return len(faiss.serialize_index(index))


def search_rows(kind: str, sizes: Sizes, origins: Vectors, queries: Vectors) -> Iterator[dict[str, Any]]:
    """The exact index, then the lists."""
    vectors = library(kind, sizes.vectors, origins)
    index, seconds = clocked(lambda: ann.build(vectors, approximate=False))
    few = queries[:40]
    exact = {limit: per_query(index, few, limit) for limit in (10, 200)}
    row = {"library": kind, "index": "exact", "vectors": len(vectors), "build s": seconds, "bytes": size_of(index)}
    yield {**row, "query ms": 1e3 * exact[10], "query@200 ms": 1e3 * exact[200], "recall@10": 1.0, "recall@200": 1.0}
    del index
    index, seconds = clocked(lambda: ann.build(vectors, approximate=True))
    own = {limit: per_query(index, queries, limit) for limit in (10, 200)}
    row |= {"index": "lists", "build s": seconds, "bytes": size_of(index), "lists looked into": ann.breadth(index)}
    row |= {f"recall@{limit}": ann.recall(index, vectors, queries, limit) for limit in (10, 200)}
    row |= {"query ms": 1e3 * own[10], "query@200 ms": 1e3 * own[200]}
    yield {**row, "speedup": exact[10] / own[10], "speedup@200": exact[200] / own[200]}


# --- encoding -------------------------------------------------------------------------------------------------------


def write_adapters(folder: Path, count: int) -> list[Path]:
    """Files of random adapters in the picture base's shapes."""
    from safetensors.numpy import save_file

    paths = []
    widths = {"ff.net.0.proj": (192, 768), "ff.net.2": (768, 192)}
    leaves = [f"attn{k}.{leaf}" for k in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")] + list(widths)
    for number in range(count):
        chance = np.random.default_rng(number)
        tensors = {}
        for block in range(6):
            for leaf in leaves:
                inputs, outputs = widths.get(leaf, (192, 192))
                stem = f"transformer.transformer_blocks.{block}.{leaf}"
                tensors[f"{stem}.lora_A.weight"] = chance.standard_normal((4, inputs)).astype(np.float16)
                tensors[f"{stem}.lora_B.weight"] = chance.standard_normal((outputs, 4)).astype(np.float16)
        paths.append(folder / f"{number:04d}.safetensors")
        save_file(tensors, paths[-1])
    return paths


class Random:
    """Stands for a text encoder: how long weights take to encode does not depend on the words."""

    space = "random"
    dim = DIM

    def encode(self, texts: Sequence[str]) -> Vectors:
        return ann.unit(np.random.default_rng(0).standard_normal((len(texts), DIM)))


def encoders(adapters: Sequence[Adapter]) -> Iterator[WeightEncoder]:
    """One of each kind with its default options, hardly fitted."""
    from lorahub.index.fitting import Example, Settings, fit
    from lorahub.index.weight_encoder import KINDS

    examples = [Example(adapter, (f"text {number}",)) for number, adapter in enumerate(adapters)]
    for kind in KINDS:
        yield fit(kind, examples, Random(), Settings(steps=1, held_out=0.0, refit=False))


def read_all(adapter: Adapter) -> None:
    """Read every factor, as anything that uses an adapter must."""
    for module in adapter.modules.values():
        assert module.rank == 4


def encoding_rows(sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """Bytes, reading, and each kind of encoder, per adapter."""
    from lorahub.hub.reading import read

    paths = write_adapters(folder, sizes.files)
    turns = [paths[number % len(paths)] for number in range(sizes.adapters)]
    made = list(encoders([read(path) for path in paths[:16]]))

    def each(work: Callable[[Path], object]) -> float:
        return clocked(lambda: [work(path) for path in turns])[1] / len(turns)

    for path in paths:  # into the page cache
        path.read_bytes()
    reading = each(lambda path: read_all(read(path)))
    yield {"row": "the file's bytes", "ms": 1e3 * each(lambda path: len(path.read_bytes()))}
    yield {"row": "read the adapter", "ms": 1e3 * reading}
    for encoder in made:
        encoder.encode(read(paths[0]))  # builds the network
        seconds = clocked(lambda: encoder.encode_all(map(read, turns)))[1] / len(turns)  # noqa: B023
        yield {"row": f"read and encode: {encoder.kind}", "ms": 1e3 * seconds, "times reading": seconds / reading}


def show_search(rows: Sequence[dict[str, Any]]) -> None:
    """The table of search."""
    heads = ("library", "index", "query ms", "speedup", "recall@10", "recall@200", "query@200 ms", "build s", "MiB")
    print("".join(f"{head:>14}" for head in heads))
    for row in rows:
        row["MiB"] = row["bytes"] / 2**20
        cells = [row.get(head, "") for head in heads]
        print("".join(f"{c:>14.3f}" if isinstance(c, float) else f"{c:>14}" for c in cells))


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 vectors, 40 adapters")
    parser.add_argument("--vectors", type=int)
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--only", choices=("search", "encoding"))
    parser.add_argument("--seeds", type=int, default=1, help="accepted like every benchmark's; a run is one seed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    sizes = sizes._replace(vectors=given.vectors or sizes.vectors, adapters=given.adapters or sizes.adapters)
    rows: list[dict[str, Any]] = []
    encoding: list[dict[str, Any]] = []
    if given.only != "encoding":
        origins, queries = embedded(sizes)
        for kind in ("texts", "mixtures"):
            rows += search_rows(kind, sizes, origins, queries)
        print(f"{sizes.vectors:,} vectors of {DIM} numbers, {len(queries)} queries, one thread\n")
        show_search(rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\nmost memory that the process had: {peak:.1f} GiB, the vectors themselves among it")
    if given.only != "search":
        with tempfile.TemporaryDirectory() as folder:
            encoding = list(encoding_rows(sizes, Path(folder)))
        print(f"\n{sizes.adapters:,} adapters from {sizes.files} files of 60 modules, rank 4, one thread\n")
        for row in encoding:
            times = f"{row['times reading']:6.2f} x reading" if "times reading" in row else ""
            print(f"{row['row']:32} {row['ms']:9.3f} ms  {times}")
    print(f"\nexpected: {', '.join(f'{name} {bar:g}' for name, bar in BARS.items())}")
    if given.json:
        result = {"sizes": sizes._asdict(), "bars": BARS, "search": rows, "encoding": encoding}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
