"""Scanning: every candidate once, no link followed in circles, nothing opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lorahub.hub import scan as scanning
from lorahub.hub.errors import CatalogError
from lorahub.hub.scan import scan, stamp


@pytest.fixture
def library(tmp_path):
    root = (tmp_path / "library").resolve()
    root.mkdir()
    return root


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345678")


def found(*roots, **options):
    """Paths of the candidates, relative to the first root, in order."""
    return [os.path.relpath(candidate.path, roots[0]) for candidate in scan(roots, **options)]


def refusals(root):
    return {Path(one.path).name: one.refusal for one in scan([root]) if one.refusal}


def test_weights_of_all_kinds_and_nothing_else(library):
    names = ["a.safetensors", "b.bin", "c.pt", "d.pth", "e.ckpt", "f.GGUF"]
    put(
        *(library / name for name in names),
        library / "notes.txt",
        library / "g.safetensors.part",
        library / "safetensors",
    )
    assert found(library) == names


def test_a_peft_folder_is_one_candidate(library):
    put(
        library / "one" / "adapter_config.json",
        library / "one" / "adapter_model.safetensors",
        library / "one" / "README.md",
    )
    assert found(library) == ["one"]


def test_other_weights_in_a_peft_folder_are_candidates_of_their_own(library):
    folder = library / "run"
    put(
        *(
            folder / name
            for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt")
        )
    )
    assert found(library) == ["run", "run/adapter_model.bin", "run/optimizer.pt"]


def test_a_config_without_peft_weights(library):
    put(library / "mlx" / "adapter_config.json", library / "mlx" / "adapters.safetensors")
    put(library / "partial" / "adapter_config.json")
    assert found(library) == ["mlx/adapters.safetensors", "partial"]


def test_weights_without_a_config_are_a_file(library):
    put(library / "adapter_model.safetensors")
    assert found(library) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", ""])
def test_naming_a_part_of_a_peft_folder_means_the_folder(library, name):
    put(library / "one" / "adapter_config.json", library / "one" / "adapter_model.safetensors")
    assert found(library / "one" / name) == [".." if name else "."]


def test_a_file_that_is_named_is_a_candidate_whatever_its_suffix(library):
    put(library / "lora.weights")
    assert found(library) == []
    assert found(library / "lora.weights") == ["."]


def test_overlapping_roots_give_every_candidate_once(library):
    put(library / "deep" / "a.safetensors", library / "b.safetensors")
    file = library / "b.safetensors"
    assert len(found(library, library / "deep", library, library / ".." / "library")) == 2
    assert found(file, file) == ["."]


def test_a_file_named_beside_its_folder_is_given_once(library):
    put(library / "a.safetensors")
    assert len(found(library, library / "a.safetensors")) == 1
    assert len(found(library / "a.safetensors", library)) == 1


def test_a_path_that_does_not_exist(library):
    with pytest.raises(CatalogError, match="no such file or folder"):
        found(library / "absent")


def test_links_to_folders_are_followed_but_not_in_circles_or_upwards(library, tmp_path):
    elsewhere = (tmp_path / "elsewhere").resolve()
    put(
        library / "a.safetensors",
        library / "sub" / "b.safetensors",
        elsewhere / "c.safetensors",
        tmp_path / "no.safetensors",
    )
    (library / "loop").symlink_to(library)
    (library / "sub" / "up").symlink_to(library.parent)
    (library / "sub" / "root").symlink_to("/")
    (library / "itself").symlink_to(library / "itself")
    (library / "out").symlink_to(elsewhere)
    (library / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(library / "sub")
    (elsewhere / "home").symlink_to(tmp_path)
    assert found(library) == ["a.safetensors", "sub/b.safetensors", "../elsewhere/c.safetensors"]


def test_a_link_to_a_folder_counts_as_the_folder(library, tmp_path):
    put(library / "a.safetensors")
    (tmp_path / "link").symlink_to(library)
    assert [one.path for one in scan([tmp_path / "link"])] == [str(library / "a.safetensors")]


def test_a_link_to_a_file_keeps_its_own_name(library, tmp_path):
    put(tmp_path / "0123abcd.bin")
    (library / "named.safetensors").symlink_to(tmp_path / "0123abcd.bin")
    assert found(library) == ["named.safetensors"]


def test_what_is_no_regular_file_is_refused_without_opening_it(library):
    os.mkfifo(library / "pipe.safetensors")
    (library / "dangling.safetensors").symlink_to(library / "absent")
    (library / "circle.bin").symlink_to(library / "circle.bin")
    (library / "device.bin").symlink_to("/dev/zero")
    (library / "folder.safetensors").mkdir()
    assert refusals(library) == {
        "pipe.safetensors": "not a regular file",
        "device.bin": "not a regular file",
        "dangling.safetensors": "cannot be read: No such file or directory",
        "circle.bin": "cannot be read: Too many levels of symbolic links",
    }


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_names_that_are_no_text_are_refused_in_printable_form(library):
    (library / os.fsdecode(b"bad\xff.safetensors")).write_bytes(b"12345678")
    assert refusals(library) == {"bad\\xff.safetensors": "its name is not valid UTF-8; rename it"}


def test_names_with_tricks_are_just_names(library):
    names = [
        "-rf.safetensors",
        "..safetensors",
        "a\nb.safetensors",
        "%00.safetensors",
        "'; DROP TABLE.safetensors",
        "ü.bin",
    ]
    put(*(library / name for name in names))
    assert sorted(found(library)) == sorted(names)


def test_a_folder_that_cannot_be_read_is_reported_and_the_rest_goes_on(library, monkeypatch):
    put(library / "closed" / "a.safetensors", library / "open" / "b.safetensors")
    real = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(scanning.os, "scandir", guarded)
    assert refusals(library) == {"closed": "the folder cannot be read: Permission denied"}
    assert "open/b.safetensors" in found(library)


def test_a_skipped_folder_is_passed_over(library):
    put(library / "blobs" / "a.safetensors", library / "b.safetensors")
    assert found(library, skip=library / "blobs") == ["b.safetensors"]


@pytest.mark.parametrize("name", ["a.civitai.info", "a.metadata.json", "a.json"])
def test_the_stamp_follows_weights_and_sidecars(library, name):
    put(library / "a.safetensors", library / "other.json")
    path = str(library / "a.safetensors")
    before = stamp(path)
    assert before == next(scan([library])).stamp
    put(library / name)
    beside = stamp(path)
    os.utime(library / "a.safetensors", ns=(1, 1))
    assert len({before, beside, stamp(path)}) == 3
    put(library / "b.safetensors", library / "README.md")
    assert stamp(path) == next(scan([library])).stamp


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_the_stamp_of_a_peft_folder_follows_all_its_parts(library, name):
    put(library / "adapter_config.json", library / "adapter_model.safetensors", library / "README.md")
    before = stamp(str(library))
    assert before == next(scan([library])).stamp
    (library / name).write_bytes(b"longer than before")
    assert stamp(str(library)) != before


def test_the_stamp_of_nothing_is_empty(library):
    assert stamp(str(library / "absent.safetensors")) == ""
    assert stamp(str(library)) == ""
