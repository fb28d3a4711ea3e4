"""Damaged and hostile files: each is read, or refused in one line that names it; none hangs, runs code or fills memory.

LORAHUB_FUZZ=5000 goes through more samples than the usual 312.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import mangling
import mangling_headers as headers
import mangling_places as places
import pytest
import torch
from lorahub.hub import reading
from lorahub.hub.errors import FormatError, LoraHubError, UnsafeFile
from safetensors.torch import save_file

COUNT = int(os.environ.get("LORAHUB_FUZZ", 12 * len(mangling.KINDS)))
PATIENCE = 60  # seconds for a file that should take milliseconds: a hang, whatever the machine is doing
MEMORY = 6 << 30  # bytes of address space for a command that imports no torch
LORAHUB = str(Path(sys.executable).with_name("lorahub"))


@contextmanager
def no_hang(label: str) -> Iterator[None]:
    """Fails a test that waits or computes for ever."""

    def ring(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{label} hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(label: str, path: Path, call: Callable[[Path], Any]) -> str | None:
    """None for success, the message of a refusal; anything else fails the test with the sample's label."""
    with no_hang(label):
        try:
            call(path)
        except LoraHubError as error:
            message = str(error)
            assert message.startswith(str(path.parent)), f"{label}: {message!r} does not name the file"
            told = message.replace(str(path), "")
            assert told.isprintable(), f"{label}: {told!r}"
            assert len(told) < 700, f"{label}: {len(told)} characters"
            return message
    return None


def whole(path: Path) -> None:
    """Read every module and extra."""
    adapter = reading.read(path, allow_pickle=True)
    for name, module in adapter.modules.items():
        assert module.shape == adapter.shapes[name]


def examined(path: Path) -> bool:
    return reading.examine(path, allow_pickle=True)[0].mergeable


@pytest.mark.parametrize("kind", mangling.KINDS, ids=lambda kind: kind.__name__)
def test_every_file_is_read_or_refused(kind: mangling.Mangle, tmp_path: Path) -> None:
    number = mangling.KINDS.index(kind)
    refused = 0
    for seed in range(number, COUNT, len(mangling.KINDS)):
        label, folder = f"{kind.__name__}-{seed}", tmp_path / f"{seed:05d}"
        path = kind(random.Random(seed), folder)
        content: list[bool] = []
        refusal = outcome(label, path, lambda path, content=content: content.append(examined(path)))
        seen = outcome(label, path, lambda path: reading.inspect(path, allow_pickle=True))
        read = outcome(label, path, whole)
        refused += refusal is not None
        if content:  # what was taken into the catalogue can be inspected, and read if it is called mergeable
            assert seen is None, label
            assert (read is None) is content[0], f"{label}: {read}"
        assert not (tmp_path / "owned").exists(), f"{label} ran its command"
    assert refused or kind in {places.strange_card, places.strange_sidecar, places.many_patterns}


def test_good_samples_are_good(tmp_path: Path) -> None:
    """The files that are mangled would be read if they were not."""
    for content, modules in ((headers.kohya(), 4), (headers.peft(), 3)):
        path = headers.put(tmp_path, headers.packed(*headers.entries(content)))
        assert examined(path)
        assert reading.inspect(path).modules == modules
    assert examined(places.directory(tmp_path, places.config()))


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything under a folder, with kind, size and time."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            status = path.lstat()
            found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def lorahub(home: Path, *words: str, memory: int | None = MEMORY) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, which may not take all memory."""

    def limit() -> None:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    environment = {**os.environ, "LORAHUB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [LORAHUB, *words], env=environment, capture_output=True, timeout=300, check=False, preexec_fn=limit
    )


@pytest.mark.parametrize("pickles", [False, True])
def test_add_goes_through_a_folder_of_them_all(pickles: bool, tmp_path: Path) -> None:
    library, home = tmp_path / "library", tmp_path / "home"
    for seed in range(4 * len(mangling.KINDS)):
        kind = mangling.KINDS[seed % len(mangling.KINDS)]
        path = kind(random.Random(seed), library / kind.__name__ / str(seed))
        assert path
    (library / "loop").symlink_to(library)
    good = headers.put(library / "good", headers.packed(*headers.entries(headers.kohya())), "good.safetensors")
    home.mkdir()
    before = tree(library)
    words = ["add", str(library), "--json", "--no-index", *(["--allow-pickle"] if pickles else [])]
    run = lorahub(home, *words, memory=None if pickles else MEMORY)
    assert run.returncode == 0, run.stderr
    assert b"Traceback" not in run.stderr
    assert tree(library) == before
    assert {path.name for path in tmp_path.iterdir()} == {"library", "home"}, "something lies outside the home folder"
    found = json.loads(run.stdout)
    assert len({one["path"] for one in found}) == len(found) > 60
    assert {one["status"] for one in found} <= {"added", "duplicate", "rejected"}
    for one in found:
        assert (one["id"] is None) is (one["status"] == "rejected")
        assert one["status"] == "added" or one["reason"]
        assert len((one["reason"] or "").replace(one["path"], "").splitlines()) <= 1
    assert next(one for one in found if one["path"] == str(good))["status"] in {"added", "duplicate"}
    listed = json.loads(lorahub(home, "list", "--json").stdout)
    assert {one["id"] for one in listed} == {one["id"] for one in found if one["id"]}
    assert json.loads(lorahub(home, "verify", "--json").stdout) == []
    whole_rows(home / "lorahub.db", len(listed))


def whole_rows(database: Path, count: int) -> None:
    """Every adapter has a location and a full-text row, and nothing refers to an adapter that is not there."""
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT count(*) FROM adapter").fetchone() == (count,)
        bare = "SELECT count(*) FROM adapter WHERE id NOT IN (SELECT adapter_id FROM location)"
        assert connection.execute(bare).fetchone() == (0,)


@pytest.mark.parametrize("seed", [0, 1, 4, 6, 11, 13, 18, 23, 25])
def test_inspect_refuses_in_one_line(seed: int, tmp_path: Path) -> None:
    path = mangling.KINDS[seed](random.Random(seed), tmp_path / "sample")
    run = lorahub(tmp_path / "home", "inspect", str(path), "--json", memory=None)
    assert b"Traceback" not in run.stderr
    if run.returncode == 0:
        assert json.loads(run.stdout)["path"] == str(path)
        return
    assert run.returncode in {1, 4}
    assert run.stdout == b""
    assert len(run.stderr.decode().splitlines()) == 1


def test_inspect_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.bin")
    for name in ("pipe.safetensors", "pipe.bin"):
        with no_hang(name), pytest.raises(FormatError, match="no regular file"):
            reading.inspect(tmp_path / name, allow_pickle=True)


def test_a_pickle_waits_for_consent_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    path = tmp_path / "adapter_model.bin"
    torch.save({"x": places.Malicious(f"touch {mark}")}, path)
    for allowed, error, code in ((False, UnsafeFile, 4), (True, FormatError, 1)):
        with pytest.raises(error):
            reading.inspect(path, allow_pickle=allowed)
        consent = ["--allow-pickle"] if allowed else []
        run = lorahub(tmp_path / "home", "inspect", str(path), *consent, memory=None)
        assert run.returncode == code
        assert len(run.stderr.splitlines()) == 1
        added = lorahub(tmp_path / "home", "add", str(path), "--no-index", *consent, memory=None)
        assert added.returncode in {1, 4}
    assert not mark.exists()


def test_an_unreadable_file_is_told(tmp_path: Path) -> None:
    path = headers.put(tmp_path, headers.packed(*headers.entries(headers.kohya())))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(FormatError, match="Permission denied"):
        reading.inspect(path)


def test_an_expanded_tensor_is_no_shortcut_to_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    torch.save({"a.lora_A.weight": torch.ones(1).expand(2**20, 2**20), "a.lora_B.weight": torch.ones(2, 2**20)}, path)
    with pytest.raises(FormatError, match="larger than its bytes"):
        reading.examine(path, allow_pickle=True)


def test_two_names_for_one_memory_are_two_tensors(tmp_path: Path) -> None:
    down = torch.randn(6, 2)
    torch.save({"a.lora_A.weight": down.T, "a.lora_B.weight": down}, tmp_path / "shared.bin")
    save_file({"a.lora_A.weight": down.T.contiguous(), "a.lora_B.weight": down}, tmp_path / "plain.safetensors")
    right = reading.fingerprint(tmp_path / "plain.safetensors")
    assert reading.fingerprint(tmp_path / "shared.bin", allow_pickle=True) == right


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_no_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    """A quantised factor without its scale would be read as nonsense."""
    path = tmp_path / "quantised.safetensors"
    save_file({"a.lora_A.weight": torch.ones(2, 6), "a.lora_B.weight": torch.ones(6, 2).to(dtype)}, path)
    with pytest.raises(FormatError, match="expected floating-point numbers"):
        reading.inspect(path)


def test_a_gguf_file_is_known_and_refused(tmp_path: Path) -> None:
    path = headers.put(tmp_path, b"GGUF" + bytes(100), "adapter.gguf")
    with pytest.raises(FormatError, match="GGUF"):
        reading.examine(path)
