"""A small template language for Korean sentences.

`{name}`          the slot `name`
`{name:을/를}`    the slot with the particle that agrees with it
`[a|b|c]`         one of the alternatives, each a template of its own; `[a|]` makes `a` optional
`<bank>`          one template of BANKS["bank"]

Templates are parsed once. Which alternatives are taken depends only on the random generator, so a question is a
function of its template, its slots and the generator's state. Spaces are tidied afterwards, so optional words can be
written with the space on either side.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from tools.ko_text2sql.josa import josa


class Slot(NamedTuple):
    name: str
    pair: str  # "" or a particle pair


class Choice(NamedTuple):
    options: tuple[tuple[Node, ...], ...]


Node = str | Slot | Choice


def _parse(text: str, start: int, closing: bool) -> tuple[list[tuple[Node, ...]], int]:
    """Alternatives from `start` up to the matching `]` (or the end), and where they end."""
    options: list[tuple[Node, ...]] = []
    nodes: list[Node] = []
    literal = ""
    at = start
    while at < len(text):
        char = text[at]
        if char in "[{<" or (closing and char in "|]"):
            if literal:
                nodes.append(literal)
                literal = ""
            if char == "[":
                inner, at = _parse(text, at + 1, closing=True)
                nodes.append(Choice(tuple(inner)))
            elif char == "{":
                end = text.index("}", at)
                name, _, pair = text[at + 1 : end].partition(":")
                nodes.append(Slot(name, pair))
                at = end
            elif char == "<":
                end = text.index(">", at)
                nodes.append(Choice(tuple(_compile(option) for option in BANKS[text[at + 1 : end]])))
                at = end
            else:
                options.append(tuple(nodes))
                nodes = []
                if char == "]":
                    return options, at
        else:
            literal += char
        at += 1
    if closing:
        raise ValueError(f"unclosed [ in template {text!r}")
    if literal:
        nodes.append(literal)
    options.append(tuple(nodes))
    return options, at


@cache
def _compile(template: str) -> tuple[Node, ...]:
    return _parse(template, 0, closing=False)[0][0]


def _render(nodes: Sequence[Node], rng: random.Random, slots: Mapping[str, str], out: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
        elif isinstance(node, Slot):
            value = slots[node.name]
            out.append(josa(value, node.pair) if node.pair else value)
        else:
            _render(node.options[int(rng.random() * len(node.options))], rng, slots, out)


def say(rng: random.Random, templates: str | Sequence[str], slots: Mapping[str, str]) -> str:
    """One of `templates` (each equally likely) with its slots filled and its spaces tidied."""
    template = templates if isinstance(templates, str) else templates[int(rng.random() * len(templates))]
    out: list[str] = []
    _render(_compile(template), rng, slots, out)
    return " ".join("".join(out).split())


# Verbs of asking. Each bank is one register or one turn of phrase.
BANKS: dict[str, tuple[str, ...]] = {
    "보여": (
        "[보여|알려] [주세요|줘|주십시오|줘요|주시겠어요?]",
        "[알려줘|보여줘|알려주세요|보여주세요|알려줘요]",
        "[찾아|조회해|검색해|확인해|뽑아|추려|출력해|나열해|정리해] [줘|주세요|주십시오]",
        "[찾아줘|조회해줘|검색해줘|뽑아줘|출력해줘|나열해줘|찾아주세요|조회해주세요|나열해주세요|출력해주세요]",
        "[조회|출력|나열|검색|제시]하시오",
        "[구하시오|찾으시오|쓰시오|보이시오|구하라]",
        "[알려줄래?|보여줄래?|찾아줄래?|알려줄 수 있어?|알려주실 수 있나요?|보여줄 수 있나요?|찾아줄 수 있을까요?]",
    ),
    "구해": (
        "[구해|계산해|알려|산출해] [줘|주세요|주십시오]",
        "[알려줘|구해줘|계산해줘|알려주세요|구해주세요|계산해주세요]",
        "[구하시오|계산하시오|산출하시오|구하라]",
        "[알려줄래?|계산해 줄래?|구해줄 수 있어?|알려주실 수 있나요?|계산해 주시겠어요?]",
    ),
    "싶다": (
        "알고 [싶어|싶어요|싶습니다|싶은데요]",
        "[확인하고|보고] [싶어|싶어요|싶습니다]",
    ),
    "궁금": ("[궁금해|궁금해요|궁금합니다|궁금하네요|궁금한데 알려줘|궁금한데요]",),
    "무엇": (
        "[무엇인가요?|무엇입니까?|뭔가요?|무엇이지?|뭐야?|뭐예요?|뭐죠?]",
        "[무엇인가요?|무엇입니까?|뭐야?|무엇인지 알려줘|무엇인지 알려주세요|뭔지 알려줘]",
    ),
    "얼마": (
        "[얼마인가요?|얼마입니까?|얼마야?|얼마예요?|얼마지?|얼마나 되나요?|어떻게 되나요?|얼마나 돼?|얼마인지 알려줘]",
    ),
    "언제": ("[언제인가요?|언제입니까?|언제야?|언제예요?|언제지?|언제인지 알려줘|언제인지 알려주세요]",),
    "누구": (
        "[누구인가요?|누구입니까?|누구야?|누구예요?|누구지?|누군가요?|누구인지 알려줘|누구인지 알려주세요]",
    ),
    "있나": ("[있나요?|있습니까?|있어?|있지?|있을까요?|있는지 알려줘|있는지 궁금해|있는지 알려주세요]",),
    "인가": ("[인가요?|입니까?|인지 알려줘|인지 알려주세요|인가?|일까요?|인지 궁금해]",),
    "중": ("[중|중에서|가운데|중에]",),
    "가장": ("[가장|제일|가장]",),
    "모두": ("[모두|전부|다|]",),
}
