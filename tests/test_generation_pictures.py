"""The pictures of the generation benchmark: styles that are held out, names that nothing learned from, fixed noise."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_cells
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_every_style_has_words_of_its_own_and_queries_are_no_descriptions() -> None:
    from generation_pictures import every_task

    small_cells.words_are_apart(every_task(), 28)


def test_splits_of_styles_hold_out_eight_each() -> None:
    from generation_pictures import every_task, split

    splits = [split(every_task(), number) for number in range(3)]
    assert all(sorted(one.taught + one.held) == list(range(28)) and len(one.held) == 8 for one in splits)
    assert not any(set(one.held) & set(other.held) for one, other in combinations(splits, 2))


def test_a_brief_run_has_all_parts() -> None:
    from generation_pictures import BRIEF, every_task, split

    tasks = [one for one in every_task() if one.name in BRIEF.only]
    assert len(tasks) == len(BRIEF.only)
    found = split(tasks, 0)
    assert len(found.held) >= 2
    assert len(found.taught) * (BRIEF.folds - 1) // BRIEF.folds >= 3  # that a fold's similarity is fitted to


def test_noise_is_fixed_and_times_cover_their_distribution() -> None:
    from generation_pictures import explained, first, fixed, joined

    pictures, words = torch.rand(50, 3, 4, 4), {"encoder_hidden_states": torch.rand(50, 2, 3)}
    batch, again, other = (fixed(pictures, words, purpose) for purpose in ("a", "a", "b"))
    assert torch.equal(batch.value, again.value)
    assert not torch.equal(batch.value, other.value)
    time = batch.time[:, None, None, None]
    torch.testing.assert_close(batch.value, pictures + time * batch.aim)
    logits = torch.logit(batch.time).sort().values
    torch.testing.assert_close(torch.special.ndtr(logits), (torch.arange(50) + 0.5) / 50, rtol=0, atol=1e-5)
    few = first(batch, 3)
    whole = joined([few, few])
    assert torch.equal(whole.aim[3:], batch.aim[:3])
    assert len(whole.conditions["encoder_hidden_states"]) == len(whole.time) == 6

    class Constant(nn.Module):
        """Says the same share of the truth for everything."""

        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = nn.Parameter(torch.tensor(share))

        def forward(self, value: Tensor, **_: Any) -> tuple[Tensor]:
            return (self.share * torch.cat([few.aim, few.aim]),)

    for share, score in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.75)):
        assert explained(Constant(share), [few, few]).tolist() == pytest.approx([score] * 2)


# --- cells that are hardly trained --------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cell of eight styles of ten coloured squares, on a small transformer with random weights."""
    import generation_pictures
    from diffusers import PixArtTransformer2DModel
    from picture_data import Art, Name

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=1, sample_size=32,
            patch_size=16, cross_attention_dim=8, caption_channels=6, use_additional_conditions=False,
        )  # fmt: skip
    names = tuple(Name(str(n), f"thing {n}", "", "", "base", True) for n in range(10))
    pixels = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 4), dtype=np.uint8)
    read = SimpleNamespace(read=lambda texts: (torch.ones(len(texts), 2, 6), torch.ones(len(texts), 2).long()))
    tasks = generation_pictures.every_task()[:8]
    monkeypatch.setattr(generation_pictures, "every_task", lambda: tasks)
    monkeypatch.setattr(generation_pictures, "LAYERS", ("to_q", "proj_out"))
    monkeypatch.setattr(generation_pictures, "LEARNED", 6)
    monkeypatch.setattr(generation_pictures, "TESTED", 4)
    monkeypatch.setattr(generation_pictures, "load", lambda folder, artist: Art(artist, names, pixels))
    monkeypatch.setattr(generation_pictures, "Reader", lambda: read)
    opened = SimpleNamespace(transformer=model.eval().requires_grad_(False))
    monkeypatch.setattr(generation_pictures, "opened", lambda folder: opened)
    return small_cells.hardly_trained("pictures", tmp_path, monkeypatch)


def test_only_rows_that_peek_look_at_test_samples(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cells.only_rows_that_peek_look_at_test_samples(small, monkeypatch)


def test_pictures_to_learn_from_and_to_be_tested_on_are_apart(small: Any) -> None:
    world = small.world
    rows = world.studio.rows
    assert not set(rows["learned"]) & set(rows["tested"])
    assert (len(set(rows["learned"])), len(set(rows["tested"]))) == (6, 4)

    def plain(batch: Any) -> Tensor:
        return batch.value - batch.time[:, None, None, None] * batch.aim

    drawn = [plain(world.learning(0, 5)(step, torch.Generator().manual_seed(step))) for step in range(10)]
    apart = torch.cdist(torch.cat(drawn).flatten(1), plain(world.tests(0, 4)).flatten(1))
    assert float(apart.min()) > 1
    near = torch.cdist(torch.cat(drawn).flatten(1), plain(world.probes(0, 6)).flatten(1))
    assert float(near.min(dim=1).values.max()) < 0.1


def test_a_cell_is_measured_once_and_packed(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from generation_tables import shares

    found = small_cells.measured_once_and_packed(small, monkeypatch)
    assert shares(found)["oracle"] == pytest.approx(1)
    assert shares(found)["base"] == 0


def test_libraries_of_one_start_begin_alike(small: Any) -> None:
    small_cells.libraries_of_one_start_begin_alike(small)
