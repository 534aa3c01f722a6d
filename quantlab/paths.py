"""Where bundled files are, how a `source` in a recipe becomes a file, and writing without half-written files.

In a checkout `recipes/` and `calib/` stand beside the package; in an installed wheel they are in
`quantlab/_bundled/`. Text2SQL data and held-out text are in `quantlab/data/` in both.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from quantlab.errors import DataError, MachineError

PACKAGE = Path(__file__).resolve().parent
DATA = PACKAGE / "data"


def bundled(folder: str) -> Path:
    """The bundled directory `folder` ("recipes" or "calib"), in a checkout or in an installed wheel."""
    installed = PACKAGE / "_bundled" / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


def find_source(source: str) -> Path:
    """The file that a recipe's `source`, `data` or `include_path` names: a path, else a bundled file.

    Bundled names are `calib/ko-text2sql.jsonl`, `heldout.txt`, `ko_text2sql/test.jsonl`. A dataset of the hub
    (`hf:...`) is not a file: callers handle that prefix first. DataError names the nearest bundled file.
    """
    path = Path(source).expanduser()
    candidates = [path]
    if not path.is_absolute():
        candidates += [DATA / path, bundled("calib").parent / path]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    near = nearest(source, bundled_sources())
    raise DataError(
        f"no such file: {source}",
        hint=f"did you mean {near}?" if near else "give a path, or one of: " + ", ".join(bundled_sources()),
    )


def bundled_sources() -> list[str]:
    """Names that `find_source` resolves without a file of the user's."""
    calib = bundled("calib")
    names = [f"calib/{p.name}" for p in sorted(calib.glob("*")) if p.suffix in {".jsonl", ".txt"}]
    names += [p.name for p in sorted(DATA.glob("*.txt"))]
    return names + [f"ko_text2sql/{p.name}" for p in sorted((DATA / "ko_text2sql").glob("*.jsonl"))]


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return found[0] if found else None


def cache_folder() -> Path:
    """Where things are kept that can be made again: `$QUANTLAB_CACHE`, else `quantlab` in the user's cache folder."""
    named = os.environ.get("QUANTLAB_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantlab"


def slug(text: str) -> str:
    """`Qwen/Qwen2.5-0.5B` → `Qwen2.5-0.5B`, `embedded:base` → `embedded-base`: fit for a directory name."""
    last = text.rstrip("/").split("/")[-1] if ":" not in text else text
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.") or "model"


@contextlib.contextmanager
def atomic_writer(path: Path, mode: str = "w") -> Iterator[IO[str]]:
    """Write beside `path`, then rename onto it: readers see the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, mode, encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}", hint="is the disk full?"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def atomic_write_text(path: Path, text: str) -> None:
    with atomic_writer(path) as stream:
        stream.write(text)


def short_hash(parts: Iterable[str]) -> str:
    """16 hexadecimal characters for some texts, in this order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
