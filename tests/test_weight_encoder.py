"""Laws of a frozen encoder: what is saved is what is used, in any process; what is damaged or another's is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from concepts import CONCEPTS, concept_adapter
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters
from lorahub.index import weight_encoder as module
from lorahub.index.fitting import Example, Settings, fit
from lorahub.index.weight_encoder import (
    WeightEncoder,
    encoder_for,
    encoder_path,
    frozen,
    load_encoder,
    shipped_encoders,
)
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
ONE = Settings(steps=1, batch=8)
OPTIONS = {
    "ridge": {"left": 16, "right": 0, "both": 8},
    "autolora": {"width": 16, "left": 16, "right": 0, "both": 8},
    "w2t": {"width": 16},
}


class Words:
    """Every text has a direction of its own, the same for ever."""

    space, dim = "words", 16

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dim) for text in texts]
        vectors = np.array(rows, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def some(number: int, **given: object) -> Adapter:
    return concept_adapter(number % 4, number, **given)


def fitted(kind: str, seed: int = 0, base: str = "tiny-world") -> WeightEncoder:
    examples = [Example(some(n, base=base), (CONCEPTS[n % 4],)) for n in range(12)]
    return fit(kind, examples, Words(), replace(ONE, seed=seed), options=OPTIONS[kind])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(OPTIONS))
def encoder(request: pytest.FixtureRequest) -> WeightEncoder:
    return fitted(request.param)


@pytest.fixture(scope="module")
def ridge() -> WeightEncoder:
    return fitted("ridge")


def test_what_is_saved_is_what_is_used(encoder: WeightEncoder, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "encoder.safetensors"
    encoder.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = load_encoder(path)
    assert loaded.space == encoder.space
    assert np.array_equal(loaded.encode(some(20)), encoder.encode(some(20)))
    for name in ("kind", "base", "manifest", "dim", "texts", "options", "calibration", "neighbours", "queries"):
        assert getattr(loaded, name) == getattr(encoder, name), name
    assert np.array_equal(loaded.landmarks, encoder.landmarks)
    assert len(loaded.landmarks)
    assert json.loads(json.dumps(dict(encoder.told))) == loaded.told
    assert {array.dtype for array in load_file(path).values()} == {np.dtype("float16")}
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_vectors_are_units_of_the_text_encoders_length(encoder: WeightEncoder) -> None:
    vectors = encoder.encode_all((some(n) for n in range(20, 25)), batch=2)
    assert vectors.shape == (5, encoder.dim) == (5, 16)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for number, vector in zip(range(20, 25), vectors, strict=True):
        assert np.allclose(encoder.encode(some(number)), vector, atol=1e-5)
    assert encoder.encode_all([]).shape == (0, 16)


def test_another_process_gives_the_same_vectors_and_loads_without_torch(encoder: WeightEncoder, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    encoder.save(path)
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from lorahub.index.weight_encoder import load_encoder\n"
        f"encoder = load_encoder(Path({str(path)!r})); assert 'torch' not in sys.modules\n"
        "from concepts import concept_adapter; print(encoder.space, *encoder.encode(concept_adapter(1, 21)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    space, *numbers = done.stdout.split()
    assert space == encoder.space
    assert np.allclose(np.array(numbers, np.float32), encoder.encode(some(21)), atol=1e-5)


def test_a_space_is_named_by_its_content(ridge: WeightEncoder) -> None:
    assert ridge.space.startswith("weights:ridge:")
    assert len(ridge.space.rsplit(":", 1)[1]) == 12
    assert fitted("ridge").space == ridge.space
    name = next(iter(ridge.tensors))
    moved = {**ridge.tensors, name: ridge.tensors[name] + np.float16(0.25)}
    changed = [
        replace(ridge, tensors=moved), replace(ridge, texts="others"), replace(ridge, kind="w2t"),
        replace(ridge, manifest=replace(ridge.manifest, base="else")),
    ]  # fmt: skip
    assert len({ridge.space, *(one.space for one in changed)}) == 5
    assert replace(ridge, told={"note": 1}).space == ridge.space
    with pytest.raises(FrozenInstanceError):
        ridge.kind = "other"  # type: ignore[misc]


def test_others_are_refused_by_name(encoder: WeightEncoder) -> None:
    with pytest.raises(IncompatibleAdapters, match="gpt2"):
        encoder.encode(some(1, base="gpt2"))
    with pytest.raises(IncompatibleAdapters, match=r"layer\.0\.query is 25x16"):
        encoder.encode(some(1, width=25))
    known = some(1)
    fewer = replace(known, modules={"layer.0.query": known.modules["layer.0.query"]})
    more = replace(known, modules={**known.modules, "else.where": known.modules["layer.0.query"]})
    assert np.isfinite(encoder.encode(fewer)).all()
    assert np.array_equal(encoder.encode(more), encoder.encode(known))


def test_confidence_is_of_words_adapters_or_queries(ridge: WeightEncoder) -> None:
    told = [ridge.confidence(cosine) for cosine in np.linspace(-1, 1, 9)]
    assert told == sorted(told)
    assert told[0] == 0.0
    assert told[-1] > 0.5
    assert ridge.confidence(0.4) == ridge.calibration(0.4)
    assert ridge.confidence(0.4, of="adapters") == ridge.neighbours(0.4)
    assert ridge.confidence(0.4, of="queries") == ridge.queries(0.4)
    with pytest.raises(BadOption, match="words, adapters, queries"):
        ridge.confidence(0.4, of="stars")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(ridge: WeightEncoder, tmp_path: Path, share: float) -> None:
    path = tmp_path / "e.safetensors"
    ridge.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": np.ones(3, np.float32)}, path)
    assert "no weight encoder" in refused(path)
    path.write_bytes(b"something else entirely")
    refused(path)
    path.unlink()
    refused(path)
    path.mkdir()
    refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_file_with_nan_is_refused(ridge: WeightEncoder, tmp_path: Path, value: float) -> None:
    name = max(ridge.tensors, key=lambda key: ridge.tensors[key].size)
    broken = ridge.tensors[name].copy()
    broken.flat[3] = value
    path = tmp_path / "e.safetensors"
    replace(ridge, tensors={**ridge.tensors, name: broken}).save(path)
    assert "NaN or Inf" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1}, {"version": 3}, {"kind": "magic"}, {"manifest": {}}, {"dim": "many"}, {"calibration": None},
        {"options": 3}, {"told": 3}, {"manifest": {"base": None, "places": [["a", -1, 2]]}}, {"dim": None}, {"dim": 17},
        {"options": {"charm": 1}}, {"options": {"left": 1}},
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(ridge: WeightEncoder, tmp_path: Path, change: dict) -> None:
    path = tmp_path / "e.safetensors"
    ridge.save(path)
    entry = json.loads(header(path)[module._ENTRY])
    rewritten(ridge, path, json.dumps(entry))
    assert load_encoder(path).space == ridge.space  # what follows is refused for the change alone
    rewritten(ridge, path, json.dumps({**entry, **change}))
    refused(path, encode=True)
    rewritten(ridge, path, "no json")
    refused(path)


@pytest.mark.parametrize("shape", [(3, 15), (16,), (2, 3, 16)])
def test_landmarks_of_another_space_are_refused(ridge: WeightEncoder, tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "e.safetensors"
    replace(ridge, landmarks=np.ones(shape, np.float16)).save(path)
    assert "landmarks" in refused(path)


def test_an_encoder_without_landmarks_can_be_kept(ridge: WeightEncoder, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    replace(ridge, landmarks=np.empty((0, 16), np.float16)).save(path)
    assert not load_encoder(path).crowding(np.ones((2, 16), np.float32)).any()


def rewritten(encoder: WeightEncoder, path: Path, entry: str) -> None:
    """The encoder's tensors under another description."""
    held = {**encoder.tensors, "landmarks": encoder.landmarks}
    save_file({name: np.array(array) for name, array in held.items()}, path, {module._ENTRY: entry})


def header(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def refused(path: Path, *, encode: bool = False) -> str:
    """The one line that refuses a file: when it is read, or at the latest when it is first used."""

    def use() -> None:
        found = load_encoder(path)
        assert encode, "this file should have been refused when it was read"
        found.encode(some(1))

    with pytest.raises((FormatError, BadOption)) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_large_a_number_for_half_is_not_stored() -> None:
    with pytest.raises(FormatError, match="weights"):
        frozen({"weights": torch.tensor([1e6])})
    assert frozen({"weights": torch.tensor([1e6])}, half=False)["weights"].dtype == np.float32


# --- which encoder --------------------------------------------------------------------------------------------------


def test_the_users_own_encoder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, home = tmp_path / "shipped", tmp_path / "home"
    monkeypatch.setattr(module, "SHIPPED", shipped)
    assert encoder_for(home, "org/tiny-world") is None
    assert encoder_for(home, None) is None
    with_us, own = fitted("ridge"), fitted("w2t")
    with_us.save(shipped / "tiny-world.safetensors")
    assert shipped_encoders() == {"tiny-world": shipped / "tiny-world.safetensors"}
    for base in ("tiny-world", "org/tiny-world", None):
        found = encoder_for(home, base)
        assert found is not None
        assert found.space == with_us.space
    assert encoder_for(home, "gpt2") is None
    own.save(encoder_path(home, "org/tiny-world"))
    for base in ("tiny-world", "org/tiny-world"):
        found = encoder_for(home, base)
        assert found is not None
        assert found.space == own.space
    assert encoder_for(home, None) is None, "there are two"


def test_a_damaged_encoder_of_ones_own_is_not_passed_over(tmp_path: Path) -> None:
    path = encoder_path(tmp_path, "some/base: odd")
    assert path.parent == tmp_path / "encoders"
    path.parent.mkdir()
    path.write_bytes(b"cut")
    with pytest.raises(FormatError):
        encoder_for(tmp_path, "some/base: odd")
