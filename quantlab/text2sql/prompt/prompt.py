"""The Text2SQL prompt: an instruction, the tables, the question, and the place where SQL goes.

The one place where it is written, so that training and inference see the same characters (`build_prompts`) and the
same tokens (`prompt_encoder`):

    {instruction}

    ### DDL:
    {context}

    ### Question:
    {question}

    ### SQL:
    {answer}{end of sequence}

That is how the bundled templates have it, in Korean and in English; a file may have it otherwise (`template.py`).
Behind the DDL may stand lines that say more of the schema (`schema_notes.py`).

A row's `evidence` (BIRD's external knowledge) follows the question on a line of its own. What of a row is shown is
decided by `row_fields`, for the student's prompt as for the teacher's and the judge's. Few-shot examples stand
before all this, each written like the prompt itself, closed by its statement and a blank line. With a chat
template the whole is one user message: the wording does not depend on how a template treats system messages.

A prompt that leaves the answer too little of the model's context loses its last examples first, then lines of the
DDL from the end, then whatever stands first; the sample says so. Not covered: counting with anything but the
model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

from quantlab.errors import DataError, RecipeError
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.schema_linking import Linked, link
from quantlab.text2sql.prompt.template import Template, bundled_template

# Of the bundled Korean template, the default where none is given.
INSTRUCTION = bundled_template("ko").instruction
HEADINGS = ("### DDL:", "### Question:", "### SQL:")

Chat = Literal["auto", "always", "never"]


class RowFields(TypedDict):
    """What of a row a prompt shows."""

    context: str
    question: str
    evidence: str


def row_fields(item: Item, context: str | None = None) -> RowFields:
    """What of a row is shown to whoever answers or judges it; `context` in place of the whole schema."""
    return {
        "context": schema_text(item) if context is None else context,
        "question": item.question,
        "evidence": item.evidence,
    }


def schema_text(item: Item, linked: Linked | None = None) -> str:
    """The DDL, or what a linker left of it, and behind it the row's notes about the tables that are there."""
    context = item.context if linked is None else linked.context
    gone = {name.lower() for name in linked.removed} if linked is not None else set()
    lines = [note.line for note in item.notes if note.table.lower() not in gone]
    return "\n".join([context.rstrip(), *lines]) if lines else context


def item_prompt(item: Item, context: str | None = None, template: Template | None = None) -> str:
    """The row's own prompt, without examples and chat template."""
    return build_prompt(**row_fields(item, context), template=template)


def build_prompt(context: str, question: str, evidence: str = "", template: Template | None = None) -> str:
    """Everything that stands before the answer, ending in a newline: the answer's first token follows directly. The
    bundled Korean template is the default."""
    return (template or bundled_template("ko")).write(context, question, evidence)


def complete_statement(sql: str) -> str:
    """The statement without surrounding blanks, ended by exactly one semicolon."""
    return sql.strip().rstrip("; \t\r\n") + ";"


def shot_text(item: Item, template: Template | None = None) -> str:
    """An example: the row's own prompt, its statement, a blank line."""
    return f"{item_prompt(item, template=template)}{complete_statement(item.answer)}\n\n"


@dataclass(frozen=True)
class Prompt:
    """`text` goes to the model. `tables`: those that the linker left in, None where it left in all of them.

    `shots` are the ids of the examples that fitted; `cut` says in words what did not, "" where all did. `whole`: of the
    row's own prompt nothing was cut. `context` is the schema as it is shown.
    """

    text: str
    tables: tuple[str, ...] | None = None
    shots: tuple[str, ...] = ()
    chat: bool = False
    cut: str = ""
    whole: bool = True
    context: str = ""

    @property
    def beginning(self) -> str:
        """Prompts of which it is the same begin alike: the same examples, the same DDL."""
        return "\n".join((*self.shots, self.context))

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
    template: Template | None = None,
) -> list[Prompt]:
    """A prompt for each item, of at most `room` tokens where that is given, by the bundled Korean template unless
    another is.

    Raises:
        RecipeError: `chat` is "always" and the tokenizer has no chat template. DataError: the template fails.
    """
    templated = wants_chat(tokenizer, chat)
    render = chat_renderer(tokenizer) if templated else str
    examples = [shot_text(shot, template) for shot in shots]
    encode = prompt_encoder(tokenizer) if room is not None else None

    def fits(texts: Sequence[str]) -> list[bool]:
        if encode is None or room is None:
            return [True] * len(texts)
        return [len(ids) <= room for ids in encode([render(text) for text in texts])]

    linked = [_link(item) if linker == "lexical" else Prompt("", context=schema_text(item)) for item in items]
    texts = [
        "".join(examples) + item_prompt(item, prompt.context, template) for item, prompt in zip(items, linked)
    ]
    ids = tuple(shot.id for shot in shots)
    prompts = [
        replace(prompt, text=text, shots=ids)
        if whole
        else _fit(item, prompt, ids, examples, lambda text: fits([text])[0], template)
        for item, prompt, text, whole in zip(items, linked, texts, fits(texts))
    ]
    return [replace(prompt, text=render(prompt.text), chat=templated) for prompt in prompts]


def _link(item: Item) -> Prompt:
    """A prompt without a text yet: the tables that the question and its evidence seem to need."""
    linked = link(item.context, f"{item.question} {item.evidence}")
    context = schema_text(item, linked)
    return Prompt("", tables=linked.kept if linked.removed else None, context=context)


def _fit(
    item: Item,
    prompt: Prompt,
    shots: Sequence[str],
    examples: Sequence[str],
    fits: Callable[[str], bool],
    template: Template | None = None,
) -> Prompt:
    """The prompt of a row for which there is no room with all examples, cut until it fits."""

    def text(used: int, ddl: str) -> str:
        return "".join(examples[:used]) + item_prompt(item, ddl, template)

    for used in range(len(examples) - 1, -1, -1):
        if fits(text(used, prompt.context)):
            cut = f"{len(examples) - used} of {len(examples)} examples"
            return replace(prompt, text=text(used, prompt.context), shots=tuple(shots[:used]), cut=cut)
    lines = prompt.context.strip().splitlines()
    kept = _most(len(lines) - 1, lambda n: fits(text(0, "\n".join(lines[:n]))))
    if kept is not None:
        ddl, cut = "\n".join(lines[:kept]), f"the last {len(lines) - kept} of {len(lines)} lines of DDL"
        return replace(prompt, text=text(0, ddl), context=ddl, cut=cut, whole=False)
    bare = text(0, "")
    kept = _most(len(bare), lambda n: fits(bare[len(bare) - n :])) or 0
    cut = f"all DDL and the first {len(bare) - kept} characters of the rest"
    return replace(prompt, text=bare[len(bare) - kept :], context="", cut=cut, whole=False)


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


def prompt_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function from prompts to the tokens that the answer follows, in training and at inference.

    Tokenizers add their special tokens; an end-of-sequence token that one adds behind every text is taken off, as no
    answer could go on from there.
    """
    end = tokenizer.eos_token_id
    ended = (
        end is not None
        and tokenizer("x")["input_ids"][-1:] == [end]
        and tokenizer("x", add_special_tokens=False)["input_ids"][-1:] != [end]
    )

    def encode(prompts: Sequence[str]) -> list[list[int]]:
        rows = [list(row) for row in tokenizer(list(prompts))["input_ids"]] if prompts else []
        return [row[:-1] for row in rows] if ended else rows

    return encode
