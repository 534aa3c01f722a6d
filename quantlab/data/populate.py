"""Fill a domain's tables with rows, the same on every machine.

Every column draws from its own stream, `random.Random("seed/domain/table/column")`, so adding a column leaves
the others as they were. Only `Random.random()` is used, whose sequence Python guarantees, and only additions
and multiplications of it, which IEEE 754 fixes: no `choice`, `gauss` or power whose results could move.
Decimals are counted in whole steps.

Numbers and dates lean a little to one side, categories and foreign keys are drawn unevenly: some parents get
no child, some get many. What a real system would guarantee between columns is guaranteed only where the YAML
says so (`after`, `group_of`, `unique`).
"""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from quantlab.data.schema import Column, Domain, Table
from quantlab.errors import DataError

T = TypeVar("T")
Cell = str | int | float | None

_SURNAMES = tuple("김이박최정강조윤장임한오서신권황안송류홍")  # the common ones first
_GIVEN = (
    "민준", "서연", "도윤", "지우", "하준", "서윤", "은우", "하은", "시우", "지민", "지호", "수아",
    "예준", "지아", "유준", "다은", "준서", "채원", "건우", "소율", "현우", "예린", "우진", "나은",
    "선우", "유진", "연우", "가은", "정우", "수빈", "승우", "지원", "준혁", "예은", "태윤", "민지",
    "재현", "혜진", "동현", "은지", "성민", "미영", "영호", "정숙", "상훈", "경희", "태영", "보라",
    "기범", "세영", "규현", "아름", "종현", "슬기", "광수", "다현", "병철", "주희", "형석", "윤서",
)  # fmt: skip
_WORDS = (
    "haneul", "bada", "namu", "gureum", "byeol", "maru", "dasom", "garam", "hana", "noeul",
    "sora", "bora", "saebyeok", "iseul", "mir", "onyu",
)  # fmt: skip
_STREETS = (
    "서울시 마포구 와우산로", "서울시 강남구 테헤란로", "서울시 종로구 대학로", "부산시 해운대구 해변로",
    "부산시 수영구 광안로", "대구시 중구 동성로", "인천시 연수구 송도대로", "광주시 동구 충장로",
    "대전시 유성구 대학로", "울산시 남구 삼산로", "수원시 팔달구 행궁로", "성남시 분당구 판교로",
    "전주시 완산구 한옥로", "춘천시 중앙로", "강릉시 경강로", "제주시 연동로",
)  # fmt: skip


def rows(domain: Domain, seed: int = 0) -> dict[str, list[tuple[Cell, ...]]]:
    """The rows of every table, in schema order, cells in column order."""
    return _Filler(domain, seed).fill()


class _Filler:
    def __init__(self, domain: Domain, seed: int) -> None:
        self.domain = domain
        self.seed = seed
        self.cells: dict[tuple[str, str], list[Cell]] = {}  # (table, column) → a cell for each row

    def fill(self) -> dict[str, list[tuple[Cell, ...]]]:
        for table in self.domain.tables:  # `after` needs the parents' dates before the children's
            self._refs(table)
            for column in table.columns:
                if column.role != "ref":
                    self.cells[table.name, column.name] = self._column(table, column)
        return {
            table.name: list(zip(*(self.cells[table.name, c.name] for c in table.columns), strict=True))
            for table in self.domain.tables
        }

    def _stream(self, table: Table, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.domain.name}/{table.name}/{name}")

    def _column(self, table: Table, column: Column) -> list[Cell]:
        rng = self._stream(table, column.name)
        if column.role == "key":
            return list(range(1, table.rows + 1))
        if column.role == "label":
            return list(_labels(rng, column, table))
        if column.group_of:
            label = table.column(column.group_of)
            group = {value: name for name, values in label.groups for value in values}
            return [group[str(cell)] for cell in self.cells[table.name, label.name]]
        drawn: list[Cell]
        if column.role == "category":
            drawn = _categories(rng, column, table.rows)
        elif column.role == "number":
            drawn = [_number(rng, column) for _ in range(table.rows)]
        elif column.role == "date":
            drawn = [_date(rng, column, base) for base in self._bases(table, column)]
        elif column.role == "flag":
            drawn = [int(rng.random() < column.share) for _ in range(table.rows)]
        else:
            drawn = list(_texts(rng, column, table.rows))
        return _with_nulls(rng, drawn, column.nullable)

    def _bases(self, table: Table, column: Column) -> list[Cell]:
        """The date each row's date may not precede."""
        if not column.after:
            return [None] * table.rows
        first, _, second = column.after.partition(".")
        cells = self.cells[table.name, first]
        if not second:
            return cells
        dates = self.cells[table.column(first).ref_table, second]
        return [None if key is None else dates[int(key) - 1] for key in cells]

    def _refs(self, table: Table) -> None:
        draws = {}
        for column in table.refs:
            rng = self._stream(table, column.name)
            weights = _uneven(rng, self.domain.table(column.ref_table).rows, 0.15, none=0.08)
            draws[column.name] = (rng, weights)
            keys: list[Cell] = [_pick(rng, weights) + 1 for _ in range(table.rows)]
            self.cells[table.name, column.name] = _with_nulls(rng, keys, column.nullable)
        if not table.unique:
            return
        seen: set[tuple[Cell, ...]] = set()
        columns = [self.cells[table.name, name] for name in table.unique]
        for row in range(table.rows):
            for _ in range(1000):
                combination = tuple(cells[row] for cells in columns)
                if combination not in seen:
                    break
                for name, cells in zip(table.unique, columns, strict=True):
                    cells[row] = _pick(*draws[name]) + 1
            else:
                raise DataError(
                    f"{self.domain.name}: table {table.name} cannot hold {table.rows} different combinations",
                    hint="fewer rows, or more rows in the tables it links",
                )
            seen.add(combination)


def _below(rng: random.Random, count: int) -> int:
    return int(rng.random() * count)


def _shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = _below(rng, last + 1)
        result[last], result[other] = result[other], result[last]
    return result


def _uneven(rng: random.Random, count: int, least: float, none: float = 0.0) -> list[float]:
    """Weights from `least` to `least` + 1, few large; a share `none` is zero (one at least, from ten on)."""
    weights = []
    for _ in range(count):
        u = rng.random()
        weights.append(least + u * u * u)
    if none:
        for index in _shuffled(rng, range(count))[: max(int(count * none), int(count >= 10))]:
            weights[index] = 0.0
    return weights


def _pick(rng: random.Random, weights: Sequence[float]) -> int:
    target = rng.random() * sum(weights)
    last = 0
    for index, weight in enumerate(weights):
        if weight:
            last = index
            target -= weight
            if target < 0:
                break
    return last


def _with_nulls(rng: random.Random, cells: list[Cell], share: float) -> list[Cell]:
    if not share:
        return cells
    holes = set(_shuffled(rng, range(len(cells)))[: max(1, int(len(cells) * share + 0.5))])
    return [None if index in holes else cell for index, cell in enumerate(cells)]


def _labels(rng: random.Random, column: Column, table: Table) -> list[str]:
    if not column.person:
        return _shuffled(rng, _choices(column))[: table.rows]
    names: dict[str, None] = {}
    if table.rows > len(_SURNAMES) * len(_GIVEN) // 2:
        raise DataError(f"table {table.name}: {table.rows} rows are too many for different names of people")
    while len(names) < table.rows:
        names[_person(rng)] = None
    return list(names)


def _choices(column: Column) -> list[str]:
    if column.values:
        return [str(value) for value in column.values]
    return list(dict.fromkeys(column.joiner.join(parts) for parts in itertools.product(*column.combine)))


def _categories(rng: random.Random, column: Column, count: int) -> list[Cell]:
    """Every value at least once where the rows suffice, the rest unevenly."""
    values: list[Any] = list(column.values)
    weights = _uneven(rng, len(values), 0.4)
    once = _shuffled(rng, values)[:count]
    return _shuffled(rng, once + [values[_pick(rng, weights)] for _ in range(count - len(once))])


def _lean(rng: random.Random) -> float:
    """Between 0 and 1, half of it uniform, half leaning to 0."""
    first, second, third = rng.random(), rng.random(), rng.random()
    return first if third < 0.5 else min(first, second)


def _number(rng: random.Random, column: Column) -> Cell:
    assert column.range is not None
    low, high = (Decimal(str(bound)) for bound in column.range)
    step = Decimal(str(column.step))
    value = low + step * _below_lean(rng, int((high - low) // step) + 1)
    return int(value) if column.type in {"INTEGER", "BIGINT"} else float(value)


def _below_lean(rng: random.Random, count: int) -> int:
    return int(_lean(rng) * count)


def _date(rng: random.Random, column: Column, base: Cell) -> Cell:
    assert column.range is not None
    first, last = column.range
    assert isinstance(first, datetime.date) and isinstance(last, datetime.date)
    if base is not None:
        start = datetime.date.fromisoformat(str(base))
        if column.within:
            fewest, most = column.within
            return (start + datetime.timedelta(fewest + _below_lean(rng, most - fewest + 1))).isoformat()
        first = max(first, min(start, last))
        return (first + datetime.timedelta(_below_lean(rng, (last - first).days + 1))).isoformat()
    return (last - datetime.timedelta(_below_lean(rng, (last - first).days + 1))).isoformat()


def _texts(rng: random.Random, column: Column, count: int) -> list[str]:
    if column.person:
        return [_person(rng) for _ in range(count)]
    if not column.pattern:
        choices = _choices(column)
        return [choices[_below(rng, len(choices))] for _ in range(count)]
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[_patterned(rng, column.pattern)] = None
    return list(texts)


def _person(rng: random.Random) -> str:
    return _SURNAMES[_below_lean(rng, len(_SURNAMES))] + _GIVEN[_below(rng, len(_GIVEN))]


def _patterned(rng: random.Random, pattern: str) -> str:
    if pattern == "phone":
        return f"010-{1000 + _below(rng, 9000)}-{1000 + _below(rng, 9000)}"
    if pattern == "email":
        return f"{_WORDS[_below(rng, len(_WORDS))]}{_below(rng, 1000)}@example.com"
    if pattern == "address":
        return f"{_STREETS[_below(rng, len(_STREETS))]} {1 + _below(rng, 200)}"
    letters = "".join("ABCDEFGHJKLMNPRSTUVWXYZ"[_below(rng, 23)] for _ in range(2))
    return f"{letters}-{1000 + _below(rng, 9000)}"
