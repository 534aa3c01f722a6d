"""Synthetic schemas: domains put together from the word pools of `vocabulary.yaml`.

`random_domain` takes two to four entities of one field (now and then of two), gives each a key, a
label and some columns that suit its kind, and ties them with foreign keys and link tables, in the
same `Domain` dataclass as the written domains. No two are alike, so a model that reads them has to
copy names out of the schema instead of remembering them.
"""

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from quantlab.data.schema import Column, Domain, Table
from tools.ko_text2sql.corpus.wording import read_yaml

NAME_COLUMNS = {
    "P": (("name", "이름"), ("full_name", "이름"), ("name", "성명")),
    "O": (("name", "이름"), ("name", "명칭"), ("company_name", "상호")),
    "L": (("name", "이름"), ("name", "명칭"), ("place_name", "장소명")),
    "T": (("name", "이름"), ("model_name", "모델명"), ("item_name", "품명"), ("name", "명칭")),
    "D": (("title", "제목"), ("name", "이름"), ("subject", "제목")),
}
KEY_NAMES = ("{}_id", "{}_id", "{}_id", "{}_id", "{}_id", "id", "id", "{}_no")
LINK_NAMES = ("{a}_{b}", "{b}_{a}", "{a}_{b}_links", "{a}_{b}_map", "{a}_{b}_records")
GLOSSARY_LINES = (
    "{en} {ko}",
    "{ko} {en}",
    "{en}: {ko}",
    "{ko} = {en}",
    "- {en} ({ko})",
    "{ko}\t{en}",
    "-- {en} {ko}",
)
YEARS = (2005, 2024)


@dataclass(frozen=True)
class Entity:
    """A kind of thing that a table can be about."""

    plural: str
    singular: str
    ko: str
    counter: str
    kind: str
    nouns: tuple[str, ...]


def _split(line: str, fields: int) -> list[str]:
    return (line.split("|") + [""] * fields)[:fields]


@cache
def fields() -> dict[tuple[str, str], tuple[Entity, ...]]:
    """(name, Korean name) of every field and its entities."""
    found = {}
    for heading, lines in read_yaml("vocabulary.yaml")["fields"].items():
        name, ko = heading.split("|")
        entities = []
        for line in lines:
            plural, singular, word, counter, kind, nouns = _split(line, 6)
            entities.append(
                Entity(plural, singular, word, counter, kind, tuple(nouns.split(",")) if nouns else ())
            )
        found[name, ko] = tuple(entities)
    return found


@cache
def concepts(pool: str, kind: str) -> tuple[tuple[str, ...], ...]:
    """The column ideas of a pool that suit an entity's kind."""
    lines = (tuple(line.split("|")) for line in read_yaml("vocabulary.yaml")[pool])
    return tuple(parts for parts in lines if kind in parts[-1])


@cache
def label_words() -> dict[str, list[str]]:
    return {name: words.split(",") for name, words in read_yaml("vocabulary.yaml")["label_words"].items()}


def person_names(rng: random.Random, count: int) -> list[str]:
    words = label_words()
    return sorted({rng.choice(words["family"]) + rng.choice(words["given"]) for _ in range(count)})


def _labels(entity: Entity, rng: random.Random) -> tuple[str, ...]:
    words = label_words()
    if entity.kind == "P":
        return tuple(person_names(rng, 24))
    if entity.kind == "O":
        heads = rng.sample(words["organisation"], 10)
        return tuple(head + rng.choice(("", " ")) + rng.choice(words["organisation_ends"]) for head in heads)
    pool = words[{"L": "place", "T": "thing", "D": "document"}[entity.kind]]
    pairs = [f"{first} {noun}" for first in rng.sample(pool, min(8, len(pool))) for noun in entity.nouns]
    return tuple(rng.sample(pairs, min(16, len(pairs))))


def _number(value: str) -> float | int:
    return float(value) if "." in value else int(value)


def _number_column(parts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    name, ko, unit, high, low, span, _ = parts
    bottom, top, step = (_number(part) for part in span.split(":"))
    if rng.random() < 0.3 and isinstance(top, int) and not name.endswith("_year"):
        modifier, modifier_ko = rng.choice(read_yaml("vocabulary.yaml")["modifiers"]).split("|")
        name, ko = f"{modifier}_{name}", f"{modifier_ko} {ko}"
    if isinstance(top, int) and isinstance(bottom, int) and top > 100 and "year" not in name:
        top = max(bottom + 20 * int(step), round(top * rng.uniform(0.4, 1.5) / step) * int(step))
    kind = "DECIMAL(3,1)" if isinstance(step, float) else "INTEGER"
    return {"name": name, "ko": ko, "type": kind, "role": "number", "unit": unit, "high": high, "low": low,
            "range": (bottom, top), "step": step}  # fmt: skip


def _category_column(parts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    name, ko, listed, _ = parts
    values = listed.split(",")
    if len(values) > 3:
        values = rng.sample(values, rng.randint(3, len(values)))
    return {"name": name, "ko": ko, "type": f"VARCHAR({rng.choice((10, 20, 30, 50))})", "role": "category",
            "values": tuple(values)}  # fmt: skip


def _date_column(parts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    name, ko, verb, _ = parts
    if rng.random() < 0.15:
        name = name.replace("_on", "_date") if name.endswith("_on") else name
    first = rng.randint(YEARS[0], YEARS[1] - 2)
    last = min(YEARS[1], first + rng.randint(1, 8))
    return {"name": name, "ko": ko, "type": "DATE", "role": "date", "verb": verb,
            "range": (datetime.date(first, 1, 1), datetime.date(last, 12, 31))}  # fmt: skip


def _flag_column(parts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    name, ko, yes, no, _ = parts
    return {
        "name": name,
        "ko": ko,
        "type": "BOOLEAN",
        "role": "flag",
        "true_ko": yes,
        "false_ko": no,
        "share": 0.4,
    }


def _text_column(parts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    name, ko, pattern, _ = parts
    return {
        "name": name,
        "ko": ko,
        "type": f"VARCHAR({rng.choice((20, 50, 100))})",
        "role": "text",
        "pattern": pattern,
    }


MAKERS = {
    "numbers": _number_column, "categories": _category_column, "dates": _date_column,
    "flags": _flag_column, "texts": _text_column,
}  # fmt: skip


def _own_columns(entity: Entity, rng: random.Random) -> list[dict[str, Any]]:
    """The columns that are no keys: up to three numbers, two categories and two dates, sometimes a flag or a text."""
    wanted = {
        "numbers": rng.randint(1, 3), "categories": rng.randint(1, 2), "dates": rng.choice((0, 1, 1, 2)),
        "flags": int(rng.random() < 0.3), "texts": int(rng.random() < 0.2),
    }  # fmt: skip
    columns = []
    for pool, count in wanted.items():
        ideas = concepts(pool, entity.kind)
        columns += [MAKERS[pool](parts, rng) for parts in rng.sample(ideas, min(count, len(ideas)))]
    for column in columns:
        if rng.random() < 0.15:
            column["nullable"] = 0.1
        if rng.random() < 0.06:
            column["name"] = f"{entity.singular}_{column['name']}"
    rng.shuffle(columns)
    return columns


def _ref(parent: Entity, key: str, rng: random.Random) -> dict[str, Any]:
    own = key if key != "id" else f"{parent.singular}_id"
    return {"name": own, "ko": parent.ko, "type": "INTEGER", "role": "ref", "ref": f"{parent.plural}.{key}",
            "nullable": 0.1 if rng.random() < 0.15 else 0.0}  # fmt: skip


def _table(name: str, ko: str, counter: str, columns: Sequence[dict[str, Any]], rng: random.Random) -> Table:
    """A table whose columns carry distinct names."""
    distinct: dict[str, Column] = {}
    nouns: set[str] = set()
    for column in columns:
        if column["name"] not in distinct and column["ko"] not in nouns:
            distinct[column["name"]] = Column(**column)
            nouns.add(column["ko"])
    labels = [len(column.values) for column in distinct.values() if column.role == "label"]
    rows = labels[0] if labels else rng.randint(30, 120)  # every label names one row
    return Table(name=name, ko=ko, counter=counter, rows=rows, columns=tuple(distinct.values()))


def _entities(rng: random.Random) -> tuple[str, str, list[Entity]]:
    (name, ko), members = rng.choice(list(fields().items()))
    pool = list(members)
    if rng.random() < 0.25:
        pool += [entity for entity in rng.choice(list(fields().values())) if entity not in pool]
    chosen = rng.sample(pool, min(len(pool), rng.choice((2, 2, 3, 3, 4))))
    if all(entity.kind == "E" for entity in chosen):
        chosen[0] = next(entity for entity in members if entity.kind != "E")
    # whoever is referred to comes first, what happens comes last
    chosen.sort(key=lambda entity: entity.kind == "E")
    return name, ko, chosen


def random_domain(rng: random.Random) -> Domain:
    """A made-up domain of two to five tables whose foreign keys form one connected graph."""
    name, ko, entities = _entities(rng)
    key_name = rng.choice(KEY_NAMES)
    keys = {entity.plural: key_name.format(entity.singular) for entity in entities}
    things = [entity for entity in entities if entity.kind != "E"]
    tables = []
    for at, entity in enumerate(entities):
        key: dict[str, Any] = {
            "name": keys[entity.plural],
            "ko": f"{entity.ko} 번호",
            "type": "INTEGER",
            "role": "key",
        }
        columns: list[dict[str, Any]] = [key]
        refs: list[dict[str, Any]] = []
        if entity.kind == "E":
            parents = rng.sample(things, min(len(things), rng.choice((1, 2, 2))))
            refs = [_ref(parent, keys[parent.plural], rng) for parent in parents]
        else:
            label, label_ko = rng.choice(NAME_COLUMNS[entity.kind])
            width = rng.choice((50, 100, 255))
            columns.append({"name": label, "ko": label_ko, "type": f"VARCHAR({width})", "role": "label",
                            "values": _labels(entity, rng)})  # fmt: skip
            if at:
                parent = rng.choice(entities[:at])
                refs = [_ref(parent, keys[parent.plural], rng)]
        own = _own_columns(entity, rng)
        columns += refs + own if rng.random() < 0.5 else own + refs
        tables.append(_table(entity.plural, entity.ko, entity.counter, columns, rng))
    if len(things) > 1 and rng.random() < 0.35:
        tables.append(_link_table(rng.sample(things, 2), keys, rng))
    return Domain(db_id=0, name=name, ko=ko, tables=tuple(tables))


def _link_table(pair: Sequence[Entity], keys: dict[str, str], rng: random.Random) -> Table:
    left, right = pair
    name = rng.choice(LINK_NAMES).format(a=left.singular, b=right.plural)
    event = Entity(name, name, "", "건", "E", ())
    columns = [
        {
            "name": "id" if "id" in keys.values() else "record_id",
            "ko": "기록 번호",
            "type": "INTEGER",
            "role": "key",
        }
    ]
    columns += [_ref(parent, keys[parent.plural], rng) for parent in pair]
    columns += _own_columns(event, rng)[:2]
    return _table(name, f"{left.ko} {right.ko} 기록", "건", columns, rng)


def glossary(rng: random.Random) -> str:
    """A word list: English names of columns and tables with their Korean words, in one of several notations."""
    words = read_yaml("vocabulary.yaml")
    pool = [line.split("|")[:2] for name in MAKERS for line in words[name]]
    pool += [[entity.plural, entity.ko] for members in fields().values() for entity in members]
    chosen = rng.sample(pool, rng.randint(6, 16))
    for line in rng.sample(words["numbers"], rng.randint(1, 6)):
        name, ko = line.split("|")[:2]
        modifier, modifier_ko = rng.choice(words["modifiers"]).split("|")
        chosen.append([f"{modifier}_{name}", f"{modifier_ko} {ko}"])
    rng.shuffle(chosen)
    notation = rng.choice(GLOSSARY_LINES)
    return "\n".join(notation.format(en=en, ko=ko) for en, ko in chosen)
