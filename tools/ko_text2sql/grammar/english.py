"""English questions, read off the query.

The queries of the grammar are few in shape, so an English question can be put together from a query's clauses: what it
selects, of which rows, grouped or ordered how. Names are the schema's own with spaces for underscores, a foreign key
`homeroom_teacher_id` being the homeroom teacher of a row.

Sub-queries of the simple sorts are first replaced by what they mean, written as a string: price > '<the average>'.

Not covered: EXISTS, correlated sub-queries, arithmetic; `question` answers None and another query is tried.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tools.ko_text2sql.grammar.phrases import say

_SHAPE = re.compile(
    r"SELECT (?P<distinct>DISTINCT )?(?P<items>.+?) FROM (?P<source>\w+(?: AS T1)?(?: JOIN .+?)?)"
    r"(?: WHERE (?P<where>.+?))?(?: GROUP BY (?P<group>.+?))?(?: HAVING (?P<having>.+?))?"
    r"(?: ORDER BY (?P<order>.+?) (?P<way>ASC|DESC))?(?: LIMIT (?P<limit>\d+)(?: OFFSET (?P<offset>\d))?)?;"
)
_JOIN = re.compile(r" JOIN \w+ AS (T\d) ON (T\d)\.(\w+) = T\d\.\w+")
_TERM = re.compile(
    r"(?P<column>[\w.]+) (?:(?P<operator><>|>=|<=|=|>|<|LIKE) (?P<value>'(?:[^']|'')*'|-?[\d.]+)"
    r"|BETWEEN (?P<low>'[^']*'|-?[\d.]+) AND (?P<high>'[^']*'|-?[\d.]+)|IN \((?P<among>[^()]*)\)"
    r"|IS (?P<null>NOT NULL|NULL))"
)
_MEANINGS = (
    (re.compile(r"\(SELECT AVG\([\w.]+\) FROM \w+\)"), "'<the average>'"),
    (re.compile(r"\(SELECT MAX\([\w.]+\) FROM \w+\)"), "'<the highest of all>'"),
    (re.compile(r"\(SELECT MIN\([\w.]+\) FROM \w+\)"), "'<the lowest of all>'"),
    (re.compile(r"\(SELECT \w+ FROM \w+ WHERE \w+ = '([^']*)'\)"), r"'<that of ''\1''>'"),
    (re.compile(r"\w+ NOT IN \(SELECT \w+ FROM (\w+)(?: WHERE \w+ IS NOT NULL)?\)"), r"having = '<no \1>'"),
    (re.compile(r"\w+ IN \(SELECT \w+ FROM (\w+)\)"), r"having = '<any \1>'"),
    (
        re.compile(r"T1\.(\w+) FROM (\w+) AS T1 LEFT JOIN (\w+) AS T2 ON .+ IS NULL;"),
        r"\1 FROM \2 WHERE having = '<no \3>';",
    ),
)
_CALL = re.compile(r"(COUNT|AVG|SUM|MAX|MIN)\((DISTINCT )?([\w.*]+)\)")
_WORDS = {"AVG": "average", "SUM": "total", "MAX": "highest", "MIN": "lowest"}
_COMPARED = {
    "=": "is {v}",
    "<>": "is not {v}",
    ">": "[is greater than|is more than|exceeds] {v}",
    "<": "is [less than|below] {v}",
    ">=": "is [at least {v}|{v} or more|greater than or equal to {v}]",
    "<=": "is [at most {v}|{v} or less|no more than {v}]",
}
_DATED = {
    "=": "is {v}",
    "<>": "is not {v}",
    ">": "is [after|later than] {v}",
    "<": "is [before|earlier than] {v}",
    ">=": "is [{v} or later|on or after {v}]",
    "<=": "is [{v} or earlier|on or before {v}]",
}
_DATE = re.compile(r"'\d{4}-\d\d-\d\d'")
_DAY_COLUMN = re.compile(r".*(_on|_date|_at|date|day)")
_LIST = (
    "[List|Show|Show me|Find|Give me|Return|Get|Display] {what} of {who}{order}.",
    "[List|Show|Give me] {what} of {who}{order}",
    "What is {what} of {who}{order}?",
    "[I want to see|Please list|Please show me] {what} of {who}{order}.",
    "[Can you list|Could you find|Can I see] {what} of {who}{order}?",
    "For {who}, [list|show|give] {what}{order}.",
)
_VALUE = (
    "What is {what} of {who}?",
    "[Find|Compute|Calculate|Show|Tell me|Give me] {what} of {who}.",
    "[Show|Find] {what} [for|over] {who}",
    "{what} of {who}",
)
_COUNT = (
    "How many {rows} are there?",
    "[Count|Count the number of] {rows}.",
    "What is the number of {rows}?",
    "[Find|Give me|Tell me] the number of {rows}.",
    "Number of {rows}",
)
_GROUP = (
    "[Show|List|Find|Give me|Compute] {what} [for each|per|by] {group}{having}{order}.",
    "For each {group}{having}, [show|find|give] {what}{order}.",
    "What is {what} [for each|per] {group}{having}{order}?",
    "{what} [per|by] {group}{having}{order}",
)
_TOP_GROUP = (
    "Which {group} has {extreme} {measure}?",
    "[Find|Show|Give me] the {group} with {extreme} {measure}.",
    "What is the {group} with {extreme} {measure}?",
)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _singular(table: str) -> str:
    noun = _spaced(table)
    if noun.endswith("ies"):
        return noun[:-3] + "y"
    if noun.endswith(("ches", "shes", "sses", "xes")):
        return noun[:-2]
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else noun


class _Reader:
    """One query: its table, what its aliases stand for, and English for its clauses."""

    def __init__(self, shape: re.Match[str], rng: random.Random) -> None:
        self.shape = shape
        self.rng = rng
        self.table = shape["source"].split(" ")[0]
        self.roles = {"T1": ""}
        for alias, source, column in _JOIN.findall(shape["source"]):
            role = _spaced(re.sub(r"_(id|no)$", "", column))
            self.roles[alias] = f"{self.roles[source]} {role}".strip()

    def column(self, name: str) -> str:
        """A column from the point of view of a row of the first table: price, publisher name."""
        alias, _, bare = name.rpartition(".")
        role, noun = self.roles.get(alias, ""), _spaced(bare)
        return noun if not role or noun.startswith(role.split(" ")[-1]) else f"{role} {noun}"

    def item(self, text: str) -> str:
        """A selected expression with its article."""
        call = _CALL.fullmatch(text)
        if call is None:
            dated = re.fullmatch(r"strftime\('(%Y|%Y-%m)', ([\w.]+)\)", text)
            if dated:
                return f"the {'year' if dated[1] == '%Y' else 'month'} of {self.column(dated[2])}"
            return f"the {self.column(text)}"
        function, distinct, argument = call.groups()
        if function != "COUNT":
            return f"the {_WORDS[function]} {self.column(argument)}"
        return (
            f"the number of {'different ' + self.column(argument) + 's' if distinct else _spaced(self.table)}"
        )

    def items(self) -> list[str]:
        return [self.item(part) for part in re.split(r", (?![^()]*\))", self.shape["items"])]

    def term(self, found: re.Match[str]) -> str:
        column = found["column"]
        name = self.column(column)
        if found["null"]:
            return f"whose {name} is {'known' if found['null'] == 'NOT NULL' else 'missing'}"
        if found["low"]:
            return f"whose {name} is between {found['low']} and {found['high']}"
        if found["among"]:
            return f"whose {name} is {' or '.join(found['among'].split(', '))}"
        (alias, _, bare), value = column.rpartition("."), found["value"]
        if value.startswith("'<"):
            value = value[2:-2].replace("''", "'")
            if column == "having":
                return f"that have {_spaced(value)}"
            return f"whose {name} {say(self.rng, _COMPARED[found['operator']], {'v': value})}"
        if found["operator"] == "LIKE":
            verb = (
                "contains"
                if value.count("%") == 2
                else "starts with"
                if value.endswith("%'")
                else "ends with"
            )
            return f"whose {name} {verb} {value.replace('%', '')}"
        if value in ("0", "1") and found["operator"] == "=" and bare.startswith(("is_", "has_")):
            verb, _, rest = bare.partition("_")
            role, no = self.roles.get(alias, ""), value == "0"
            if verb == "is":
                return f"{f'whose {role} is' if role else 'that are'} {'not ' if no else ''}{_spaced(rest)}"
            return f"{f'whose {role} has' if role else 'that have'} {'no ' if no else ''}{_spaced(rest)}"
        compared = _DATED if _DATE.fullmatch(value) else _COMPARED
        return f"whose {name} {say(self.rng, compared[found['operator']], {'v': value})}"

    def rows(self) -> str:
        """The rows that the query is about: "books whose price is at least 10000"."""
        noun, where = _spaced(self.table), self.shape["where"]
        if not where:
            return noun
        terms = list(_TERM.finditer(where))
        joint = " or " if re.search(r"\) OR |' OR |\d OR |NULL OR ", where) else " and "
        return f"{noun} {joint.join(self.term(term) for term in terms)}"

    def understood(self) -> bool:
        """Whether the conditions consist of nothing but terms that `term` can say."""
        for clause in (self.shape["where"], self.shape["having"]):
            if (
                clause
                and re.sub(r" (AND|OR) ", "", _CALL.sub("n", _TERM.sub("", _CALL.sub("n", clause)))).strip()
            ):
                return False
        return True


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _grouped(reader: _Reader, rng: random.Random) -> str | None:
    shape = reader.shape
    groups = [reader.item(part)[4:] for part in re.split(r", (?![^()]*\))", shape["group"])]
    items = reader.items()
    measures = items[len(groups) :] if len(items) > len(groups) else []
    slots = {
        "group": _listed(groups),
        "having": "",
        "order": "",
        "what": _listed(measures) if measures else "",
    }
    if reader.shape["where"] and measures:
        slots["what"] += f" ({reader.rows()})"
    if shape["having"]:
        term = _TERM.fullmatch(_CALL.sub("n", shape["having"]))
        call = _CALL.match(shape["having"])
        if term is None or call is None:
            return None
        compared = say(rng, _COMPARED[term["operator"]], {"v": term["value"]})
        slots["having"] = f" where {reader.item(call[0])} {compared}"
    if shape["order"]:
        call = _CALL.fullmatch(shape["order"])
        if call is None:
            return None
        measure = reader.item(call[0])[4:]
        if shape["limit"] == "1" and not measures:
            most = call[1] in ("COUNT", "MAX", "MIN")
            extreme = ("the largest" if most else "the highest") if shape["way"] == "DESC" else "the smallest"
            where = f" ({reader.rows()})" if shape["where"] else ""
            return say(
                rng, _TOP_GROUP, {"group": slots["group"], "extreme": extreme, "measure": measure + where}
            )
        if shape["limit"]:
            slots["order"] = f", only the {shape['limit']} with the highest {measure}"
        else:
            slots["order"] = (
                ", from highest to lowest" if shape["way"] == "DESC" else ", from lowest to highest"
            )
    if not measures:
        forms = ("[List|Show|Find] every {group}{having}{order}.", "Which {group}s are there{having}{order}?")
        return say(rng, forms if shape["having"] or shape["order"] else forms[:1], slots)
    return say(rng, _GROUP, slots)


def _order(reader: _Reader, rng: random.Random) -> str | None:
    shape = reader.shape
    if not shape["order"]:
        return ""
    column, down = reader.column(shape["order"]), shape["way"] == "DESC"
    if "(" in column:
        return None
    if shape["limit"]:
        day = _DAY_COLUMN.fullmatch(shape["order"])
        place = (
            ("second ", "third ", "fourth ", "fifth ")[int(shape["offset"]) - 1] if shape["offset"] else ""
        )
        end = f"the {place}{('latest' if day else 'highest') if down else ('earliest' if day else 'lowest')} {column}"
        return f" with {end}" if shape["limit"] == "1" else f", only the {shape['limit']} with {end}"
    forms = (", ordered by {c} {w}", ", sorted by {c} {w}", ", in {w} order of {c}")
    return say(rng, forms, {"c": column, "w": "descending" if down else "ascending"})


def question(sql: str, rng: random.Random) -> str | None:
    """An English question for a query of the grammar, or None where the query is beyond it."""
    for pattern, meaning in _MEANINGS:
        sql = pattern.sub(meaning, sql)
    shape = _SHAPE.fullmatch(sql)
    if shape is None or sql.count("SELECT") > 1 or "CASE" in sql or " - " in shape["items"]:
        return None
    reader = _Reader(shape, rng)
    if not reader.understood():
        return None
    if shape["group"]:
        return _capital(_grouped(reader, rng))
    rows, items = reader.rows(), reader.items()
    if shape["items"] == "COUNT(*)":
        return _capital(say(rng, _COUNT, {"rows": rows}))
    order = _order(reader, rng)
    if order is None:
        return None
    if _CALL.search(shape["items"]):
        return _capital(say(rng, _VALUE, {"what": _listed(items), "who": rows}))
    what = _listed([f"the different {item[4:]}s" if shape["distinct"] else item for item in items])
    if shape["limit"] == "1":
        one = rows.replace(_spaced(reader.table), f"the {_singular(reader.table)}", 1).replace(
            "that are", "that is", 1
        )
        forms = ("What is {what} of {who}{order}?", "[Find|Show|Give me|Tell me] {what} of {who}{order}.")
        return _capital(say(rng, forms, {"what": what, "who": one, "order": order}))
    every = rows if shape["where"] else say(rng, "[all {r}|{r}|every one of the {r}]", {"r": rows})
    return _capital(say(rng, _LIST, {"what": what, "who": every, "order": order}))


def _capital(text: str | None) -> str | None:
    return text[0].upper() + text[1:] if text else None
