"""Generators in files: the same bytes for the same seed in any process, back as they were, damage refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lorahub.generate.learned.icm import icm
from lorahub.generate.learned.semantic import semantic
from lorahub.generate.stored import Learned, check_school, kinds, load, save
from lorahub.generate.taught import open_school
from lorahub.hub.errors import FormatError, GenerationError, TargetExists
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from schooling import Words, expert, school, taught

SEMANTIC: dict[str, Any] = {"steps": 3, "batch": 4, "latent": 3, "hidden": 8}
ICM: dict[str, Any] = {"steps": 3, "batch": 4, "latent": 4, "channels": 2, "stages": 3}
MADE = {
    "semantic": lambda: semantic(school(), **SEMANTIC),
    "projected": lambda: semantic(school(), components=5, mode="mean", **SEMANTIC),
    "icm": lambda: icm(school(), **ICM),
    "own": lambda: icm(school(), scale="own", random=False, **ICM),
}
QUERY = Words().encode(["a picture of hen"])[0]


def drawn(generator: Learned, seed: int = 3) -> bytes:
    """The bytes of a sample."""
    vector = generator.layout.flatten(generator.sample(QUERY, seed=seed).adapter)
    return vector.numpy().tobytes()


@pytest.mark.parametrize("name", MADE)
def test_a_generator_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    made: Any = MADE[name]()
    path = save(made, tmp_path / "generator.safetensors")
    back = load(path)
    assert drawn(back) == drawn(made)
    assert back.kind == made.kind in kinds()
    assert back.layout == made.layout
    assert back.origin == made.origin
    assert back.sample(QUERY, seed=3).experts == made.sample(QUERY, seed=3).experts
    assert back.sample(QUERY, seed=3).novelty == made.sample(QUERY, seed=3).novelty
    again = save(back, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["lorahub_generator"]


PROGRAM = """
import hashlib, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[2]))
from test_stored import MADE, drawn
from lorahub.generate.stored import save
for name in ("semantic", "icm"):
    made = MADE[name]()
    file = save(made, Path(sys.argv[1]) / name)
    print(name, hashlib.sha256(file.read_bytes()).hexdigest(), hashlib.sha256(drawn(made)).hexdigest())
"""


def test_equal_seeds_give_equal_bytes_in_another_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, file, sample = line.split()
        made: Any = MADE[name]()
        here = save(made, tmp_path / f"{name} here")
        assert hashlib.sha256(here.read_bytes()).hexdigest() == file
        assert hashlib.sha256(drawn(made)).hexdigest() == sample
    assert len(done.stdout.splitlines()) == 2


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    made, path = icm(school(), **ICM), tmp_path / "g.safetensors"
    save(made, path)
    with pytest.raises(TargetExists):
        save(made, path)
    save(made, path, force=True)


def test_a_library_of_another_structure_is_refused_by_name() -> None:
    made = semantic(school(), **SEMANTIC)
    check_school(made, school("cow pig"))
    other = [replace(taught("fox", 1), checkpoints=(expert("fox", 1, rank=3),))]
    with pytest.raises(GenerationError, match=r"the library: blocks\.2\.attn\.q is 6x4 of rank 3, expected .* rank 2"):
        check_school(made, open_school(other, Words()))
    with pytest.raises(GenerationError, match="gauge"):
        check_school(made, open_school([taught("fox", 1)], Words(), gauge="canonical"))
    based = [replace(taught("fox", 1), checkpoints=(expert("fox", 1, base="other"),))]
    with pytest.raises(GenerationError, match="for other"):
        check_school(made, open_school(based, Words()))
    with pytest.raises(GenerationError, match="space 'words', the library's are in 'others'"):
        check_school(made, open_school([taught("fox", 1)], Words(space="others")))
    known = semantic(open_school([taught("fox", 1), taught("owl", 2)], Words(), fingerprint="ab"), **SEMANTIC)
    check_school(known, school())
    with pytest.raises(GenerationError, match="other weights of tiny"):
        check_school(known, open_school([taught("fox", 1)], Words(), fingerprint="cd"))


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("generators")
    return {name: save(make(), folder / f"{name}.safetensors") for name, make in MADE.items()}  # type: ignore[arg-type]


def reread(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lorahub_generator"]), load_file(path)


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", MADE)
def test_every_tensor_is_needed_in_its_shape(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    said, tensors = reread(files[name])
    for key, part in tensors.items():
        for harm in ("gone", "cut"):
            if harm == "cut" and not part.ndim:
                continue
            left = {other: value for other, value in tensors.items() if other != key}
            if harm == "cut":
                left[key] = part[:-1].contiguous() if len(part) > 1 else part.repeat(2, *(1,) * (part.ndim - 1))
            elif key == "axes":
                continue  # without it the widths do not fit, tested by the next
            save_file(left, tmp_path / "g", {"lorahub_generator": json.dumps(said)})
            refused(tmp_path / "g")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("version",), 9, "version 9"), (("kind",), "magic", "unknown kind 'magic'"), (("kind",), 3, "unknown kind"),
        (("kind",), "icm", ""), (("layout",), {}, "list of modules"), (("layout",), 3, "damaged"),
        (("origin",), 3, "damaged"), (("origin", "library"), 3, "which library"), (("facts",), [], "damaged"),
        (("facts", "names"), ["a"], "shapes"), (("facts", "names"), 3, "damaged"),
        (("facts", "temperature"), 0, "temperature 0"), (("facts", "neighbours"), "x", "damaged"),
        (("facts", "mode"), "best", ""), (("facts", "recipe", "hidden"), 2**30, "do not fit"),
        (("facts", "recipe", "size"), 7, "shapes"), (("facts", "recipe"), {}, "recipe"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(
    place: tuple[str, ...], value: Any, message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    said, tensors = reread(files["semantic"])
    inner = said
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    save_file(tensors, tmp_path / "g", {"lorahub_generator": json.dumps(said)})
    assert message in refused(tmp_path / "g")


def test_other_files_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    said, tensors = reread(files["icm"])
    path = tmp_path / "g"
    save_file(tensors, path)
    assert "something else" in refused(path)
    save_file(tensors, path, {"lorahub_generator": "{"})
    assert "damaged" in refused(path)
    save_file({**tensors, "keys": tensors["keys"] * np.nan}, path, {"lorahub_generator": json.dumps(said)})
    assert "keys holds NaN" in refused(path)
    save_file({**tensors, "keys": tensors["keys"].double()}, path, {"lorahub_generator": json.dumps(said)})
    assert "dtype F64" in refused(path)
    path.write_bytes(files["icm"].read_bytes()[:-3])
    refused(path)
