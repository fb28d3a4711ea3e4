"""What the catalogue answers: references, filters, lineage, vectors, words; the same on both databases."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from lorahub.hub import schema
from lorahub.hub.catalog import Catalog
from lorahub.hub.database import Database, migration_config
from lorahub.hub.errors import BadOption, CatalogError, NameTaken, UnknownAdapter
from sqlalchemy import insert, text


@pytest.fixture
def library(catalog, lora):
    """Three adapters on two bases: ink, oil and chalk."""
    lora("ink.safetensors", 1, ss_base_model_version="sd_v1", modelspec__description="black ink drawings on paper")
    lora("oil.safetensors", 2, ss_base_model_version="sdxl_base_v1-0", modelspec__tags="painting, thick")
    folder = lora("chalk.safetensors", 3, ss_base_model_version="sd_v1", modelspec__tags="painting").parent
    assert [outcome.status for outcome in catalog.add([folder])] == ["added"] * 3
    return catalog


def names(entries):
    return [entry.name for entry in entries]


def test_a_reference_is_a_name_an_id_its_beginning_a_digest_or_a_path(library):
    entry = library.entry("ink")
    for ref in (entry.id, entry.id[:6], entry.digest, entry.locations[0]):
        assert library.entry(ref) == entry


def test_an_unknown_reference_names_what_is_close(library, tmp_path):
    with pytest.raises(UnknownAdapter, match="close to it: chalk"):
        library.entry("chalc")
    with pytest.raises(UnknownAdapter, match="see `list`"):
        library.entry("zzzzzz")
    for odd in ("", "\0", "a\0/b", "\ud800", "/no/where", "\ud800/x", "%", "_"):
        with pytest.raises(UnknownAdapter):
            library.entry(odd)
    assert library.entries(tags=["\ud800"]) == []
    with Catalog(tmp_path / "other") as empty, pytest.raises(UnknownAdapter, match="is empty"):
        empty.entry("ink")


def test_an_ambiguous_id_lists_the_adapters(library):
    row = dict.fromkeys(("rank_min", "rank_max", "modules", "parameters"), 0)
    row |= dict.fromkeys(("triggers", "extras", "warnings", "given"), "[]")
    row |= {"format": "kohya", "mergeable": True, "description": "", "text_digest": "", "created": ""}
    with library._database.write() as connection:
        for number in range(2):
            id_ = f"abcdef000000000{number}"
            own = {"id": id_, "digest": id_ * 4, "name": f"made{number}"}
            connection.execute(insert(schema.adapter), {**row, **own})
    with pytest.raises(CatalogError, match="2 ids begin with 'abcdef'"):
        library.entry("abcdef")


def test_filters(library):
    assert names(library.entries()) == ["chalk", "ink", "oil"]
    assert names(library.entries(base="sd-1")) == ["chalk", "ink"]
    assert names(library.entries(base="stable-diffusion-v1-5/stable-diffusion-v1-5")) == ["chalk", "ink"]
    assert names(library.entries(tags=["Painting "])) == ["chalk", "oil"]
    assert names(library.entries(base="sdxl", tags=["painting", "thick"])) == ["oil"]
    assert names(library.entries(tags=["absent"])) == []
    ids = [library.entry(name).id for name in ("oil", "chalk")]
    assert names(library.entries(ids=[*ids, "0" * 16])) == ["oil", "chalk"]
    assert names(library.entries(base="sd-1", ids=ids)) == ["chalk"]
    assert library.entries(ids=[]) == []


def test_tags_are_added_and_taken_away(library):
    assert library.tag("ink", ["Fine  Line", "fine line", "new"]).tags == ("fine line", "new")
    assert library.tag("ink", [], remove=["NEW"]).tags == ("fine line",)
    assert [hit[0] for hit in library.text_matches("fine", 5)] == [library.entry("ink").id]


def test_renaming_and_rebasing(library):
    assert library.rename("ink", "pen").name == "pen"
    assert library.rename("pen", "pen").name == "pen"
    assert library.rebase("pen", "my/base").base_from == "given"
    with pytest.raises(NameTaken):
        library.rename("pen", "oil")
    with pytest.raises(BadOption):
        library.rename("pen", "bad\nname")


def test_lineage_goes_back_to_the_first_and_survives_removal(library):
    ink, oil, chalk = (library.entry(name) for name in ("ink", "oil", "chalk"))
    library.link("oil", [(ink.id, 1.0)], "compress", {"rank": 1}, seed=3, version="0.1.0")
    library.link(chalk.id, [("oil", -0.5), ("ink", 1.5)], "exact", {"path": "a/b"})
    library.remove("oil")
    links = library.lineage("chalk")
    assert [(link.child, link.parent_name, link.weight) for link in links] == [
        (chalk.id, "oil", -0.5),
        (chalk.id, "ink", 1.5),
        (oil.id, "ink", 1.0),
    ]
    assert (links[0].parent_digest, links[0].options) == (oil.digest, {"path": "a/b"})
    assert (links[2].seed, links[2].version, links[2].operation) == (3, "0.1.0", "compress")
    library.remove("chalk")
    library.add([])
    assert library.lineage("ink") == []


def test_pictures_are_children_of_the_adapters_they_were_painted_with(library):
    first, second = "1" * 64, "2" * 64
    library.link_picture(first, [("ink", 1.0), ("oil", -0.5)], {"out": "/a.png", "prompt": "a fox"}, version="0.1.0")
    library.link_picture(second, [("ink", 0.7)], {"out": "/b.png", "prompt": "a bear"})
    library.link("chalk", [("ink", 1.0)], "exact")
    assert {(one.child, one.options["out"], one.weight) for one in library.pictures("ink")} == {
        (first[:16], "/a.png", 1.0), (second[:16], "/b.png", 0.7)
    }  # fmt: skip
    assert [(one.options["prompt"], one.version) for one in library.pictures("oil")] == [("a fox", "0.1.0")]
    assert [library.lineage(name) for name in ("ink", "oil")] == [[], []]
    library.link_picture("3" * 64, [("oil", 1.0)], {"out": "/a.png"}, instead=first)
    assert [one.child for one in library.pictures("ink")] == [second[:16]]
    assert [one.child for one in library.pictures("oil")] == ["3" * 16]
    with pytest.raises(UnknownAdapter):
        library.link_picture("4" * 64, [("absent", 1.0)], {"out": "/c.png"})


def test_linking_again_replaces_and_circles_end(library):
    library.link("ink", [("oil", 1.0)], "exact")
    library.link("ink", [("chalk", 2.0)], "exact")
    library.link("chalk", [("ink", 3.0)], "exact")
    assert [(link.parent_name, link.weight) for link in library.lineage("ink")] == [("chalk", 2.0), ("ink", 3.0)]
    with pytest.raises(UnknownAdapter):
        library.link("ink", [("absent", 1.0)], "exact")


def test_vectors_are_kept_until_their_input_changes(library):
    missing = library.missing_vectors("words")
    assert names(missing) == ["chalk", "ink", "oil"]
    rows = [(entry.id, entry.text_digest, np.full(4, number)) for number, entry in enumerate(missing)]
    library.store_vectors("words", rows)
    assert library.missing_vectors("words") == []
    assert names(library.missing_vectors("weights")) == ["chalk", "ink", "oil"]
    numbers, ids, matrix = library.vectors("words")
    assert (numbers.dtype, matrix.dtype, matrix.shape) == (np.int64, np.float32, (3, 4))
    assert ids == [entry.id for entry in missing]
    assert matrix[:, 0].tolist() == [0, 1, 2]
    state = library.vector_state("words")
    assert state == (3, numbers.max())
    library.store_vectors("words", rows)
    assert library.vector_state("words") == state
    changed = library.describe("ink", "white ink")
    assert names(library.missing_vectors("words")) == ["ink"]
    library.store_vectors("words", [(changed.id, changed.text_digest, np.full(4, 9))])
    assert library.missing_vectors("words") == []
    assert library.vector_state("words") == (3, state[1] + 1)
    library.remove("ink")
    assert library.vector_state("words")[0] == 2


def test_a_vector_of_the_content_does_not_depend_on_words(library):
    library.store_vectors("weights", [(entry.id, entry.digest, [1.0, 2.0]) for entry in library.entries()])
    library.describe("ink", "other words")
    assert library.missing_vectors("weights") == []


def test_vectors_that_cannot_be(library):
    entry = library.entry("ink")
    library.store_vectors("words", [("0" * 16, "x", [1.0])])
    assert library.vector_state("words") == (0, 0)
    assert library.vectors("words")[2].shape == (0, 0)
    for bad in ([], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(CatalogError, match="empty or not finite"):
            library.store_vectors("words", [(entry.id, "x", bad)])
    library.store_vectors("words", [(entry.id, "x", [1.0]), (library.entry("oil").id, "x", [1.0, 2.0])])
    with pytest.raises(CatalogError, match="differ in length"):
        library.vectors("words")


def test_words_find_adapters_and_say_why(library):
    ((id_, score, why),) = library.text_matches("drawing with black ink", 5)
    assert id_ == library.entry("ink").id
    assert score > 0
    assert why == "name: ink; description: black, ink, drawings"
    assert [why for _, _, why in library.text_matches("paint", 5)] == ["tags: painting"] * 2
    assert len(library.text_matches("painting", 1)) == 1
    assert [hit[0] for hit in library.text_matches("painting", 5, base="sdxl")] == [library.entry("oil").id]
    assert library.text_matches("painting", 5, tags=["thick", "absent"]) == []


def test_the_name_counts_more_than_the_description(library):
    library.describe("oil", "almost like ink")
    assert library.text_matches("ink", 5)[0][0] == library.entry("ink").id


def test_the_beginning_of_the_last_word_is_enough(library):
    assert [hit[0] for hit in library.text_matches("cha", 5)] == [library.entry("chalk").id]


def test_words_of_any_script_match(library):
    library.describe("ink", "тушь на бумаге, 水墨画 encre à la Café")
    for query in ("бумаге", "水墨画", "café", "ENCRE"):
        assert [hit[0] for hit in library.text_matches(query, 5)] == [library.entry("ink").id], query


HOSTILE = """
" ' * - ( ((( \\ % : ^ + | & ! <-> ink\\ ^ink ink* ink:*A "ink (ink {name}:ink name:ink* ink+oil !ink&| '';DROP NEAR(ink
""".split()


@pytest.mark.parametrize(
    "query", [*HOSTILE, "", " ", "\0", "\ud800", "a AND", "ink OR", "NOT ink", "x" * 5000, "ink " * 500]
)
def test_no_query_is_an_operator_or_an_error(library, query):
    for hit in library.text_matches(query, 5):
        assert hit[2]
    assert library.text_matches("ink", 0) == []


def test_a_query_of_common_words_alone_still_searches(library):
    if library._database.dialect == "postgresql":
        pytest.skip("PostgreSQL's English dictionary does not index the commonest words")
    library.describe("oil", "to be or not to be")
    assert [hit[0] for hit in library.text_matches("not to be", 5)] == [library.entry("oil").id]


def test_the_embedded_text_has_the_words_and_not_the_punctuation(library):
    assert library.entry("ink").text() == "ink. black ink drawings on paper"
    assert library.entry("oil").text() == "oil. painting, thick"


def test_a_sound_catalogue_verifies_and_a_lost_index_is_noticed(library):
    assert library.verify() == []
    with library._database.write() as connection:
        connection.execute(text("DELETE FROM adapter_text"))
    assert any("full text covers 0 adapters of 3" in problem for problem in library.verify())


def test_two_catalogues_on_one_home_see_each_other(catalog, url, lora):
    path = lora("ink.safetensors", 1)
    with Catalog(catalog.home, url) as other:
        list(other.add([path]))
        assert [outcome.status for outcome in catalog.add([path])] == ["unchanged"]
        catalog.rename("ink", "pen")
        assert other.entry("pen").locations == (str(path),)


def test_the_migrations_make_the_tables_that_the_code_expects(catalog):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with catalog._database.read() as connection:
        assert ScriptDirectory.from_config(migration_config(connection)).get_current_head() == schema.NEWEST
        ours = set(schema.metadata.tables)
        context = MigrationContext.configure(
            connection,
            opts={"include_name": lambda name, kind, parents: kind != "table" or name in ours, "compare_type": True},
        )
        assert compare_metadata(context, schema.metadata) == []


def test_a_catalogue_from_the_future_is_refused(tmp_path, url):
    with Catalog(tmp_path, url) as catalog, catalog._database.write() as connection:
        connection.execute(text("UPDATE lorahub_version SET version_num = '9999'"))
    with pytest.raises(CatalogError, match="newer version"):
        Catalog(tmp_path, url)


def test_a_failed_migration_leaves_nothing(tmp_path, monkeypatch):
    from lorahub.hub import database

    def half(connection):
        connection.execute(text("CREATE TABLE adapter (id INTEGER)"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database, "migrate", half)
        with pytest.raises(KeyboardInterrupt):
            Database(tmp_path)
    with Catalog(tmp_path) as catalog:
        assert catalog.entries() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url", "is no database URL"),
        ("mysql://host/name", "are not supported"),
        ("postgresql+nothing://host/name", "needs a driver"),
        ("postgresql+psycopg://nobody@localhost:1/name", "database failed"),
    ],
)
def test_a_database_that_cannot_be_opened(tmp_path, url, message):
    pytest.importorskip("psycopg")
    with pytest.raises(CatalogError, match=message):
        Catalog(tmp_path, url)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "lorahub.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(CatalogError, match=r"lorahub\.db: the catalogue's database failed: file is not a database"):
        Catalog(tmp_path)


def test_a_home_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogError, match="cannot be made"):
        Catalog(tmp_path / "file" / "home")


def test_opening_an_existing_catalogue_imports_neither_torch_nor_alembic(tmp_path, lora):
    script = """
import sys
from pathlib import Path
from lorahub.hub.catalog import Catalog
with Catalog(Path(sys.argv[1])) as catalog:
    list(catalog.add([Path(sys.argv[2])]))
    catalog.text_matches("ink", 5), catalog.vectors("words"), catalog.entries()
print([name for name in ("torch", "alembic", "filelock", "psycopg", "faiss", "transformers") if name in sys.modules])
"""
    path = lora("ink.safetensors", 1)
    Catalog(tmp_path / "home").close()
    command = [sys.executable, "-c", script, str(tmp_path / "home"), str(path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
