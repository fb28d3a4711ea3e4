"""The picture world is made without peeking: names have one part each, runs resume exactly, pictures move as told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def record(name: str, category: str, subcategory: str) -> dict:
    return {"name": name, "short_name": name, "unified": name.upper(), "category": category, "subcategory": subcategory}


def art(parts: tuple[str, ...], each: int = 4):
    from picture_data import Art, Name

    names = [
        Name(f"{part}{i}", f"{part} {i}", "Objects", "tool", part, mirror=i % 2 == 0)
        for part in parts
        for i in range(each)
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (len(names), 64, 64, 4), dtype=np.uint8)
    return Art("nobody", tuple(names), pixels)


def tiny() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=32,
        patch_size=8, cross_attention_dim=16, caption_channels=384, use_additional_conditions=False,
    )  # fmt: skip


class Words:
    """In place of the sentence encoder: states that follow from the words."""

    def read(self, prompts):
        draws = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
        return torch.stack([torch.randn(16, 384, generator=d) for d in draws]), torch.ones(len(prompts), 16).long()


def data(count: int = 6):
    from picture_base import TEMPLATES, captioned

    some = art(("base",), count)
    return captioned(some.names, some.on_white(), Words(), TEMPLATES)


def test_every_name_has_one_part() -> None:
    from picture_data import _name

    assert _name(record("Red Apple", "Food & Drink", "food-fruit")).part == "fruit"
    assert _name(record("Egypt Flag", "Flags", "country-flag")).part == "flag"
    assert _name(record("Clock Face One Oclock", "Travel & Places", "time")).part == "clock"
    assert _name(record("Hourglass", "Travel & Places", "time")).part == "unused"
    assert _name(record("Cook", "People & Body", "person-role")) is None
    dealt = [_name(record(f"thing {i}", "Objects", "tool")).part for i in range(1000)]
    assert set(dealt) == {"base", "judge"}
    assert 60 < dealt.count("judge") < 140


def test_gates_never_see_what_unseen_pairs_are_made_of() -> None:
    from fusion_world import pairs

    some = pairs()
    assert len(some) >= 40
    assert sum(not one.seen for one in some) * 2 >= len(some)
    for side in ("style", "content"):
        known = {getattr(one, side) for one in some if one.seen}
        assert not known & {getattr(one, side) for one in some if not one.seen}


def test_styles_are_shown_on_names_of_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import picture_lessons
    from picture_styles import STYLES

    monkeypatch.setattr(picture_lessons, "SUBJECTS", 3)
    asked: list[str] = []

    class Listening(Words):
        def read(self, prompts):
            asked.extend(prompts)
            return super().read(prompts)

    lesson = picture_lessons.style_lesson(STYLES[0], art(("base", "judge", "fruit")), Listening(), 0)
    assert len(lesson.data) == 3
    assert asked
    assert all("base" in prompt and "judge" not in prompt and "fruit" not in prompt for prompt in asked)
    content = picture_lessons.content_lesson("fruit", art(("base", "judge", "fruit")), Words(), 0)
    assert len(content.data) == 4


def test_only_pictures_that_may_be_are_mirrored_and_none_moves_too_far() -> None:
    from picture_base import SHIFT

    some, chance = data(), torch.Generator().manual_seed(0)
    rows = torch.arange(6).repeat(50)
    moved = some.moved(rows, chance)
    wide = torch.nn.functional.pad(some.pictures, (SHIFT,) * 4, mode="replicate")
    for row, picture in zip(rows.tolist(), moved, strict=True):
        found = set()
        for mirrored, ground in ((False, wide[row]), (True, wide[row].flip(-1))):
            spots = [(y, x) for y in range(2 * SHIFT + 1) for x in range(2 * SHIFT + 1)]
            if any(torch.equal(ground[:, y : y + 32, x : x + 32], picture) for y, x in spots):
                found.add(mirrored)
        assert found
        assert some.mirror[row] or found == {False}


def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import picture_base

    monkeypatch.setattr(picture_base, "transformer", tiny)
    monkeypatch.setattr(picture_base, "Reader", Words)
    monkeypatch.setattr(picture_base, "BATCH", 4)
    whole = picture_base.train_base(data(), 6, 0, tmp_path / "whole.pt", every=6)
    go_on = picture_base.go_on

    def stopped(run, data, blank, until, steps):
        if until > 4:
            raise KeyboardInterrupt
        return go_on(run, data, blank, until, steps)

    monkeypatch.setattr(picture_base, "go_on", stopped)
    with pytest.raises(KeyboardInterrupt):
        picture_base.train_base(data(), 6, 0, tmp_path / "parts.pt", every=2)
    monkeypatch.setattr(picture_base, "go_on", go_on)
    parts = picture_base.train_base(data(), 6, 0, tmp_path / "parts.pt", every=2)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    from picture_base import FALLING, WARM_UP, pace

    steps = 4000
    assert pace(WARM_UP // 2, steps) == pytest.approx(0.5)
    assert {pace(step, steps) for step in range(WARM_UP, round(steps * (1 - FALLING)))} == {1.0}
    assert pace(steps, steps) == 0
    falling = [pace(step, steps) for step in range(round(steps * (1 - FALLING)), steps)]
    assert falling == sorted(falling, reverse=True)


def test_flow_loss_is_the_mean_square_of_the_flow_for_a_silent_model() -> None:
    """A model that says nothing misses noise - picture by its whole square, which is 1 + the picture's."""
    from picture_base import flow_loss

    class Silent(torch.nn.Module):
        def forward(self, value, **_):
            return (torch.zeros_like(value),)

    pictures = torch.full((512, 3, 8, 8), 0.5)
    loss = flow_loss(Silent(), pictures, {}, torch.Generator().manual_seed(0))
    assert loss.shape == (512,)
    assert loss.mean() == pytest.approx(1.25, abs=0.02)
