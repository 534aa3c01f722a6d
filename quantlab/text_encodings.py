"""Which encoding the bytes of a file that is no UTF-8 look like: a guess for a message, nothing is read by it.

A byte-order mark decides. Without one, every candidate that decodes strictly is scored by how many of its characters
outside ASCII are ones that texts of its language are full of: the frequent syllables of Korean, kana, the frequent
characters of Chinese. Bytes of one of these encodings are often valid in another, but then give rare characters.
UTF-16 and UTF-32 without a mark show by their zero bytes. Windows-1252 takes nearly any bytes, so it comes last.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from dataclasses import dataclass

SAMPLE = 2**20  # bytes that are looked at
ENOUGH = 0.25  # share of frequent characters above which an encoding is believed


@dataclass(frozen=True)
class Guess:
    """`name` as iconv knows it, "" for what no conversion of text mends; `label` for people."""

    name: str
    label: str


@dataclass(frozen=True)
class _Candidate:
    codec: str
    guess: Guess
    frequent: re.Pattern[str]


_KOREAN = (
    "이다는의에을가를고하지로사기도은한시인자아그리나대서어부정해일수있전과것원제안보상게으주성만스구들장라조비여"
    "거간경모용오선신우마내관소동공유문세학국물말생않계진었면할적였각방행개발위연되된와명번름품중줘른요니무까알려ㅋㅎㅠㅜㅡ"
)
_CHINESE = (
    "的一是不了在人有我他中上大和地到以要就出可也你生能而子那得下自之年作用道行所然家事成方多去法如都同面起看定天分好小"
    "部其些主理心她本前但因只想，。、？！：；（）《》"
)
_SIMPLE = "这个们来为国说时会对于着过发后里种经么学现当没动还进样开从实"
_TRADITIONAL = "這個們來為國說時會對於著過發後裡種經麼學現當沒動還進樣開從實"
_KANA = "[ぁ-ゖァ-ヺー々、。「」]"
_CANDIDATES = (
    _Candidate("cp949", Guess("CP949", "CP949 (EUC-KR)"), re.compile(f"[{_KOREAN}]")),
    _Candidate("cp932", Guess("CP932", "Shift-JIS (CP932)"), re.compile(_KANA)),
    _Candidate("euc_jp", Guess("EUC-JP", "EUC-JP"), re.compile(_KANA)),
    _Candidate("gb18030", Guess("GB18030", "GB18030 (GBK)"), re.compile(f"[{_CHINESE}{_SIMPLE}]")),
    _Candidate("big5", Guess("BIG5", "Big5"), re.compile(f"[{_CHINESE}{_TRADITIONAL}]")),
)
_MARKS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, Guess("UTF-32", "UTF-32 LE with a byte-order mark")),
    (codecs.BOM_UTF32_BE, Guess("UTF-32", "UTF-32 BE with a byte-order mark")),
    (codecs.BOM_UTF16_LE, Guess("UTF-16", "UTF-16 LE with a byte-order mark")),
    (codecs.BOM_UTF16_BE, Guess("UTF-16", "UTF-16 BE with a byte-order mark")),
)
_WIDE = (
    ("utf-32-le", Guess("UTF-32LE", "UTF-32 LE without a byte-order mark")),
    ("utf-32-be", Guess("UTF-32BE", "UTF-32 BE without a byte-order mark")),
    ("utf-16-le", Guess("UTF-16LE", "UTF-16 LE without a byte-order mark")),
    ("utf-16-be", Guess("UTF-16BE", "UTF-16 BE without a byte-order mark")),
)
_KINDS = (
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"BZh91AY&SY", "a bzip2 file"),
    (b"PAR1", "a parquet file"),
    (b"SQLite format 3\x00", "a SQLite database"),
)
_HANGUL = re.compile("[가-힣]")
# What UTF-16 read with its bytes swapped does not give.
_COMMON = re.compile(f"[\t\n\r -~가-힣ㄱ-ㅣぁ-ヺー、。{_CHINESE}{_SIMPLE}{_TRADITIONAL}]")
_ASCII = re.compile("[\x00-\x7f]")


def guess(data: bytes, bad: int) -> Guess | None:
    """What `data` looks like, whose byte `bad` is the first that is no UTF-8; None where nothing can be told."""
    kind = next((Guess("", label) for magic, label in _KINDS if data.startswith(magic)), None)
    if kind is not None:
        return kind
    start = data.rfind(b"\n", 0, bad) + 1  # no encoding of these has a line feed inside a character
    sample = data[start : start + SAMPLE]
    return guess_wide(data) or _east_asian(sample) or _pure_utf16(data) or _western(sample)


def guess_wide(data: bytes) -> Guess | None:
    """UTF-16 or UTF-32, by its mark or by the zero bytes of its ASCII characters."""
    for mark, found in _MARKS:
        if data.startswith(mark):
            return found
    return _best_wide(data) if b"\x00" in data[:SAMPLE] else None


def is_damaged_utf8(data: bytes, bad: int) -> bool:
    """Whether there is more UTF-8 than anything else around the byte that is none.

    A character of three bytes outweighs one bad place, one of two bytes half of one: other encodings give a few.
    """
    text = data[max(0, bad - SAMPLE) : bad + SAMPLE].decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    two = len(re.findall("[\x80-\u07ff]", text))
    three = len(re.findall("[\u0800-\U0010ffff]", text)) - wrong
    return three + two / 2 >= wrong


def _east_asian(sample: bytes) -> Guess | None:
    scored = []
    for candidate in _CANDIDATES:
        text = _decode(sample, candidate.codec)
        if text is not None:
            scored.append((_share(candidate.frequent, text), candidate.guess))
    best = max(scored, key=lambda pair: pair[0], default=None)
    if best is not None and best[0] >= ENOUGH:
        return best[1]
    # A few words need not hold frequent syllables. One of CP949's own may be a letter of Windows-1252 and one of ASCII.
    text = _decode(sample, "cp949")
    if text is None:
        return None
    share, words = _share(_HANGUL, text), re.search("[가-힣]{2}", text)
    sure = share >= 0.2 if words else share >= 0.6 and _decode(sample, "euc_kr") is not None
    return _CANDIDATES[0].guess if sure else None


def _best_wide(data: bytes) -> Guess | None:
    best, most = None, 0.6
    for codec, found in _WIDE:
        width = 4 if "32" in codec else 2
        text = _decode(data[: min(len(data), SAMPLE) // width * width], codec)
        share = len(_COMMON.findall(text)) / len(text) if text else 0.0
        if text and width == 4:  # few bytes are UTF-32 by chance
            return found
        if share > most:
            best, most = found, share
    return best


def _pure_utf16(data: bytes) -> Guess | None:
    """UTF-16 without a single ASCII character, hence without zero bytes: Korean words that no space parts."""
    return _best_wide(data) if len(data) % 2 == 0 else None


def _western(sample: bytes) -> Guess | None:
    text = _decode(sample, "cp1252")
    if text is None:
        return None
    # Letters and signs stand among ASCII ones; what has more of them than of these is something else.
    strange = len(text) - len(_ASCII.findall(text))
    return Guess("WINDOWS-1252", "Windows-1252 or another one-byte encoding") if strange < len(text) else None


def _decode(data: bytes, codec: str) -> str | None:
    """The text, the last character possibly cut; None where the bytes do not fit or are no text."""
    try:
        text = codecs.getincrementaldecoder(codec)("strict").decode(data, final=False)
    except UnicodeDecodeError:
        return None
    return text if all(map(_is_text, set(text))) else None


def _is_text(char: str) -> bool:
    return char in "\t\n\x0b\x0c\r\x1a\ufeff" or unicodedata.category(char) not in ("Cc", "Co", "Cn", "Cs")


def _share(wanted: re.Pattern[str], text: str) -> float:
    """Of the characters outside ASCII."""
    foreign = len(text) - len(_ASCII.findall(text))
    return len(wanted.findall(text)) / foreign if foreign else 0.0
