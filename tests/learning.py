"""Small worlds to learn in: a model, its layers, what there is to learn, and the loss of one adapter as an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lorahub.generate.experts import Pupil, Trained, linear_paths, train
from lorahub.generate.lessons import Noised, Sorting, flow_matching, label_names, noising
from torch import Tensor, nn

RATE = 2e-3
RANKS = (2, 3, 1, 4)


@dataclass(frozen=True)
class World:
    """A small model, the layers that learn in it, what pupils learn from, and the same loss written for one of them."""

    model: nn.Module
    paths: list[str]
    draw: Callable[[int, torch.Generator], Any]
    loss: Callable[[Any, Sequence[Any]], Tensor]
    alone: Callable[[Any, Any], Tensor]

    def pupils(self, count: int, **given: Any) -> list[Pupil[Any]]:
        return [
            Pupil(f"p{n}", self.draw, seed=n, **{"rank": RANKS[n % 4], "scale": (2.0, 0.5, 1.0)[n % 3], **given})
            for n in range(count)
        ]

    def train(self, pupils: Sequence[Pupil[Any]], steps: int = 3, **given: Any) -> Trained:
        return train(self.model, self.paths, pupils, self.loss, steps=steps, **{"rate": RATE, **given})


def painter() -> World:
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=8,
            patch_size=4, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
        )  # fmt: skip
    chance = torch.Generator().manual_seed(1)
    pictures = torch.rand(20, 3, 8, 8, generator=chance) * 2 - 1
    words = {"encoder_hidden_states": torch.randn(20, 5, 12, generator=chance)}
    words["encoder_attention_mask"] = (torch.arange(5) < torch.randint(1, 6, (20, 1), generator=chance)).long()
    empty = {name: part[:1] * 0 + 1 for name, part in words.items()}
    endings = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out"]
    draw = noising(pictures, words, size=3, empty=empty, dropout=0.2)

    def alone(model: Any, batch: Noised) -> Tensor:
        made = model(batch.value, timestep=1000 * batch.time, return_dict=False, **batch.conditions)[0]
        return ((made - batch.aim) ** 2).mean()

    return World(model, linear_paths(model, endings), draw, flow_matching, alone)


def reader() -> World:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = BertModel(
            BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16, initializer_range=0.3),
            add_pooling_layer=False,
        )

    def draw(step: int, chance: torch.Generator) -> Sorting:
        """Three sentences of one to nine tokens, and two to four labels."""
        labels = int(torch.randint(2, 5, (), generator=chance))
        lengths = torch.randint(1, 10, (3 + labels,), generator=chance)
        ids = torch.randint(1, 30, (3 + labels, 9), generator=chance)
        return Sorting(ids, lengths, torch.randint(labels, (3,), generator=chance))

    def alone(model: Any, batch: Sorting) -> Tensor:
        """One text at a time: no padding anywhere."""
        texts = [ids[:length][None] for ids, length in zip(batch.ids, batch.lengths, strict=True)]
        vectors = torch.cat([model(input_ids=text).last_hidden_state.mean(dim=1) for text in texts])
        cosines = nn.functional.cosine_similarity(vectors[:3, None], vectors[None, 3:], dim=-1)
        return nn.functional.cross_entropy(20 * cosines, batch.targets)

    return World(model, linear_paths(model, ["query", "value", "output.dense"]), draw, label_names, alone)


def squares(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared distance of what a model makes of values from what is wanted, for each batch of both."""
    made = model(torch.cat([values for values, _ in batches]))
    wanted = torch.cat([wanted for _, wanted in batches])
    return (made - wanted).square().view(len(batches), -1).mean(dim=1)
