"""Where a question's queries run, and how they read in SQLite.

A question with a populated database runs on it. One without gets witness databases, made from its DDL and golds
(`witness.py`) and kept in a cache. Golds and predictions in MySQL's or PostgreSQL's dialect are translated
(`transpile.py`), with the clock at a fixed date in every dialect.

Nothing here raises for what a dataset says: a question that cannot be scored says why in `Ground.reason`, and is
counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quantlab.errors import DataError
from quantlab.paths import cache_folder
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.dialects.transpile import CLOCK, to_sqlite
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.schema.schema import DIALECTS, Schema
from quantlab.text2sql.scoring.execution import Verdict, judge
from quantlab.text2sql.testdata.witness import Witness, build


@dataclass(frozen=True)
class Setting:
    """How questions are run: plain options. `dialect` auto: what the row says, else SQLite where there is a database,
    else what the DDL looks like. `witness` always: also in place of a populated database. `folder`: the cache."""

    dialect: str = "auto"
    witness: str = "auto"
    clock: str = CLOCK
    seed: int = 0
    folder: Path | None = None


@dataclass(frozen=True)
class Ground:
    """`databases` is empty where nothing can be run, and `reason` says why. `golds` are in SQLite's dialect."""

    databases: tuple[Path, ...]
    golds: tuple[str, ...]
    dialect: str
    schema: Schema | None = None
    clock: str = CLOCK
    reason: str = ""
    witness: Witness | None = None

    @property
    def record(self) -> dict[str, int]:
        """For a sample: how many witness databases, and how good they are."""
        if self.witness is None:
            return {}
        return {
            "databases": len(self.databases),
            "mutants": self.witness.mutants,
            "killed": self.witness.killed,
        }


def find_ground(item: Item, sandbox: Sandbox, setting: Setting) -> Ground:
    """The ground of one question. MachineError where witness databases cannot be written."""
    own = item.database if setting.witness != "always" else None
    dialect, schema, trouble = _dialect_and_schema(item, setting)
    translated = [to_sqlite(sql, dialect, setting.clock, schema=schema) for sql in item.golds]
    golds = tuple(found.sql for found in translated if found.sql)
    ground = Ground((), golds, dialect, schema, setting.clock)
    if not translated[0].sql:
        return replace(ground, reason=f"the gold query: {translated[0].reason}")
    if own is not None:
        return replace(ground, databases=(own,))
    if schema is None:
        return replace(ground, reason=f"no database, and the DDL cannot be read: {trouble}")
    folder = setting.folder or cache_folder() / "witness"
    witness = build(schema, golds, sandbox, folder, seed=setting.seed)
    reason = "" if witness.databases else f"no witness database: {witness.reason}"
    return replace(ground, databases=witness.databases, reason=reason, witness=witness)


def judge_on(sandbox: Sandbox, ground: Ground, statement: str) -> Verdict:
    """The verdict on one predicted statement; one that cannot be translated is `unparsed`, never wrong."""
    if ground.reason:
        return Verdict("error", f"not scored: {ground.reason}", evidence=False)
    if not statement.strip():
        return judge(sandbox, ground.databases, ground.golds, "")
    translated = to_sqlite(statement, ground.dialect, ground.clock, schema=ground.schema)
    verdict = judge(sandbox, ground.databases, ground.golds, translated.sql)
    if not translated.sql:
        return Verdict("unparsed", translated.reason, verdict.evidence)
    return verdict


def _dialect_and_schema(item: Item, setting: Setting) -> tuple[str, Schema | None, str]:
    """The dialect of golds and answers, and the DDL as read; None with the reason where it cannot be."""
    known = setting.dialect if setting.dialect != "auto" else item.dialect
    stated = known if known in DIALECTS else None
    if item.database is not None and stated in (None, "sqlite") and setting.witness != "always":
        return "sqlite", None, ""  # the database itself says what there is
    try:
        # DDL beside a SQLite file is SQLite's, whatever it looks like; else the queries' dialect is the best guess.
        schema = read_schema(item.context, "sqlite" if item.database is not None else stated)
    except DataError as error:
        return stated or "sqlite", None, str(error)
    return stated or ("sqlite" if item.database is not None else schema.dialect), schema, ""
