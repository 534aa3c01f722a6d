"""The parent's end of a process that measures one model: ask, and wait for the answer, one JSON line each."""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from typing import Any

from quantlab.errors import DataError, MachineError, QuantlabError, RecipeError
from quantlab.workers import last_line, start

WORKER = "quantlab.evals.speed_worker"
ERRORS = {kind.__name__: kind for kind in (DataError, MachineError, RecipeError, QuantlabError)}


class SpeedProcess:
    """A process that loads a model and runs it when asked. Close it."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = start(WORKER, self._stderr, stdout=subprocess.PIPE)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a question and wait for its answer.

        Raises:
            QuantlabError: the error that the process met, of its kind; or that it ended without an answer.
        """
        self.send(what, **arguments)
        return self.receive()

    def send(self, what: str, **arguments: Any) -> None:
        """Ask without waiting; :meth:`receive` tells what came of it."""
        asked = self._process.stdin
        assert asked is not None
        with suppress(BrokenPipeError):  # it has ended: receiving says why
            asked.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            asked.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest question that was only sent. Raises as :meth:`ask`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ERRORS.get(answer["error"], QuantlabError)(answer["message"], hint=answer["hint"])
        return answer

    def _ended(self) -> QuantlabError:
        code = self._process.wait()
        self._stderr.seek(0)
        said = last_line(self._stderr.read().decode("utf-8", "replace"))
        if code in (-9, 137):
            return MachineError(
                "the process that measures speed was killed: is the memory enough?",
                hint="measure fewer recipes at once, or leave the task out (--set evaluate=[...])",
            )
        return QuantlabError(f"the process that measures speed ended with code {code}: {said}")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(BrokenPipeError):  # a question that an ended process did not read
                    stream.close()
