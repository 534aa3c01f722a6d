r"""LIKE and regular expressions as SQLite's LIKE and GLOB.

SQLite's LIKE ignores the case of ASCII letters, as MySQL's does; PostgreSQL's does not, so there a pattern with letters
becomes a GLOB. A backslash escapes in both dialects without being asked to, in SQLite it does not. Regular
expressions are taken where they say no more than LIKE and GLOB can: literal text, `.`, `.*`, the anchors, simple
character classes (where case counts), and `|` between such.

PostgreSQL's ILIKE folds all letters, SQLite's LIKE the ASCII ones: a pattern with other letters that have a case is
refused. A pattern that is no literal is taken as it is under LIKE, and rewritten for GLOB, its backslashes unread.
"""

from __future__ import annotations

import re

from sqlglot import exp

from quantlab.text2sql.dialects.nodes import Context, Untranslatable, atom, call, string_of, text

_META = frozenset(r"\.^$*+?{}[]|()")
_ONE, _MANY = object(), object()  # a wildcard for one character, for any number of them

Piece = str | object | tuple[str, str]  # a character, a wildcard, or ("class", "[a-z]")


def like(node: exp.Expression, context: Context, escape: str | None = None) -> exp.Expression:
    """LIKE, ILIKE, and `LIKE … ESCAPE …` of the dialect, for SQLite."""
    subject, written, binary = _without_binary(node)
    ignore_case = isinstance(node, exp.ILike) or (context.dialect == "mysql" and not binary)
    pattern = string_of(written)
    if isinstance(written, exp.Any | exp.All | exp.Array):
        raise Untranslatable("LIKE ANY and LIKE ALL have no counterpart in SQLite")
    if pattern is None:
        if escape is not None:
            raise Untranslatable(
                "LIKE … ESCAPE with a pattern that is no literal has no counterpart in SQLite"
            )
        if ignore_case:
            found: exp.Expression = exp.Like(this=subject.copy(), expression=atom(written))
        else:
            found = exp.Glob(this=subject.copy(), expression=_as_glob(written))
        return exp.Not(this=found) if node.args.get("negate") else found
    pieces = _like_pieces(pattern, "\\" if escape is None else escape)
    found = _match(subject, pieces, ignore_case)
    return exp.Not(this=exp.Paren(this=found)) if node.args.get("negate") else found


def _without_binary(node: exp.Expression) -> tuple[exp.Expression, exp.Expression, bool]:
    """Subject and pattern without MySQL's BINARY, and whether it stood before one of them: then case counts."""
    sides = [node.this, node.expression]
    bare = [side.this if _is_binary(side) else side for side in sides]
    return bare[0], bare[1], any(map(_is_binary, sides))


def _is_binary(node: exp.Expression) -> bool:
    return isinstance(node, exp.Cast) and node.to.this in (exp.DType.BINARY, exp.DType.VARBINARY)


def regexp(node: exp.Expression, context: Context) -> exp.Expression:
    """`~`, `~*`, REGEXP and RLIKE with a pattern that LIKE or GLOB can express."""
    subject, written, binary = _without_binary(node)
    ignore_case = isinstance(node, exp.RegexpILike) or (context.dialect == "mysql" and not binary)
    pattern = string_of(written)
    if pattern is None:
        raise Untranslatable("a regular expression that is no literal has no counterpart in SQLite")
    branches = [_match(subject, _regexp_pieces(part), ignore_case) for part in _alternatives(pattern)]
    found = branches[0]
    for branch in branches[1:]:
        found = exp.Or(this=found, expression=branch)
    return exp.Paren(this=found)


def _like_pieces(pattern: str, escape: str) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if escape and char == escape:
            at += 1
            if at == len(pattern):
                raise Untranslatable("the LIKE pattern ends with its escape character")
            pieces.append(pattern[at])
        else:
            pieces.append({"%": _MANY, "_": _ONE}.get(char, char))
        at += 1
    return pieces


def _alternatives(pattern: str) -> list[str]:
    """The sides of `|`; a group around all of them is dropped."""
    if re.fullmatch(r"\([^()\\]*\)", pattern):
        pattern = pattern[1:-1]
    match = re.fullmatch(r"\^\(([^()\\]*)\)(\$?)", pattern)
    if match:
        return [f"^{part}{match.group(2)}" for part in match.group(1).split("|")]
    return re.split(r"(?<!\\)\|", pattern) if "[" not in pattern else [pattern]


def _regexp_pieces(pattern: str) -> list[Piece]:
    pieces: list[Piece] = [] if pattern.startswith("^") else [_MANY]
    at = 1 if pattern.startswith("^") else 0
    end = len(pattern)
    open_end = not (pattern.endswith("$") and not pattern.endswith(r"\$"))
    end -= 0 if open_end else 1
    while at < end:
        char = pattern[at]
        if char == "." and pattern.startswith(".*", at):
            pieces.append(_MANY)
            at += 2
        elif char == "." and pattern.startswith(".+", at):
            pieces += [_ONE, _MANY]
            at += 2
        elif char == ".":
            pieces.append(_ONE)
            at += 1
        elif char == "\\" and at + 1 < end and (pattern[at + 1] in _META or not pattern[at + 1].isalnum()):
            pieces.append(pattern[at + 1])
            at += 2
        elif char == "\\" and pattern.startswith("\\d", at):
            pieces.append(("class", "[0-9]"))
            at += 2
        elif char == "[":
            match = re.compile(r"\[\^?[\w가-힣\- ]+\]").match(pattern, at)
            if match is None or match.end() > end:
                raise _too_rich(pattern)
            pieces.append(("class", match.group()))
            at = match.end()
        elif char in _META:
            raise _too_rich(pattern)
        else:
            pieces.append(char)
            at += 1
        if at < end and pattern[at] in "*+?{":
            raise _too_rich(pattern)
    return [*pieces, _MANY] if open_end else pieces


def _too_rich(pattern: str) -> Untranslatable:
    short = pattern if len(pattern) <= 40 else pattern[:39] + "…"
    return Untranslatable(f"the regular expression {short!r} has no counterpart in SQLite")


def _match(subject: exp.Expression, pieces: list[Piece], ignore_case: bool) -> exp.Expression:
    """`subject LIKE …` or `subject GLOB …` for the pieces."""
    characters = [piece for piece in pieces if isinstance(piece, str)]
    classes = [piece[1] for piece in pieces if isinstance(piece, tuple)]
    if ignore_case and any(char > "\x7f" and char.lower() != char.upper() for char in characters):
        raise Untranslatable(
            "a pattern that ignores the case of letters other than A to Z has no counterpart in SQLite"
        )
    letters = any(char.isascii() and char.isalpha() for char in characters)
    if classes:
        if ignore_case and (letters or any(re.search(r"[A-Za-z]", part) for part in classes)):
            raise Untranslatable("a character class that ignores case has no counterpart in SQLite")
        return exp.Glob(this=subject.copy(), expression=text(_glob(pieces)))
    if letters and not ignore_case:
        return exp.Glob(this=subject.copy(), expression=text(_glob(pieces)))
    pattern = "".join(_like_char(piece) for piece in pieces)
    found: exp.Expression = exp.Like(this=subject.copy(), expression=text(pattern))
    if "\\" in pattern:
        found = exp.Escape(this=found, expression=text("\\"))
    return found


def _like_char(piece: Piece) -> str:
    if isinstance(piece, str):
        return "\\" + piece if piece in "%_\\" else piece
    return "%" if piece is _MANY else "_"


def _glob(pieces: list[Piece]) -> str:
    parts = []
    for piece in pieces:
        if isinstance(piece, str):
            parts.append(f"[{piece}]" if piece in "*?[" else piece)
        elif isinstance(piece, tuple):
            parts.append(piece[1])
        else:
            parts.append("*" if piece is _MANY else "?")
    return "".join(parts)


def _as_glob(pattern: exp.Expression) -> exp.Expression:
    """An expression whose value is a LIKE pattern, as one whose value is the GLOB pattern."""
    for old, new in (("[", "[[]"), ("*", "[*]"), ("?", "[?]"), ("%", "*"), ("_", "?")):
        pattern = call("REPLACE", pattern, text(old), text(new))
    return pattern
