"""Every computed style: the same picture twice, a small RGB picture, and one that no other style makes."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "watercolor,pencil sketch,pixel art,blueprint,neon,sepia,oil painting,stained glass,mosaic,halftone,pop art,"
    "charcoal,cross stitch,chalkboard,cyanotype,thermal camera,night vision,gold emboss,ink stamp,woodcut,comic,"
    "crayon,x-ray,pastel,glitch,game boy,sticker,vaporwave"
).split(",")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def drawn(number: int) -> np.ndarray:
    """A face, a house or a flag: RGBA (64, 64, 4), smooth edges, transparent outside."""
    picture = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(picture)
    if number == 0:
        draw.ellipse((16, 16, 240, 240), fill="#fcc21b", outline="#e59600", width=10)
        for left in (76, 148):
            draw.ellipse((left, 84, left + 32, 124), fill="#4a3b35")
        draw.chord((72, 120, 184, 208), 0, 180, fill="white", outline="#4a3b35")
    elif number == 1:
        draw.polygon([(20, 120), (128, 24), (236, 120)], fill="#d84315")
        draw.rectangle((48, 120, 208, 232), fill="#90caf9")
        draw.rectangle((104, 160, 152, 232), fill="#5d4037")
    else:
        for left, colour in ((16, "#26449b"), (90, "#f5f5f5"), (164, "#d32f2f")):
            draw.rectangle((left, 56, left + 74, 200), fill=colour)
    return np.asarray(picture.resize((64, 64), Image.Resampling.BOX))


def style(name: str):
    from picture_styles import STYLES

    return next(style for style in STYLES if style.name == name)


@cache
def gallery(name: str) -> np.ndarray:
    return np.stack([style(name).apply(drawn(number), number) for number in range(3)])


def on_white(picture: np.ndarray) -> np.ndarray:
    ground = Image.new("RGBA", (64, 64), "white")
    merged = Image.alpha_composite(ground, Image.fromarray(picture)).convert("RGB")
    return np.asarray(merged.resize((32, 32), Image.Resampling.BOX))


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two pictures, of 0 to 255."""
    return float(np.abs(first.astype(float) - second.astype(float)).mean())


def test_names_triggers_and_descriptions_are_unique() -> None:
    from picture_styles import STYLES

    assert [style.name for style in STYLES] == NAMES
    for words in zip(*((style.name, style.trigger, style.description) for style in STYLES), strict=True):
        assert len(set(words)) == len(words)
    assert all(style.description.endswith(".") and style.trigger for style in STYLES)


@pytest.mark.parametrize("name", NAMES)
def test_a_style_makes_a_small_picture_and_leaves_its_input_alone(name: str) -> None:
    picture = drawn(0)
    before = picture.copy()
    painted = style(name).apply(picture, 0)
    assert painted.shape == (32, 32, 3)
    assert painted.dtype == np.uint8
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_style_is_a_function_of_picture_and_index(name: str) -> None:
    state = np.random.get_state()[1].copy()
    assert np.array_equal(style(name).apply(drawn(1), 1), gallery(name)[1])
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_0_to_1_paint_the_same(name: str) -> None:
    assert np.array_equal(style(name).apply(drawn(2) / 255, 2), gallery(name)[2])


@pytest.mark.parametrize(
    "name", ["watercolor", "oil painting", "stained glass", "mosaic", "charcoal", "crayon", "glitch"]
)
def test_what_is_random_depends_on_the_index(name: str) -> None:
    assert not np.array_equal(style(name).apply(drawn(0), 1), gallery(name)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_style_shows(name: str) -> None:
    assert all(apart(painted, on_white(drawn(number))) > 8 for number, painted in enumerate(gallery(name)))


def test_no_two_styles_are_alike() -> None:
    gaps = {pair: apart(*map(gallery, pair)) for pair in combinations(NAMES, 2)}
    assert min(gaps.values()) > 8, min(gaps, key=gaps.__getitem__)


@pytest.mark.parametrize("name", NAMES)
def test_the_subject_stays_recognisable(name: str) -> None:
    """The same subject with other chance is nearer, when blurred, than any other subject."""
    from picture_brushes import blur

    faint = [blur(painted.astype(np.float32), 1.5) for painted in gallery(name)]
    again = blur(style(name).apply(drawn(0), 7).astype(np.float32), 1.5)
    gaps = [apart(again, other) for other in faint]
    assert gaps[0] < 0.8 * min(gaps[1:])


def test_an_empty_picture_can_be_painted() -> None:
    empty = np.zeros((64, 64, 4), np.uint8)
    assert all(style(name).apply(empty, 0).shape == (32, 32, 3) for name in NAMES)


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="64, 64, 4"):
        style("sepia").apply(np.zeros((32, 32, 4), np.uint8), 0)


def test_many_pictures_by_their_own_numbers() -> None:
    from picture_styles import restyled

    pictures = np.stack([drawn(2), drawn(0)])
    assert np.array_equal(restyled(style("crayon"), pictures, [2, 0]), gallery("crayon")[[2, 0]])


def test_styled_pictures_know_their_style_and_their_row() -> None:
    from picture_judges import PLAIN, STYLE_CLASSES, styled

    rgba = np.stack([drawn(number) for number in range(3)])
    plain = np.stack([on_white(picture) for picture in rgba])
    pictures, labels, rows = styled(rgba, plain, 2, seed=0, styles=["comic", "neon", "sepia"])
    assert pictures.shape == (9, 32, 32, 3)
    assert sorted(rows) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for picture, label, row in zip(pictures, labels, rows, strict=True):
        name = STYLE_CLASSES[label]
        assert np.array_equal(picture, plain[row] if name == PLAIN else gallery(name)[row])
    assert len(set(zip(labels, rows, strict=True))) == 9


def test_recoloured_subjects_keep_their_shapes_and_their_colours_change_places() -> None:
    from picture_judges import styled

    rgba = np.stack([drawn(number % 3) for number in range(12)])
    plain = np.stack([on_white(picture) for picture in rgba])
    pictures, labels, rows = styled(rgba, plain, 1, seed=1, styles=["sepia"], recoloured=True)
    found = pictures[labels == 0][rows[labels == 0].argsort()]
    assert np.array_equal(np.sort(found, axis=3), np.sort(plain, axis=3))
    assert any(not np.array_equal(one, other) for one, other in zip(found, plain, strict=True))
    painted = dict(zip(rows[labels > 0], pictures[labels > 0], strict=True))
    assert all(apart(painted[row], style("sepia").apply(rgba[row], 12 + row)) < 40 for row in range(12))


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that are redder or bluer, and which."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 2, count)
    pictures = chance.integers(0, 156, (count, 32, 32, 3), dtype=np.uint8)
    pictures[np.arange(count), :, :, labels * 2] += 100
    return pictures, labels


def test_a_judge_learns_repeats_itself_and_touches_no_global_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    import picture_judges as judges
    import torch

    monkeypatch.setattr(judges, "BATCH", 16)

    pictures, labels = coloured(64, 0)
    before = torch.random.get_rng_state()
    judge, again = (judges.train_judge(pictures, labels, ("red", "blue"), seed=1, steps=10) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    asked, truth = coloured(32, 1)
    assert judge.accuracy(asked, truth) > 0.9
    assert np.allclose(judge.probabilities(asked).sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(judge.probabilities(asked), again.probabilities(asked))


def test_a_judge_refuses_labels_that_do_not_fit() -> None:
    from picture_judges import train_judge

    pictures, labels = coloured(8, 0)
    with pytest.raises(ValueError, match="8 pictures and 7 labels"):
        train_judge(pictures, labels[:7], ("red", "blue"), seed=0)
    with pytest.raises(ValueError, match="uint8"):
        train_judge(pictures / 255, labels, ("red", "blue"), seed=0)


def test_the_right_picture_is_found_by_a_matcher_that_was_not_taught_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import picture_judges as judges

    class Blind(judges.Matcher):
        def vectors(self, pictures: np.ndarray) -> np.ndarray:
            flat = pictures.reshape(len(pictures), -1) - 127.5
            return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    taught: list[set[int]] = []
    chance = np.random.default_rng(0)
    references = chance.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    names = {picture.tobytes(): number for number, picture in enumerate(references)}

    def teach(views: list[np.ndarray], *_: object) -> judges.Matcher:
        taught.append({names[picture.tobytes()] for picture in views[0]})
        return Blind(None)

    monkeypatch.setattr(judges, "train_matcher", teach)
    own = np.arange(20)
    noise = chance.integers(0, 256, references.shape, dtype=np.uint8)
    real, floor = judges.crossed_ranks([(references, own), (noise, own)], references, [references] * 2, seed=5)
    assert judges.top(real, 1) == 1.0
    assert judges.top(floor, 1) < 0.4
    assert sorted(map(len, taught)) == [10, 10]
    assert not taught[0] & taught[1]


def test_equal_likeness_is_no_hit() -> None:
    import picture_judges as judges

    class Same(judges.Matcher):
        def vectors(self, pictures: np.ndarray) -> np.ndarray:
            return np.ones((len(pictures), 1))

    pictures = np.zeros((5, 32, 32, 3), np.uint8)
    assert Same(None).ranks(pictures, pictures, np.arange(5)).tolist() == [4] * 5
