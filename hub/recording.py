"""Writing what was found in files into the catalogue: one batch, one transaction, decided under the writer's lock.

Content decides: a digest that is known makes a file another location of its adapter, a new one makes an adapter. What
files say about an adapter is united and never overwrites what the user said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, bindparam, delete, insert, or_, select, update

from .database import Database
from .entries import Added, Status, identity, rejection, sentences, storable, text_digest
from .errors import NameTaken
from .naming import name_from_path
from .rows import pieces, reindex, tidy_tags
from .scan import Candidate
from .schema import adapter, header, location, rejected, tag

if TYPE_CHECKING:
    from .reading import Inspection

_TOLD = ("base", "title", "description", "triggers")  # what files say in words; each may say more than another
_READ = ("format", "rank_min", "rank_max", "modules", "parameters", "mergeable", "reason", "extras", "warnings")
_CHANGING = (*_TOLD, *_READ, "base_from", "name", "given", "blob")
_NOTHING = (None, "", "[]")


@dataclass(frozen=True)
class Wish:
    """What the caller wants of the adapters that are added; `name` is for the one at the path `named`."""

    base: str | None = None
    name: str | None = None
    named: str | None = None
    tags: tuple[str, ...] = ()
    copy: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A candidate and what reading it gave: a digest (with an inspection, unless nothing changed) or a refusal."""

    candidate: Candidate
    digest: str | None = None
    inspection: Inspection | None = None
    blob: str | None = None
    refusal: str = ""
    unsafe: bool = False


def record(connection: Connection, database: Database, findings: Sequence[Finding], wish: Wish) -> list[Added]:
    """Record the findings in the caller's write transaction; one outcome each, in order.

    Raises NameTaken if the wished name belongs to another adapter.
    """
    ledger = _Ledger.opened(connection, findings, wish)
    outcomes = [ledger.enter(finding) for finding in findings]
    ledger.write(connection, database)
    return outcomes


@dataclass
class _Ledger:
    """The rows that a batch touches, as they are and as they become."""

    wish: Wish
    names: dict[str, str]  # default names by path
    records: dict[str, dict[str, Any]]  # adapter rows by id
    headers: dict[str, dict[str, str]]
    tagged: set[tuple[str, str]]  # adapter ids with their tags, stored and new
    owners: dict[str, str]  # adapter ids by name
    holders: dict[str, str]  # adapter ids by path
    new: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    tags: list[dict[str, str]] = field(default_factory=list)
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def opened(cls, connection: Connection, findings: Sequence[Finding], wish: Wish) -> _Ledger:
        """The ledger with what the database knows of these findings' contents, names and paths."""
        digests = [finding.digest for finding in findings if finding.digest]
        ids = [identity(digest) for digest in digests]
        paths = [finding.candidate.path for finding in findings]
        names = {
            finding.candidate.path: name_from_path(finding.candidate.path, folder=finding.inspection.path.is_dir())
            for finding in findings
            if finding.inspection
        }
        known = connection.execute(select(adapter).where(or_(adapter.c.id.in_(ids), adapter.c.digest.in_(digests))))
        headers = connection.execute(select(header).where(header.c.adapter_id.in_(ids)))
        wanted = {wish.name, *_wanted_names(findings, names)} - {None}
        owners = connection.execute(select(adapter.c.name, adapter.c.id).where(adapter.c.name.in_(wanted)))
        tagged = connection.execute(select(tag.c.adapter_id, tag.c.tag).where(tag.c.adapter_id.in_(ids)))
        holders = connection.execute(select(location.c.path, location.c.adapter_id).where(location.c.path.in_(paths)))
        return cls(
            wish=wish,
            names=names,
            records={row.id: dict(row._mapping) for row in known},
            headers={row.adapter_id: json.loads(row.metadata) for row in headers},
            tagged={(row.adapter_id, row.tag) for row in tagged},
            owners={row.name: row.id for row in owners},
            holders={row.path: row.adapter_id for row in holders},
        )

    def enter(self, finding: Finding) -> Added:
        """Decide what becomes of one finding."""
        path = finding.candidate.path
        if finding.digest is None:
            return self._refuse(finding, finding.refusal)
        id_ = identity(finding.digest)
        known = self.records.get(id_)
        if known and known["digest"] != finding.digest:
            return self._refuse(finding, f"{path}: its id {id_} is taken by other content, {known['name']}")
        status: Status = "added"
        if known is not None:
            status = "unchanged" if self.holders.get(path) == id_ else "duplicate"
            self._learn(known, finding, again=status == "unchanged")
        elif finding.inspection is None:
            return rejection(path, "another process removed its adapter just now; add it again")
        else:
            known = self._create(id_, finding.digest, finding.candidate.path, finding.inspection)
        self._grant(known, finding)
        self.holders[path] = id_
        self.refused.pop(path, None)
        self.places[path] = _place(finding.candidate, id_, known["format"])
        reason = known["reason"]
        if status == "duplicate":
            reason = f"the same tensors as {known['name']}" + (f"; {reason}" if reason else "")
        return Added(
            id_, known["name"], path, known["format"], known["base"], known["rank_max"], known["modules"],
            known["mergeable"], status, reason,
        )  # fmt: skip

    def write(self, connection: Connection, database: Database) -> None:
        """Everything decided, into the tables."""
        changed = [id_ for id_ in self.changed if id_ not in self.new]
        if self.new:
            connection.execute(insert(adapter), [self.records[id_] for id_ in self.new])
        if changed:
            values: dict[str, Any] = {name: bindparam(f"to_{name}") for name in _CHANGING}
            connection.execute(
                update(adapter).where(adapter.c.id == bindparam("which")).values(values),
                [{"which": id_, **{f"to_{name}": self.records[id_][name] for name in _CHANGING}} for id_ in changed],
            )
        headers = [{"adapter_id": id_, "metadata": json.dumps(self.headers[id_])} for id_ in (*self.new, *changed)]
        _upsert(connection, database, header, headers, "adapter_id")
        if self.tags:
            connection.execute(database.insert(tag).on_conflict_do_nothing(), self.tags)
        _upsert(connection, database, location, list(self.places.values()), "path")
        _upsert(connection, database, rejected, list(self.refused.values()), "path")
        forget(connection, location, self.refused)
        forget(connection, rejected, self.places)
        reindex(connection, [*self.new, *changed])

    def _refuse(self, finding: Finding, reason: str) -> Added:
        path, reason = finding.candidate.path, storable(reason)
        self.places.pop(path, None)
        self.refused[path] = {
            "path": path, "stamp": finding.candidate.stamp, "reason": reason, "unsafe": finding.unsafe,
        }  # fmt: skip
        return rejection(path, reason)

    def _create(self, id_: str, digest: str, path: str, inspection: Inspection) -> dict[str, Any]:
        name = self._free_name(self.names[path], id_, digest)
        facts = _facts(inspection)
        tags = sorted(tidy_tags(map(storable, (*inspection.tags, *self.wish.tags))))
        made = {
            **facts,
            "id": id_,
            "digest": digest,
            "name": name,
            "given": "[]",
            "blob": None,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "text_digest": text_digest(
                sentences(name, facts["title"], facts["description"], json.loads(facts["triggers"]), tags)
            ),
        }
        self.records[id_], self.owners[name] = made, id_
        self.headers[id_] = dict(inspection.metadata)
        self.new.append(id_)
        self._tag(id_, tags)
        return made

    def _learn(self, known: dict[str, Any], finding: Finding, *, again: bool) -> None:
        """Let a file that was read `again` correct what it said before; let another copy only add what is missing."""
        if finding.inspection is None:
            return
        facts, given = _facts(finding.inspection), json.loads(known["given"])
        before = dict(known)
        for name in _TOLD:
            if facts[name] in _NOTHING or name in given:
                continue
            guess = name == "base" and str(known["base_from"]).startswith("guessed")
            if again or known[name] in _NOTHING or guess:
                known[name] = facts[name]
                if name == "base":
                    known["base_from"] = facts["base_from"]
        if again:
            known.update({name: facts[name] for name in _READ})
        id_ = known["id"]
        old, new = self.headers.get(id_, {}), dict(finding.inspection.metadata)
        self.headers[id_] = {**old, **new} if again else {**new, **old}
        self._tag(id_, finding.inspection.tags)
        if known != before or self.headers[id_] != old:
            self.changed.add(id_)

    def _grant(self, known: dict[str, Any], finding: Finding) -> None:
        """What the caller wished for."""
        before = dict(known)
        given = set(json.loads(known["given"]))
        if self.wish.base is not None:
            known.update(base=storable(self.wish.base), base_from="given")
            given.add("base")
        if self.wish.name is not None and finding.candidate.path == self.wish.named:
            self._rename(known, self.wish.name)
        if finding.blob:
            known["blob"] = finding.blob
        known["given"] = json.dumps(sorted(given))
        self._tag(known["id"], self.wish.tags)
        if known != before:
            self.changed.add(known["id"])

    def _tag(self, id_: str, tags: Iterable[str]) -> None:
        for word in tidy_tags(map(storable, tags)):
            if (id_, word) not in self.tagged:
                self.tagged.add((id_, word))
                self.tags.append({"adapter_id": id_, "tag": word})
                self.changed.add(id_)

    def _rename(self, known: dict[str, Any], name: str) -> None:
        owner = self.owners.get(name)
        if owner not in (None, known["id"]):
            raise NameTaken(f"another adapter ({owner}) is called {name!r}; choose another name or remove that one")
        if self.owners.get(known["name"]) == known["id"]:
            del self.owners[known["name"]]
        known["name"], self.owners[name] = name, known["id"]

    def _free_name(self, name: str, id_: str, digest: str) -> str:
        """The name, or with a piece of the digest if others have it."""
        if self.owners.get(name, id_) == id_:
            return name
        apart = _told_apart(name, digest)
        return apart if self.owners.get(apart, id_) == id_ else f"{name}-{id_}"


def forget(connection: Connection, table: Any, paths: Iterable[str]) -> None:
    """Delete the rows of these paths from `location` or `rejected`."""
    for some in pieces(list(paths)):
        connection.execute(delete(table).where(table.c.path.in_(some)))


def _told_apart(name: str, digest: str) -> str:
    return f"{name}-{digest[:6]}"


def _wanted_names(findings: Sequence[Finding], names: Mapping[str, str]) -> Iterator[str]:
    for finding in findings:
        if finding.digest and finding.candidate.path in names:
            name = names[finding.candidate.path]
            yield from (name, _told_apart(name, finding.digest))


def _place(candidate: Candidate, id_: str, format_: str) -> dict[str, Any]:
    return {
        "path": candidate.path,
        "adapter_id": id_,
        "format": format_,
        "size": candidate.size,
        "mtime": candidate.mtime,
        "stamp": candidate.stamp,
    }


def _facts(inspection: Inspection) -> dict[str, Any]:
    """The adapter's columns that a file fills."""
    return {
        "base": inspection.base and storable(inspection.base),
        "base_from": inspection.base_from and storable(inspection.base_from),
        "format": storable(inspection.format),
        "rank_min": inspection.ranks[0],
        "rank_max": inspection.ranks[1],
        "modules": inspection.modules,
        "parameters": inspection.parameters,
        "mergeable": inspection.mergeable,
        "reason": inspection.reason and storable(inspection.reason),
        "title": inspection.title and storable(inspection.title),
        "description": storable(inspection.description),
        "triggers": json.dumps([storable(word) for word in inspection.triggers]),
        "extras": json.dumps(inspection.extras),
        "warnings": json.dumps([storable(word) for word in inspection.warnings]),
    }


def _upsert(
    connection: Connection, database: Database, table: Any, rows: Sequence[Mapping[str, Any]], key: str
) -> None:
    if not rows:
        return
    statement = database.insert(table)
    rest = {column.name: statement.excluded[column.name] for column in table.c if column.name != key}
    connection.execute(statement.on_conflict_do_update(index_elements=[key], set_=rest), rows)
