"""The Text2SQL prompt: an instruction in Korean, the tables, the question, and the place where SQL goes.

The one place where it is written, so that training and inference see the same characters:

    {instruction}

    ### DDL:
    {context}

    ### Question:
    {question}

    ### SQL:
    {answer}{end of sequence}

A row's `evidence` (BIRD's external knowledge) follows the question on a line of its own. Few-shot examples stand
before all this, each written like the prompt itself, closed by its statement and a blank line. With a chat
template the whole is one user message: the wording does not depend on how a template treats system messages.

A prompt that leaves the answer too little of the model's context loses its last examples first, then lines of the
DDL from the end, then whatever stands first; the sample says so. Not covered: counting with anything but the
model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantlab.errors import DataError, RecipeError
from quantlab.sql.dataset import Item
from quantlab.sql.linker import link

INSTRUCTION = (
    "당신은 질문을 SQL로 옮기는 도우미입니다. "
    "아래 DDL에 정의된 테이블만 사용해서 Question에 답하는 SQL 쿼리 하나를 작성하세요."
)

HEADINGS = ("### DDL:", "### Question:", "### SQL:")

Chat = Literal["auto", "always", "never"]


def build_prompt(context: str, question: str, evidence: str = "") -> str:
    """Everything that stands before the answer, ending in a newline: the answer's first token follows directly."""
    ddl, asked, sql = HEADINGS
    hint = f"\nEvidence: {evidence.strip()}" if evidence.strip() else ""
    return f"{INSTRUCTION}\n\n{ddl}\n{context.strip()}\n\n{asked}\n{question.strip()}{hint}\n\n{sql}\n"


def training_text(context: str, question: str, answer: str, eos: str) -> str:
    """The prompt, the answer as one complete statement, and the end-of-sequence token that teaches to stop."""
    return build_prompt(context, question) + complete_statement(answer) + eos


def complete_statement(sql: str) -> str:
    """The statement without surrounding blanks, ended by exactly one semicolon."""
    return sql.strip().rstrip("; \t\r\n") + ";"


def evidence_of(item: Item) -> str:
    """The row's `evidence` where it is text."""
    found = item.extra.get("evidence")
    return found if isinstance(found, str) else ""


def shot_text(item: Item) -> str:
    """An example: the row's own prompt, its statement, a blank line."""
    asked = build_prompt(item.context, item.question, evidence_of(item))
    return f"{asked}{complete_statement(item.answer)}\n\n"


@dataclass(frozen=True)
class Prompt:
    """`text` goes to the model. `tables`: those that the linker left in, None where it left in all of them.

    `shots` are the ids of the examples that fitted; `cut` says in words what did not, "" where all did.
    """

    text: str
    tables: tuple[str, ...] | None = None
    shots: tuple[str, ...] = ()
    chat: bool = False
    cut: str = ""

    @property
    def extra(self) -> dict[str, Any]:
        """What a sample keeps of how it was asked: only what differs from the plain prompt."""
        kept = {
            "prompt_tables": list(self.tables) if self.tables is not None else None,
            "prompt_shots": list(self.shots),
            "prompt_chat": self.chat,
            "prompt_cut": self.cut,
        }
        return {key: value for key, value in kept.items() if value not in (None, [], False, "")}


def build_prompts(
    items: Sequence[Item],
    *,
    shots: Sequence[Item] = (),
    linker: Literal["none", "lexical"] = "none",
    chat: Chat = "never",
    tokenizer: Any = None,
    room: int | None = None,
) -> list[Prompt]:
    """A prompt for each item, of at most `room` tokens where that is given.

    Raises:
        RecipeError: `chat` is "always" and the tokenizer has no chat template. DataError: the template fails.
    """
    templated = wants_chat(tokenizer, chat)
    render = chat_renderer(tokenizer) if templated else str
    examples = [shot_text(shot) for shot in shots]

    def fits(text: str) -> bool:
        return room is None or len(tokenizer(render(text))["input_ids"]) <= room

    prompts = []
    for item in items:
        linked = link(item.context, item.question + " " + evidence_of(item)) if linker == "lexical" else None
        context = linked.context if linked is not None else item.context
        text, used, cut = _fit(item, context, examples, fits)
        tables = linked.kept if linked is not None and linked.removed else None
        ids = tuple(shot.id for shot in shots[:used])
        prompts.append(Prompt(render(text), tables, ids, templated, cut))
    return prompts


def _fit(
    item: Item, context: str, examples: Sequence[str], fits: Callable[[str], bool]
) -> tuple[str, int, str]:
    """(text, examples in it, what was cut)."""

    def text(examples_used: int, ddl: str) -> str:
        return "".join(examples[:examples_used]) + build_prompt(ddl, item.question, evidence_of(item))

    used = next((n for n in range(len(examples), -1, -1) if fits(text(n, context))), None)
    if used is not None:
        left_out = len(examples) - used
        return text(used, context), used, f"{left_out} of {len(examples)} examples" if left_out else ""
    lines = context.strip().splitlines()
    kept = _most(len(lines) - 1, lambda n: fits(text(0, "\n".join(lines[:n]))))
    if kept is not None:
        words = f"the last {len(lines) - kept} of {len(lines)} lines of DDL"
        return text(0, "\n".join(lines[:kept])), 0, words
    bare = text(0, "")
    kept = _most(len(bare), lambda n: fits(bare[len(bare) - n :])) or 0
    return bare[len(bare) - kept :], 0, f"all DDL and the first {len(bare) - kept} characters of the rest"


def _most(limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number up to `limit` that fits, by halving, or None where 0 does not."""
    if not fits(0):
        return None
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def wants_chat(tokenizer: Any, chat: Chat) -> bool:
    """Whether prompts go through the chat template; RecipeError where they must and there is none."""
    if chat == "never":
        return False
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat == "always" and not has:
        raise RecipeError(
            "tasks.text2sql.chat is always, and the model's tokenizer has no chat template",
            hint="chat: auto uses a template where there is one, chat: never none",
        )
    return has


def chat_renderer(tokenizer: Any) -> Callable[[str], str]:
    """A function from a user message to the text that stands before the assistant's answer.

    Reasoning is switched off where the template knows the switch `enable_thinking`. Whoever tokenizes the text adds
    the tokenizer's special tokens to it, so a beginning-of-sequence token that both would write is written once.
    """
    start = tokenizer.bos_token
    twice = bool(start) and (
        tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        and tokenizer("x", add_special_tokens=False)["input_ids"][:1] != [tokenizer.bos_token_id]
    )

    def render(text: str) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # a template is the model's own program and fails in its own ways
            raise DataError(
                f"the tokenizer's chat template fails: {error}", hint="chat: never asks without it"
            ) from error
        return str(rendered).removeprefix(start) if twice else str(rendered)

    return render
