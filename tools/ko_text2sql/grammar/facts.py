"""What a domain offers to the grammar: tables and columns by role, foreign keys, and the values that rows hold."""

from __future__ import annotations

import datetime
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quantlab.data.populate import rows
from quantlab.data.schema import Column, Domain, Table
from quantlab.errors import DataError

SEED = 0  # of the bundled databases

_PEOPLE = {"명", "분", "인", "사람"}
_NAMES = ("김민준", "이서연", "박지훈", "최수빈", "정하은")  # where a domain's people are not known
_REF_ENDINGS = (" 번호", " ID", " 아이디", " 코드", "번호", "ID")


@dataclass(slots=True)
class TableFacts:
    """A table and its columns by role."""

    table: Table
    label: Column | None = None
    key: Column | None = None
    categories: list[Column] = field(default_factory=list)
    groups: list[Column] = field(default_factory=list)  # categories without NULL
    numbers: list[Column] = field(default_factory=list)
    dates: list[Column] = field(default_factory=list)
    flags: list[Column] = field(default_factory=list)
    texts: list[Column] = field(default_factory=list)
    nullable: list[Column] = field(default_factory=list)
    # worth asking for: everything but keys, references and flags
    shown: list[Column] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def ko(self) -> str:
        return self.table.ko

    @property
    def counter(self) -> str:
        return self.table.counter or "개"

    @property
    def person(self) -> bool:
        return self.counter in _PEOPLE

    @property
    def event(self) -> bool:
        """Whether its rows are things that happened (loans, visits) rather than things that are."""
        return self.counter in ("건", "회", "번", "차례")

    @property
    def count_words(self) -> tuple[str, ...]:
        return (
            ("수", "수", "인원", "인원수")
            if self.person
            else ("건수", "수")
            if self.event
            else ("수", "수", "개수")
        )


@dataclass(slots=True)
class Edge:
    """A foreign key: `child.column` → `parent.key`; `role` is what the child calls the parent.

    `alone` where no other column of the child points at the same parent, so that the parent's own name will do.
    """

    child: TableFacts
    column: Column
    parent: TableFacts
    key: str
    role: str
    alone: bool = True


@dataclass(slots=True)
class Link:
    """Two foreign keys of one table: a many-to-many relation between `left.parent` and `right.parent`."""

    left: Edge
    right: Edge


@dataclass(slots=True)
class Facts:
    """A domain as the grammar sees it."""

    domain: Domain
    tables: list[TableFacts]
    edges: list[Edge]
    links: list[Link]
    order: dict[str, int]
    pools: dict[int, tuple[str | int, ...]]  # by id of the column: values of categories and labels


def _table_facts(table: Table) -> TableFacts:
    facts = TableFacts(table)
    for column in table.columns:
        match column.role:
            case "key":
                facts.key = facts.key or column
            case "label":
                facts.label = facts.label or column
            case "category" if column.values or column.group_of:
                facts.categories.append(column)
                if not column.nullable:
                    facts.groups.append(column)
            case "number":
                facts.numbers.append(column)
            case "date":
                facts.dates.append(column)
            case "flag":
                facts.flags.append(column)
            case "text":
                facts.texts.append(column)
        if column.role not in ("key", "ref", "flag"):
            facts.shown.append(column)
        if column.nullable and column.role != "ref":
            facts.nullable.append(column)
    return facts


def _role(column: Column, parent: Table) -> str:
    name = column.ko or parent.ko
    for ending in _REF_ENDINGS:
        if name.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def _facts(domain: Domain) -> Facts:
    tables = [_table_facts(table) for table in domain.tables]
    by_name = {facts.name: facts for facts in tables}
    edges: list[Edge] = []
    for child in tables:
        for column in child.table.columns:
            if column.role == "ref" and column.ref:
                parent_name, _, key = column.ref.partition(".")
                if parent_name in by_name:
                    parent = by_name[parent_name]
                    edges.append(Edge(child, column, parent, key, _role(column, parent.table)))
    for edge in edges:
        edge.alone = sum(other.child is edge.child and other.parent is edge.parent for other in edges) == 1
    links = [
        Link(left, right)
        for left in edges
        for right in edges
        if left is not right
        and left.child is right.child
        and len({left.child.name, left.parent.name, right.parent.name}) == 3
        and left.parent.label
        and right.parent.label
    ]
    order = {facts.name: at for at, facts in enumerate(tables)}
    labels = _labels(domain)
    pools = {
        id(column): labels[table.name]
        if column is table.label and table.name in labels
        else _pool(table, column)
        for table in domain.tables
        for column in table.columns
    }
    return Facts(domain, tables, edges, links, order, pools)


_seen: OrderedDict[int, Facts] = OrderedDict()


def facts_of(domain: Domain) -> Facts:
    """The facts of `domain`, kept for the last few domains."""
    facts = _seen.get(id(domain))
    if facts is None or facts.domain is not domain:
        facts = _facts(domain)
        _seen[id(domain)] = facts
        if len(_seen) > 16:
            _seen.popitem(last=False)
    return facts


def _labels(domain: Domain) -> dict[str, tuple[str | int, ...]]:
    """The labels of the rows that the domain's database holds, by table; empty if it cannot be filled.

    Every column is filled from a stream of its own, so a copy of the domain with nothing but keys and labels gets the
    very labels of the whole database, at a fraction of the cost.
    """
    bare = tuple(
        replace(
            table,
            unique=(),
            columns=tuple(column for column in table.columns if column.role in ("key", "label")),
        )
        for table in domain.tables
        if table.label
    )
    try:
        filled = rows(replace(domain, tables=bare), SEED)
    except DataError:
        return {}
    found: dict[str, tuple[str | int, ...]] = {}
    for table in bare:
        at = [column.role for column in table.columns].index("label")
        found[table.name] = tuple(str(row[at]) for row in filled[table.name])
    return found


def _pool(table: Table, column: Column) -> tuple[str | int, ...]:
    """Values that the column may hold; for labels made of parts, as many as fit a fair choice."""
    if column.group_of:
        return tuple(group for group, _ in table.column(column.group_of).groups)
    if column.values:
        return column.values
    if column.combine:
        combined = [""]
        for at, part in enumerate(column.combine):
            joiner = column.joiner if at else ""
            combined = [head + joiner + item for head in combined for item in part][:2000]
        return tuple(combined)
    return _NAMES if column.person else ()


def sample_value(facts: Facts, rng: random.Random, column: Column) -> str | int:
    """A value that a category or label column may hold."""
    pool = facts.pools[id(column)]
    return pool[int(rng.random() * len(pool))] if pool else column.ko


def _decimals(step: float) -> int:
    text = f"{step:.6f}".rstrip("0")
    return len(text.partition(".")[2])


def number_literal(value: float, step: float) -> str:
    """A number of the column's precision as SQL: 12000, 4.5, 4."""
    decimals = _decimals(step)
    if not decimals:
        return str(round(value))
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return text or "0"


def bounds(column: Column) -> tuple[float, float, float]:
    """Smallest value, largest value and step of a number column."""
    low, high = (float(str(bound)) for bound in column.range or (0, 100))
    step = float(column.step or (1 if "INT" in column.type.upper() else 0.1))
    return low, high, step


def sample_number(rng: random.Random, column: Column, low: float = 0.1, high: float = 0.85) -> float:
    """A threshold inside the column's range, between the fractions `low` and `high` of it, rounded as people round."""
    bottom, top, step = bounds(column)
    value = bottom + (low + (high - low) * rng.random()) * (top - bottom)
    grid = (top - bottom) / (12 if rng.random() < 0.7 else 60)
    nice = step  # the largest of step × 1, 2, 5, 10, 20, ... that the grid allows
    scale = step
    while scale <= grid:
        nice = max(factor * scale for factor in (1, 2, 5) if factor == 1 or factor * scale <= grid)
        scale *= 10
    rounded = round(value / nice) * nice
    return min(max(rounded, bottom + step if top > bottom + step else bottom), top)


def summable(column: Column) -> bool:
    """Whether sums and averages make sense: not for years."""
    return not column.ko.endswith(("연도", "년도", "년", "해", "번호", "순위", "층"))


def step_of(column: Column) -> float:
    return bounds(column)[2]


def date_bounds(column: Column) -> tuple[datetime.date, datetime.date]:
    """First and last day that the column may hold."""
    if not column.range:
        return datetime.date(2020, 1, 1), datetime.date(2023, 12, 31)
    first, last = (datetime.date.fromisoformat(str(bound)[:10]) for bound in column.range)
    return first, last


def sample_date(rng: random.Random, column: Column, low: float = 0.15, high: float = 0.85) -> datetime.date:
    first, last = date_bounds(column)
    days = (last - first).days
    return first + datetime.timedelta(days=int(days * (low + (high - low) * rng.random())))


def tables_in_order(facts: Facts, names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions, in schema order."""
    return tuple(sorted(set(names), key=facts.order.__getitem__))
