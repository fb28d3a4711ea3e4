"""Adding files: what becomes of new, known, moved, changed, damaged and hostile ones, on both databases."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from lorahub.hub import ingest
from lorahub.hub.errors import BadOption, CatalogError, NameTaken
from safetensors.numpy import load_file, save_file


def add(catalog, *paths, **wishes):
    """Outcomes by file name."""
    return {Path(outcome.path).name: outcome for outcome in catalog.add(paths, **wishes)}


def statuses(catalog, *paths, **wishes):
    return {name: outcome.status for name, outcome in add(catalog, *paths, **wishes).items()}


@pytest.fixture
def examined(monkeypatch):
    """The names of the files that were opened."""
    names, real = [], ingest.examine

    def examine(path, **options):
        names.append(Path(path).name)
        return real(path, **options)

    monkeypatch.setattr(ingest, "examine", examine)
    return names


def test_a_new_file_becomes_an_entry(catalog, lora):
    path = lora("watercolor.safetensors", 1, ss_base_model_version="sd_v1", modelspec__title="Wet paint")
    (outcome,) = catalog.add([path])
    entry = catalog.entry("watercolor")
    assert (outcome.status, outcome.id, outcome.name) == ("added", entry.id, "watercolor")
    assert (outcome.path, outcome.rank, outcome.modules, outcome.mergeable) == (str(path), 2, 1, True)
    assert entry.digest.startswith(entry.id)
    assert (entry.format, entry.base, entry.rank_min, entry.rank_max) == ("kohya", "sd-1", 2, 2)
    assert (entry.title, entry.parameters, entry.locations) == ("Wet paint", 64, (str(path),))
    assert catalog.path(entry) == path
    assert catalog.metadata("watercolor")["modelspec.title"] == "Wet paint"
    assert catalog.verify() == []


def test_an_unchanged_file_is_not_opened_again(catalog, lora, examined):
    lora("a.safetensors", 1), lora("b.safetensors", 2)
    folder = lora("sub/c.safetensors", 3).parent.parent
    assert set(statuses(catalog, folder).values()) == {"added"}
    examined.clear()
    again = add(catalog, folder)
    assert {outcome.status for outcome in again.values()} == {"unchanged"}
    assert again["a.safetensors"].name == "a"
    assert add(catalog, folder / "a.safetensors")["a.safetensors"].rank == 2
    assert examined == []


def test_many_roots_are_looked_up_together(catalog, lora, examined):
    paths = [lora(f"{number:02d}-x.safetensors", number) for number in range(30)]
    assert set(statuses(catalog, *paths).values()) == {"added"}
    examined.clear()
    assert set(statuses(catalog, *paths).values()) == {"unchanged"}
    assert examined == []


def test_a_copy_with_another_header_is_a_duplicate_and_teaches_its_metadata(catalog, lora):
    bare = lora("bare.safetensors", 1)
    rich = lora("rich.safetensors", 1, modelspec__title="Ink", modelspec__tags="Ink, Lines", modelspec__author="me")
    found = add(catalog, bare.parent)
    assert [found[path.name].status for path in (bare, rich)] == ["added", "duplicate"]
    assert "same tensors as bare" in found["rich.safetensors"].reason
    entry = catalog.entry("bare")
    assert (entry.title, entry.tags) == ("Ink", ("ink", "lines"))
    assert entry.locations == (str(bare), str(rich))
    assert catalog.metadata("bare")["modelspec.author"] == "me"
    assert [hit[0] for hit in catalog.text_matches("ink", 5)] == [entry.id]
    assert entry.text_digest not in ("", catalog.entries()[0].digest)
    bare.unlink()
    assert catalog.path(entry) == rich


def test_a_touched_file_is_read_once_more(catalog, lora, examined):
    path = lora("a.safetensors", 1)
    add(catalog, path)
    os.utime(path, (1, 1))
    assert statuses(catalog, path) == {"a.safetensors": "unchanged"}
    examined.clear()
    assert statuses(catalog, path) == {"a.safetensors": "unchanged"}
    assert examined == []


def test_new_words_beside_a_file_are_learnt_but_not_over_the_users(catalog, lora):
    path = lora("a.safetensors", 1, modelspec__description="old words")
    add(catalog, path)
    sidecar = path.with_name("a.civitai.info")
    sidecar.write_text(json.dumps({"description": "sidecar words", "trainedWords": ["inkstyle"]}))
    assert statuses(catalog, path) == {"a.safetensors": "unchanged"}
    assert "sidecar words" in catalog.entry("a").description
    assert catalog.entry("a").triggers == ("inkstyle",)
    catalog.describe("a", "my words")
    sidecar.write_text(json.dumps({"description": "sidecar words again", "model_name": "Inky"}))
    add(catalog, path)
    assert (catalog.entry("a").description, catalog.entry("a").title) == ("my words", "Inky")
    assert catalog.verify() == []


def test_changed_content_moves_the_location_to_another_adapter(catalog, lora):
    path = lora("a.safetensors", 1)
    add(catalog, path)
    old = catalog.entry("a")
    lora("a.safetensors", 2)
    with pytest.raises(CatalogError, match="has other content now"):
        catalog.path(old)
    assert statuses(catalog, path) == {"a.safetensors": "added"}
    new = catalog.entry(str(path))
    assert new.id != old.id
    assert new.name == f"a-{new.digest[:6]}"
    assert catalog.entry("a").locations == ()
    assert any("none of its files exists" in problem for problem in catalog.verify())
    with pytest.raises(CatalogError, match="no file is known"):
        catalog.path(catalog.entry("a"))


def test_a_moved_file_leaves_no_trace_of_its_old_place(catalog, lora):
    path = lora("old/a.safetensors", 1)
    library = path.parent.parent
    add(catalog, library)
    moved = library / "a.safetensors"
    path.rename(moved)
    assert statuses(catalog, library) == {"a.safetensors": "duplicate"}
    assert catalog.entry("a").locations == (str(moved),)
    moved.unlink()
    assert statuses(catalog, library) == {}
    assert catalog.entry("a").locations == (str(moved),)
    assert any("none of its files" in problem for problem in catalog.verify())
    with pytest.raises(CatalogError, match="is gone"):
        catalog.path(catalog.entry("a"))


def test_a_damaged_file_is_remembered_until_it_changes(catalog, lora, examined):
    good = lora("good.safetensors", 1)
    bad = good.with_name("bad.safetensors")
    bad.write_bytes(good.read_bytes()[:-4])
    first = add(catalog, good.parent)
    assert first["good.safetensors"].status == "added"
    assert (first["bad.safetensors"].status, first["bad.safetensors"].id) == ("rejected", None)
    examined.clear()
    assert add(catalog, good.parent)["bad.safetensors"] == first["bad.safetensors"]
    assert examined == []
    lora("bad.safetensors", 2)
    assert statuses(catalog, bad) == {"bad.safetensors": "added"}
    bad.write_bytes(b"no adapter")
    assert statuses(catalog, bad) == {"bad.safetensors": "rejected"}
    assert catalog.entry("bad").locations == ()


def test_a_pickle_is_refused_until_it_is_allowed(catalog, lora, examined):
    torch = pytest.importorskip("torch")
    path = lora("a.safetensors", 1).with_suffix(".pt")
    torch.save(
        {key: torch.from_numpy(value) for key, value in load_file(path.with_suffix(".safetensors")).items()}, path
    )
    refused = add(catalog, path)["a.pt"]
    assert refused.status == "rejected"
    assert "--allow-pickle" in refused.reason
    examined.clear()
    add(catalog, path)
    assert examined == []
    assert statuses(catalog, path, allow_pickle=True) == {"a.pt": "added"}
    assert statuses(catalog, path.with_suffix(".safetensors")) == {"a.safetensors": "duplicate"}


def test_what_cannot_be_merged_is_added_with_the_reason(catalog, tmp_path):
    folder = tmp_path / "ia3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": "org/base"}))
    tensors = {"base_model.model.layer.0.k.ia3_l": np.ones((8, 1), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    outcome = add(catalog, folder)["ia3"]
    assert (outcome.status, outcome.mergeable, outcome.name) == ("added", False, "ia3")
    assert outcome.reason
    entry = catalog.entry("ia3")
    assert (entry.mergeable, entry.base) == (False, "org/base")
    assert catalog.path(entry) == folder.resolve()
    assert catalog.entry(str(folder / "adapter_model.safetensors")) == entry


def test_wishes_that_are_met_cost_no_writing(catalog, lora):
    path = lora("a.safetensors", 1)
    add(catalog, path, tags=["ink"])
    catalog.store_vectors("words", [(catalog.entry("a").id, catalog.entry("a").text_digest, [1.0])])
    add(catalog, path, tags=["ink"])
    assert catalog.missing_vectors("words") == []


def test_file_names_that_say_nothing_take_their_folders_name(catalog, lora):
    lora("ink/pytorch_lora_weights.safetensors", 1)
    lora("oil/checkpoint-20/lora.safetensors", 2)
    library = lora("models--org--chalk/snapshots/" + "ab" * 20 + "/model.safetensors", 3).parents[3]
    add(catalog, library)
    assert [entry.name for entry in catalog.entries()] == ["chalk", "ink", "oil-checkpoint-20"]


def test_names_that_collide_are_told_apart_by_content(catalog, lora):
    one, two = lora("one/a.safetensors", 1), lora("two/a.safetensors", 2)
    add(catalog, one.parent.parent)
    names = {entry.name for entry in catalog.entries()}
    assert names == {"a", f"a-{catalog.entry(str(two)).digest[:6]}"}


def test_a_name_that_looks_like_a_weight_is_changed(catalog, lora):
    add(catalog, lora("ink:0.7.safetensors", 1))
    assert catalog.entries()[0].name == "ink_0.7"


def test_a_chosen_name(catalog, lora):
    one, two = lora("one.safetensors", 1), lora("two.safetensors", 2)
    assert add(catalog, one, name="mine")["one.safetensors"].name == "mine"
    with pytest.raises(NameTaken, match="mine"):
        add(catalog, two, name="mine")
    with pytest.raises(BadOption, match="for 2 files"):
        add(catalog, one.parent, name="yours")
    with pytest.raises(BadOption, match="cannot be an adapter's name"):
        add(catalog, two, name="mine:0.5")
    assert add(catalog, one, name="yours")["one.safetensors"].name == "yours"
    assert [entry.name for entry in catalog.entries()] == ["yours"]


def test_wishes_reach_adapters_whose_files_are_unchanged(catalog, lora, examined):
    path = lora("a.safetensors", 1, ss_base_model_version="sd_v1")
    add(catalog, path)
    examined.clear()
    outcome = add(catalog, path, base="my/base", tags=["Mine", " mine "])["a.safetensors"]
    assert (outcome.status, outcome.base) == ("unchanged", "my/base")
    assert examined == []
    entry = catalog.entry("a")
    assert (entry.base, entry.base_from, entry.tags) == ("my/base", "given", ("mine",))
    os.utime(path, (1, 1))
    add(catalog, path)
    assert catalog.entry("a").base == "my/base"


def test_a_copy_outlives_the_file(catalog, lora):
    path = lora("a.safetensors", 1, ss_output_name="ink")
    add(catalog, path)
    assert statuses(catalog, path, copy=True) == {"a.safetensors": "unchanged"}
    entry = catalog.entry("a")
    assert entry.blob
    assert len(list(catalog.blobs.digests())) == 1
    path.unlink()
    assert ingest.examine(catalog.path(entry))[1] == entry.digest
    assert [problem for problem in catalog.verify() if "other copies exist" not in problem] == []
    catalog.blobs.path(entry.blob).write_bytes(b"rot")
    assert any("has changed" in problem for problem in catalog.verify())


def test_duplicates_share_one_copy(catalog, lora):
    lora("a.safetensors", 1, note="one")
    path = lora("b.safetensors", 1, note="two")
    add(catalog, path.parent, copy=True)
    assert len(list(catalog.blobs.digests())) == 1


def test_the_catalogues_own_copies_are_not_added(catalog, lora):
    add(catalog, lora("a.safetensors", 1), copy=True)
    assert statuses(catalog, catalog.home) == {}


def test_a_full_disk_leaves_no_half_adapter(catalog, lora, monkeypatch):
    path = lora("a.safetensors", 1)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CatalogError, match="No space left"):
            add(catalog, path, copy=True)
    assert catalog.entries() == []
    assert not [one for one in catalog.blobs.folder.rglob("*") if one.is_file()]
    assert statuses(catalog, path, copy=True) == {"a.safetensors": "added"}


def test_removing_touches_no_file_of_the_users(catalog, lora):
    path = lora("a.safetensors", 1)
    add(catalog, path, copy=True)
    catalog.tag("a", ["ink"])
    removed = catalog.remove("a")
    assert path.exists()
    assert not catalog.blobs.path(removed.blob).exists()
    assert catalog.entries() == []
    assert catalog.text_matches("ink", 5) == []
    assert statuses(catalog, path) == {"a.safetensors": "added"}


def test_hostile_words_are_kept_without_harm(catalog, lora):
    frequency = json.dumps({"10_x": {"nul\0here": 3, "half\ud800": 2, "'; DROP TABLE adapter;--": 1}})
    path = lora("a.safetensors", 1, ss_tag_frequency=frequency, modelspec__title="nul\0title", weird="\x01mark\x02")
    outcome = add(catalog, path)["a.safetensors"]
    assert outcome.status == "added"
    json.dumps(catalog.entry("a").tags).encode()
    " ".join((*catalog.entry("a").tags, catalog.entry("a").text())).encode()
    assert catalog.metadata("a")["weird"] == "\x01mark\x02"
    assert catalog.text_matches("drop", 5)[0][0] == outcome.id


def test_an_unreadable_file_does_not_stop_the_others_and_is_tried_again(catalog, lora, monkeypatch):
    lora("a.safetensors", 1), lora("b.safetensors", 2)
    library = lora("c.safetensors", 3).parent
    real = ingest.examine

    def examine(path, **options):
        if path.name == "b.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "examine", examine)
        found = add(catalog, library)
    assert [outcome.status for outcome in found.values()] == ["added", "rejected", "added"]
    assert statuses(catalog, library)["b.safetensors"] == "added"


def test_a_bug_in_a_reader_is_not_hidden(catalog, lora, monkeypatch):
    def examine(path, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(ingest, "examine", examine)
    with pytest.raises(ZeroDivisionError):
        add(catalog, lora("a.safetensors", 1))


def test_batches_keep_the_order_of_the_scan(catalog, lora, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH", 3)
    paths = [lora(f"{number:02d}-x.safetensors", number) for number in range(10)]
    add(catalog, *paths[4:6])
    paths[7].write_bytes(b"damaged")
    outcomes = list(catalog.add([paths[0].parent]))
    assert [outcome.path for outcome in outcomes] == [str(path) for path in paths]
    assert [outcome.status for outcome in outcomes].count("unchanged") == 2


def test_an_adapter_removed_by_another_process_meanwhile(catalog, lora, monkeypatch):
    path = lora("a.safetensors", 1)
    add(catalog, path.parent)
    real = ingest._recorded

    def late(*arguments):
        catalog.remove("a")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_recorded", late)
        assert statuses(catalog, path, tags=["late"]) == {"a.safetensors": "rejected"}
    assert statuses(catalog, path, tags=["late"]) == {"a.safetensors": "added"}
