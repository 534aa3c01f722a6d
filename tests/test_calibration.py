"""Calibration rows: same seed, same rows; clear messages for texts that will not do."""

from pathlib import Path
from typing import Any

import pytest

from quantlab.calibration import digest, read_texts, token_rows
from quantlab.errors import DataError

from .conftest import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def test_rows_follow_the_seed(tokenizer: Any) -> None:
    texts = [f"line {i} of some text" for i in range(200)]
    one, same, other = (token_rows(texts, tokenizer, rows=5, seq_len=32, seed=s) for s in (1, 1, 2))
    assert one.shape == (5, 32) and one.equal(same) and not one.equal(other)
    assert digest(one) == digest(same) != digest(other)


def test_rows_do_not_overlap(tokenizer: Any) -> None:
    rows = token_rows(
        ["".join(chr(33 + i % 90) for i in range(3200))], tokenizer, rows=100, seq_len=32, seed=0
    )
    assert rows.shape == (100, 32)  # all there are
    assert len({tuple(r) for r in rows.tolist()}) == 45  # the text repeats every 90 characters


def test_jsonl_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n{"txt": "no"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: expected an object"):
        read_texts(str(path))
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_texts(str(path))
    path.write_text('{"text": "one"}\n{"text": "  "}\n')
    assert read_texts(str(path)) == ["one"]


def test_bundled_texts_are_found_and_misspelt_ones_named() -> None:
    assert len(read_texts("calib/ko-text2sql.jsonl")) > 100
    with pytest.raises(DataError) as caught:
        read_texts("calib/ko-text2sq.jsonl")
    assert "calib/ko-text2sql.jsonl" in caught.value.hint


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot read"):
        read_texts(str(path))
