"""What the adapters of retrieval.py are of, and which of them an encoder may learn from.

A concept has wordings for fitting (`told`) and others for queries (`asked`); there are several copies of it, adapters
from seeds of their own. A pair joins two concepts ("watercolor birds"). Every copy plays one part in a split:

    fit      an encoder may learn from it
    known    a new adapter of a concept that the encoder learned
    pairs    a pair that is not in `fit`, while either half is, alone and in other pairs
    unseen   a concept that is nowhere in `fit`
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HELD_BACK = ("known", "pairs", "unseen")
PARTS = ("fit", *HELD_BACK)


@dataclass(frozen=True)
class Concept:
    """What an adapter can be of. kind: "style", "content", "task", "topic" or "pair"; halves: the concepts of a pair,
    by name. The first of `asked` names the concept in plain words, the others go about it."""

    name: str
    kind: str
    told: tuple[str, ...]
    asked: tuple[str, ...]
    halves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Copy:
    """An adapter to be made. number: which copy of its concept it is."""

    concept: str
    number: int
    seed: int
    rank: int
    steps: int


@dataclass(frozen=True)
class Shares:
    """How much is held back: copies of a known concept, and shares of the pairs and of the concepts outside pairs."""

    copies: int = 1
    pairs: float = 0.25
    unseen: float = 0.3


def copies(
    concepts: Sequence[Concept], count: int, ranks: Sequence[int], lengths: Sequence[int], seed: int = 0
) -> list[Copy]:
    """`count` copies of every concept, whose ranks and lengths are dealt out so that neither betrays the concept."""
    found = []
    for concept in concepts:
        deck = _dealt(lengths, count, f"length {seed} {concept.name}")
        hand = _dealt(ranks, count, f"rank {seed} {concept.name}")
        for number in range(count):
            own = drawn(f"adapter {seed} {concept.name} {number}")
            found.append(Copy(concept.name, number, own, hand[number], deck[number]))
    return found


def split(concepts: Sequence[Concept], pool: Sequence[Copy], seed: int, shares: Shares | None = None) -> list[str]:
    """The part that every copy of the pool plays."""
    shares, chance = shares or Shares(), random.Random(f"split {seed}")
    new = set(_new_pairs([one for one in concepts if one.halves], shares.pairs, chance))
    joined = {half for one in concepts for half in one.halves}
    never = set()
    for kind in dict.fromkeys(one.kind for one in concepts):
        free = [one.name for one in concepts if one.kind == kind and not one.halves and one.name not in joined]
        never.update(chance.sample(free, round(shares.unseen * len(free))))
    held = {one.name: _held(one.name, pool, shares.copies, chance) for one in concepts}

    def part(copy: Copy) -> str:
        if copy.concept in never:
            return "unseen"
        if copy.concept in new:
            return "pairs"
        return "known" if copy.number in held[copy.concept] else "fit"

    return [part(copy) for copy in pool]


def queries(
    concepts: Sequence[Concept], pool: Sequence[Copy], parts: Sequence[str], part: str
) -> list[tuple[str, str]]:
    """(wording, concept) of all that is asked for in a part of the split, concept after concept."""
    named = {copy.concept for copy, own in zip(pool, parts, strict=True) if own == part}
    return [(wording, one.name) for one in concepts if one.name in named for wording in one.asked]


def check(concepts: Sequence[Concept]) -> None:
    """Raises ValueError where a query is also a wording for fitting, of whatever concept, or a name stands twice."""
    told = {wording for one in concepts for wording in one.told}
    both = sorted(told & {wording for one in concepts for wording in one.asked})
    if both:
        raise ValueError(f"{both[0]!r} is asked for and learned from; expected two wordings")
    if len({one.name for one in concepts}) < len(concepts):
        raise ValueError("two concepts have one name")


def drawn(purpose: str) -> int:
    """A number below 2**31 that depends on nothing but what it is for."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big") >> 1


def _dealt(values: Sequence[int], count: int, purpose: str) -> list[int]:
    """Each value about equally often, in an order of its own."""
    chance = random.Random(purpose)
    start = chance.randrange(len(values))
    hand = [values[(start + number) % len(values)] for number in range(count)]
    chance.shuffle(hand)
    return hand


def _held(name: str, pool: Sequence[Copy], count: int, chance: random.Random) -> set[int]:
    """The numbers of the copies of a known concept that are kept back."""
    numbers = sorted(copy.number for copy in pool if copy.concept == name)
    return set(chance.sample(numbers, min(count, len(numbers) - 1)))


def _new_pairs(pairs: Sequence[Concept], share: float, chance: random.Random) -> list[str]:
    """Pairs to keep from the encoder: no half loses more than half of its pairs, so that each stays in some."""
    left: dict[str, int] = {}
    for pair in pairs:
        for half in pair.halves:
            left[half] = left.get(half, 0) + 1
    whole: Mapping[str, int] = dict(left)
    found = []
    for pair in chance.sample(list(pairs), len(pairs)):
        if len(found) == round(share * len(pairs)):
            break
        if all(2 * (left[half] - 1) >= whole[half] for half in pair.halves):
            found.append(pair.name)
            for half in pair.halves:
                left[half] -= 1
    return found
