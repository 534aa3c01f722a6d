"""Korean particles that agree with the word before them.

Many Korean particles have two forms, one after a final consonant (받침) and one after a vowel: 은/는, 이/가, 을/를,
과/와. The directional (으)로 is the exception: a final ㄹ counts as a vowel (서울로, but 부산으로). The form follows
the sound, so digits are read as Sino-Korean numerals (3 = 삼), capital letters by their Korean names (L = 엘), units
of measure by what they stand for (km = 킬로미터), and lower-case Latin words by a short table of how their endings
are usually transcribed. Closing quotes and brackets are not pronounced and are looked through.

Not covered: Chinese characters and other scripts, which are taken to end in a vowel.
"""

from __future__ import annotations

from functools import lru_cache

VOWEL, CONSONANT, RIEUL = 0, 1, 2  # how a word ends

_SILENT = "'\"`’”」』》〉)]}> .!?…"
_DIGITS = {"1": RIEUL, "2": VOWEL, "3": CONSONANT, "4": VOWEL, "5": VOWEL, "6": CONSONANT, "7": RIEUL, "8": RIEUL,
           "9": VOWEL, "0": CONSONANT}  # fmt: skip
_LETTERS = {"L": RIEUL, "M": CONSONANT, "N": CONSONANT, "R": RIEUL}
# 킬로그램, 톤, 데시벨
_FINAL_UNITS = {
    "kg": CONSONANT,
    "g": CONSONANT,
    "mg": CONSONANT,
    "t": CONSONANT,
    "dB": RIEUL,
}
_OPEN_UNITS = ("km", "m", "cm", "mm", "l", "L", "ml", "mL", "kcal", "GB", "MB", "KB", "Hz", "W", "kWh")
_UNITS = dict.fromkeys(_OPEN_UNITS, VOWEL) | _FINAL_UNITS
_SIGNS = {
    "%": VOWEL,
    "℃": VOWEL,
    "°": VOWEL,
    "㎏": CONSONANT,
    "㎞": VOWEL,
    "㎡": VOWEL,
    "+": VOWEL,
    "#": CONSONANT,
}
_WORD_ENDS = (
    ("ng", CONSONANT), ("le", RIEUL), ("me", CONSONANT), ("ne", CONSONANT), ("l", RIEUL), ("m", CONSONANT),
    ("n", CONSONANT),
)  # fmt: skip


def _latin_ending(text: str) -> int:
    start = len(text)
    while start and text[start - 1].isascii() and text[start - 1].isalpha():
        start -= 1
    word = text[start:]
    if word in _UNITS and (start == 0 or text[start - 1].isdigit() or text[start - 1] == " "):
        return _UNITS[word]
    if len(word) == 1 or word.isupper():
        return _LETTERS.get(word[-1].upper(), VOWEL)
    word = word.lower()
    for end, sound in _WORD_ENDS:
        if word.endswith(end):
            return sound
    # a short vowel before k, p, t, b is heard as a final consonant: book 북, top 톱, set 셋
    if word[-1] in "kptb" and len(word) < 6 and word[-2] in "aeiou":
        return CONSONANT
    return CONSONANT if word.endswith("ck") else VOWEL


def _digit_ending(text: str) -> int:
    if text[-1] != "0":
        return _DIGITS[text[-1]]
    digits = text.replace(",", "")
    zeros = len(digits) - len(digits.rstrip("0"))
    whole = "." not in digits[-zeros - 2 :]
    # 조 has no final consonant
    return VOWEL if whole and 12 <= zeros < 16 and len(digits) > zeros else CONSONANT


@lru_cache(maxsize=65536)
def ending(word: str) -> int:
    """How `word` ends when read aloud in Korean: VOWEL, CONSONANT or RIEUL."""
    text = word.rstrip(_SILENT)
    if not text:
        return VOWEL
    last = text[-1]
    if "가" <= last <= "힣":
        final = (ord(last) - 0xAC00) % 28
        return VOWEL if final == 0 else RIEUL if final == 8 else CONSONANT
    if last in _DIGITS:
        return _digit_ending(text)
    if last.isascii() and last.isalpha():
        return _latin_ending(text)
    if "ㄱ" <= last <= "ㅎ":  # consonant names: 기역, 니은 ...; only 리을 ends in ㄹ
        return RIEUL if last == "ㄹ" else CONSONANT
    return _SIGNS.get(last, VOWEL)


# the form after a vowel comes second in every pair; these are the ones people also write the other way round
_SWAPPED = {
    "는/은": "은/는",
    "가/이": "이/가",
    "를/을": "을/를",
    "와/과": "과/와",
    "로/으로": "으로/로",
    "야/아": "아/야",
}


@lru_cache(maxsize=1024)
def _forms(pair: str) -> tuple[str, str, str]:
    pair = _SWAPPED.get(pair, pair)
    after_consonant, slash, after_vowel = pair.partition("/")
    if not slash:
        raise ValueError(f"a particle pair looks like '은/는', not {pair!r}")
    after_rieul = after_vowel if after_consonant.startswith("으로") else after_consonant
    return after_vowel, after_consonant, after_rieul


def particle(word: str, pair: str) -> str:
    """The form of `pair` ("은/는", "(consonant form)/(vowel form)") that follows `word`."""
    return _forms(pair)[ending(word)]


def josa(word: str, pair: str) -> str:
    """`word` with the right form of `pair`: josa("책", "은/는") == "책은", josa("서울", "으로/로") == "서울로"."""
    return word + _forms(pair)[ending(word)]
