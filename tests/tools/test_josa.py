import pytest

from tools.ko_text2sql.josa import josa, particle


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ("책", "은/는", "책은"),
        ("도서", "은/는", "도서는"),
        ("제목", "이/가", "제목이"),
        ("저자", "이/가", "저자가"),
        ("평점", "을/를", "평점을"),
        ("학교", "과/와", "학교와"),
        ("서울", "으로/로", "서울로"),
        ("부산", "으로/로", "부산으로"),
        ("제주", "으로/로", "제주로"),
        ("서울", "은/는", "서울은"),
        ("개", "이야/야", "개야"),
        ("권", "이야/야", "권이야"),
        ("길동", "이라는/라는", "길동이라는"),
        ("3", "은/는", "3은"),
        ("2", "은/는", "2는"),
        ("1", "으로/로", "1로"),
        ("7", "으로/로", "7로"),
        ("6", "으로/로", "6으로"),
        ("10", "을/를", "10을"),
        ("10,000", "이/가", "10,000이"),
        ("1000000000000", "이/가", "1000000000000가"),
        ("4.0", "을/를", "4.0을"),
        ("4.5", "을/를", "4.5를"),
        ("5000원", "을/를", "5000원을"),
        ("50%", "을/를", "50%를"),
        ("3km", "을/를", "3km를"),
        ("70kg", "을/를", "70kg을"),
        ("URL", "으로/로", "URL로"),
        ("RPG", "은/는", "RPG는"),
        ("FPS", "이/가", "FPS가"),
        ("ABM", "이/가", "ABM이"),
        ("VR", "을/를", "VR을"),
        ("game", "을/를", "game을"),
        ("server", "을/를", "server를"),
        ("table", "으로/로", "table로"),
        ("book", "은/는", "book은"),
        ("'별 헤는 밤'", "이/가", "'별 헤는 밤'이"),
        ("'바다'", "이/가", "'바다'가"),
        ("가격(원)", "을/를", "가격(원)을"),
        ("", "은/는", "는"),
        ("'", "은/는", "'는"),
    ],
)
def test_josa(word: str, pair: str, expected: str) -> None:
    assert josa(word, pair) == expected


def test_pairs_may_be_written_either_way_round() -> None:
    for pair, other in [
        ("은/는", "는/은"),
        ("이/가", "가/이"),
        ("을/를", "를/을"),
        ("과/와", "와/과"),
        ("으로/로", "로/으로"),
    ]:
        for word in ("책", "도서", "서울", "3", "L"):
            assert particle(word, pair) == particle(word, other)


def test_a_pair_without_a_slash_is_refused() -> None:
    with pytest.raises(ValueError, match="은/는"):
        josa("책", "은")


def test_agrees_with_unicode_decomposition() -> None:
    import unicodedata

    for code in range(ord("가"), ord("힣") + 1, 97):
        syllable = chr(code)
        jamo = unicodedata.normalize("NFD", syllable)
        assert particle(syllable, "은/는") == ("은" if len(jamo) == 3 else "는")
        assert particle(syllable, "으로/로") == ("으로" if len(jamo) == 3 and jamo[2] != "\u11af" else "로")
