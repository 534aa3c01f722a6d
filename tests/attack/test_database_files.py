"""Files that are no database, not one any more, or not only one: damage, links, pipes, names, logs and journals."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Sandbox

COUNT = "SELECT COUNT(*) FROM players"


@pytest.fixture
def whole(victim: Path) -> bytes:
    return victim.read_bytes()


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "nothing": b"",
        "one byte": b"S",
        "text": b"not a database at all" * 100,
        "header alone": whole[:100],
        "header and noise": b"SQLite format 3\x00" + b"\xff" * 500,
        "first page": whole[:4096],
        "zeros": bytes(8192),
        "compressed": b"\x1f\x8b\x08" + whole,
        "page size": whole[:16] + b"\x00\x01" + whole[18:],
        "read version": whole[:18] + b"\x09\x09" + whole[20:],
        "schema format": whole[:44] + b"\x00\x00\x00\x63" + whole[48:],
        "schema page": whole[:100] + bytes(3996) + whole[4096:],
    }


@pytest.mark.parametrize("name", list(damaged(b"")))
def test_what_is_no_database(attack, tmp_path: Path, whole: bytes, name: str) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(damaged(whole)[name])
    attack(path, COUNT, "database")


def test_a_truncated_table(attack, tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "x.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE players (name TEXT)")
    connection.executemany("INSERT INTO players VALUES (?)", [("선수" * 500,)] * 200)
    connection.commit()
    connection.close()
    path.write_bytes(path.read_bytes()[:200_000])
    attack(path, "SELECT SUM(length(name)) FROM players", "database")


def test_random_damage(attack, tmp_path: Path, whole: bytes) -> None:
    """Any answer will do, but an answer, within the limits."""
    kinds = set()
    sql = (
        "SELECT p.name, COUNT(*) FROM players p JOIN players q ON p.level <= q.level GROUP BY 1 ORDER BY 2, 1"
    )
    for seed in range(80):
        numbers = random.Random(seed)
        page = bytearray(whole)
        for _ in range(numbers.choice([1, 5, 50, 500])):
            page[numbers.randrange(len(page))] = numbers.randrange(256)
        path = tmp_path / "x.sqlite"
        path.write_bytes(page)
        kinds.add(attack(path, sql, "rows|database|sql|steps|seconds|memory|size|too_many_rows|denied").kind)
    assert {"rows", "database"} <= kinds


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_what_is_no_regular_file(attack, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.sqlite")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe.sqlite")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "folder.sqlite").mkdir()
    for name in (
        "pipe.sqlite",
        "to pipe",
        "loop",
        "dangling",
        "folder.sqlite",
        ".",
        "missing.sqlite",
        "x" * 900,
    ):
        attack(tmp_path / name, COUNT, "database")
    for name in ("\x00.sqlite", "\udcff.sqlite", ":memory:", "file:x?mode=rwc"):
        attack(tmp_path / name, COUNT, "database")
    for device in ("/dev/zero", "/dev/null", "/dev/tty"):
        attack_device = Path(device)
        if attack_device.exists():
            with Sandbox() as sandbox:
                assert sandbox.run(attack_device, COUNT).kind == "database"


@pytest.mark.parametrize(
    "name",
    [
        "a?mode=rwc&cache=shared.sqlite", "a#b.sqlite", "a%3f%00.sqlite", "빈 칸 한글.sqlite", "a'b\"c;--.sqlite",
        "\udcff\udcfe.sqlite", "a\nb.sqlite", "-wal", "--help", ":memory:", "file:x?mode=memory", "a\\b.sqlite",
    ],
)  # fmt: skip
def test_names_that_mean_something_elsewhere(attack, tmp_path: Path, whole: bytes, name: str) -> None:
    try:
        (tmp_path / name).write_bytes(whole)
    except (OSError, UnicodeError):
        pytest.skip("this file system does not take the name")
    assert attack(tmp_path / name, COUNT, "rows").rows == ((50,),)


def test_a_link_to_a_database_is_one(attack, tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(victim)
    assert attack(tmp_path / "link", COUNT, "rows").rows == ((50,),)


def test_a_changed_file_is_opened_anew(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    for value in (1, 2):
        connection = sqlite3.connect(path)
        connection.executescript(
            f"DROP TABLE IF EXISTS t; CREATE TABLE t (a); INSERT INTO t VALUES ({value});"
        )
        connection.close()
        os.utime(path, ns=(value, value))
        assert sandbox.run(path, "SELECT a FROM t").rows == ((value,),)
    other = tmp_path / "y.sqlite"
    shutil.copy(path, other)
    connection = sqlite3.connect(other)
    connection.execute("UPDATE t SET a = 3")
    connection.commit()
    connection.close()
    os.utime(other, ns=(2, 2))
    other.replace(path)  # same size, same time
    assert sandbox.run(path, "SELECT a FROM t").rows == ((3,),)


def test_rows_still_in_a_write_ahead_log_are_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    path, link = tmp_path / "wal.sqlite", tmp_path / "link"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a)")
    connection.commit()
    link.symlink_to(path)
    assert sandbox.run(path, "SELECT * FROM t").rows == sandbox.run(link, "SELECT * FROM t").rows == ()
    connection.execute("PRAGMA journal_mode = WAL")
    for value in (1, 2):
        connection.execute("INSERT INTO t VALUES (?)", (value,))
        connection.commit()
        for name in (path, link):
            assert sandbox.run(name, "SELECT MAX(a) FROM t").rows == ((value,),)
    connection.close()
    assert sandbox.run(path, "SELECT * FROM t").rows == ((1,), (2,))  # and once the log has been written back


@pytest.mark.parametrize("shared", [None, b"", b"junk" * 1000, "live"])
@pytest.mark.parametrize("log", [b"junk" * 1000, b"\x37\x7f\x06\x82" + bytes(4000), "torn", "live"])
def test_a_log_left_behind(attack, tmp_path: Path, log: bytes | str, shared: bytes | str | None) -> None:
    """A crash leaves the log beside the file: its rows count, and where they cannot be had without writing it is said.

    A log without a valid header is none, for SQLite too.
    """
    source, path = tmp_path / "source" / "x.sqlite", tmp_path / "copy" / "x.sqlite"
    source.parent.mkdir()
    path.parent.mkdir()
    connection = sqlite3.connect(source)
    connection.execute("CREATE TABLE t (a)")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.commit()
    for suffix, content in (("", "live"), ("-wal", log), ("-shm", shared)):
        if isinstance(content, bytes):
            Path(f"{path}{suffix}").write_bytes(content)
        elif content is not None:
            shutil.copy(f"{source}{suffix}", f"{path}{suffix}")
    connection.close()
    if log == "torn":  # in the middle of the only frame
        os.truncate(f"{path}-wal", 2000)
    if log in ("torn", "live") and shared is None:
        assert "x.sqlite-wal beside it" in attack(path, "SELECT * FROM t", "database").reason
    else:
        assert attack(path, "SELECT * FROM t", "rows").rows == (((1,),) if log == "live" else ())


def test_a_hot_journal(attack, tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "x.sqlite").write_bytes(whole)
    header = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\x00\x00\x00\x01" + bytes(2000)
    (tmp_path / "x.sqlite-journal").write_bytes(header)
    assert "x.sqlite-journal beside it" in attack(tmp_path / "x.sqlite", COUNT, "database").reason


def test_a_writer_at_work(attack, tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(whole)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute("DELETE FROM players")
    try:
        attack(path, COUNT, "rows|database")  # not yet written, or locked; never half of it
    finally:
        connection.close()
    assert attack(path, COUNT, "rows").rows == ((50,),)
