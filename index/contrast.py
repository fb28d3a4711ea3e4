"""Words and adapters side by side: who belongs to whom, the contrastive loss, and how well one finds the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which texts belong to which examples.

    texts: every text once. owned: for each example the indices of its own texts. fitting: bool (texts, examples), true
    where the example has the text itself or belongs to a group of which one has it. alike: bool (examples, examples),
    true where two share a text or a group.
    """

    texts: tuple[str, ...]
    owned: tuple[tuple[int, ...], ...]
    fitting: Tensor
    alike: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], groups: Sequence[str]) -> Pairs:
        """texts, groups: for each example. An empty group is none."""
        every = {text: None for some in texts for text in some}
        number = {text: index for index, text in enumerate(every)}
        owned = tuple(tuple(dict.fromkeys(number[text] for text in some)) for some in texts)
        fitting = torch.zeros(len(number), len(texts), dtype=torch.bool)
        for column, some in enumerate(owned):
            fitting[list(some), column] = True
        together = torch.tensor([[bool(one) and one == two for two in groups] for one in groups])
        shared = (fitting.float().T @ fitting.float()) > 0
        return cls(tuple(every), owned, (fitting.float() @ together.float() > 0) | fitting, shared | together)


def contrast(texts: Tensor, adapters: Tensor, fitting: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE over unit vectors (n, dim), row i of each being a pair: a scalar.

    fitting: bool (n, n), where text i fits adapter j; every fitting one is a target, each as much as the others, so no
    positive is pushed away as a negative. With the diagonal alone this is CLIP's loss times two. scale: the inverse of
    the temperature.
    """
    scores = scale * texts @ adapters.T
    wanted = fitting.to(scores.dtype)
    by_text = wanted / wanted.sum(dim=1, keepdim=True)
    by_adapter = wanted / wanted.sum(dim=0, keepdim=True)
    to_adapters = -(by_text * scores.log_softmax(dim=1)).sum(dim=1).mean()
    to_texts = -(by_adapter * scores.log_softmax(dim=0)).sum(dim=0).mean()
    return to_adapters + to_texts


def reciprocal_rank(scores: Tensor, right: Tensor) -> float:
    """Mean over the rows of 1 / rank of the best right column; rows without one are left out, 0.0 if all are.

    scores, right: (queries, pool). Of equal scores the wrong ones come first.
    """
    able = right.any(dim=1)
    if not bool(able.any()):
        return 0.0
    scores, right = scores[able], right[able]
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    ranks = 1 + ((scores >= best) & ~right).sum(dim=1)
    return float((1 / ranks.double()).mean())


def both_ways(texts: Tensor, adapters: Tensor, fitting: Tensor) -> float:
    """The mean of two mean reciprocal ranks: adapters by words, and words by adapters.

    texts (t, dim), adapters (n, dim); fitting (t, n). Texts that fit none of the adapters are only in the way.
    """
    scores = texts @ adapters.T
    return (reciprocal_rank(scores, fitting) + reciprocal_rank(scores.T, fitting.T)) / 2
