"""Measured transfer in the catalogue: kept beside what was measured before, true as long as task and adapter are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lorahub.hub.catalog import Catalog
from lorahub.hub.database import Database
from lorahub.hub.errors import CatalogError
from lorahub.hub.transfer import Measured
from sqlalchemy import text

TASK = Measured("sort mails", "accuracy", "d1", ("sort mails", "which mail is this"), 0.25)


@pytest.fixture
def ids(catalog: Catalog, lora) -> list[str]:
    return [str(one.id) for one in catalog.add([lora(f"{n}.safetensors", n) for n in range(3)])]


def test_what_is_recorded_is_read_back_under_any_name_of_the_base(catalog: Catalog, ids: list[str]) -> None:
    measured = replace(TASK, expert=ids[0], scores={ids[0]: 0.75, ids[1]: 0.1 + 0.2})
    catalog.record_transfer("owner/Base-1", [measured, replace(TASK, name="a")])
    assert catalog.transfer("base-1") == [replace(TASK, name="a"), measured]
    assert catalog.transfer("other") == []


def test_scores_join_those_before_and_replace_their_own(catalog: Catalog, ids: list[str]) -> None:
    catalog.record_transfer("b", [replace(TASK, scores={ids[0]: 0.5, ids[1]: 0.5})])
    catalog.record_transfer("b", [replace(TASK, bare=0.3, scores={ids[1]: 0.6, ids[2]: 0.7})])
    [found] = catalog.transfer("b")
    assert found.scores == {ids[0]: 0.5, ids[1]: 0.6, ids[2]: 0.7}
    assert found.bare == 0.3


def test_a_changed_task_forgets_its_scores_and_no_others(catalog: Catalog, ids: list[str]) -> None:
    other = replace(TASK, name="z", scores={ids[0]: 0.1})
    catalog.record_transfer("b", [replace(TASK, scores={ids[0]: 0.5, ids[1]: 0.5}), other])
    catalog.record_transfer("b", [replace(TASK, digest="d2", scores={ids[1]: 0.9})])
    assert [one.scores for one in catalog.transfer("b")] == [{ids[1]: 0.9}, other.scores]


def test_measures_and_bases_are_kept_apart(catalog: Catalog, ids: list[str]) -> None:
    few, many = replace(TASK, scores={ids[0]: 1.0}), replace(TASK, measure="m", scores={ids[0]: 2.0, ids[1]: 3.0})
    catalog.record_transfer("b", [few, many])
    catalog.record_transfer("c", [few])
    assert catalog.transfer("b") == [many]
    assert catalog.transfer("b", "accuracy") == [few]
    assert catalog.transfer("b", "nothing") == []


def test_a_removed_adapter_takes_its_scores_along_and_leaves_the_task(catalog: Catalog, ids: list[str]) -> None:
    catalog.record_transfer("b", [replace(TASK, expert=ids[0], scores={ids[0]: 0.5, ids[1]: 0.6})])
    catalog.remove(ids[0])
    assert catalog.transfer("b") == [replace(TASK, scores={ids[1]: 0.6})]
    catalog.record_transfer("b", [replace(TASK, expert=ids[0], scores={ids[0]: 0.5})])
    assert catalog.transfer("b") == [replace(TASK, scores={ids[1]: 0.6})]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_leaves_nothing(catalog: Catalog, ids: list[str], wrong: float) -> None:
    with pytest.raises(CatalogError, match="finite"):
        catalog.record_transfer("b", [replace(TASK, name="a"), replace(TASK, scores={ids[0]: wrong})])
    assert catalog.transfer("b") == []


def test_a_catalogue_of_the_first_version_is_brought_up_to_date(tmp_path, lora) -> None:
    with Catalog(tmp_path) as catalog:
        [added] = catalog.add([lora("a.safetensors")])
    old = Database(tmp_path)
    with old.write() as connection:
        for statement in ("DROP TABLE transfer", "DROP TABLE task", "UPDATE lorahub_version SET version_num = '0001'"):
            connection.execute(text(statement))
    old.close()
    with Catalog(tmp_path) as catalog:
        catalog.record_transfer("b", [replace(TASK, scores={str(added.id): 0.5})])
        assert catalog.transfer("b")[0].scores == {added.id: 0.5}
        assert [entry.id for entry in catalog.entries()] == [added.id]
