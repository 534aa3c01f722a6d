"""The Text2SQL prompt: an instruction in Korean, the tables, the question, and the place where SQL goes.

The one place where it is written, so that training and inference see the same characters:

    {instruction}

    ### DDL:
    {context}

    ### Question:
    {question}

    ### SQL:
    {answer}{end of sequence}
"""

from __future__ import annotations

INSTRUCTION = (
    "당신은 질문을 SQL로 옮기는 도우미입니다. "
    "아래 DDL에 정의된 테이블만 사용해서 Question에 답하는 SQL 쿼리 하나를 작성하세요."
)

HEADINGS = ("### DDL:", "### Question:", "### SQL:")


def build_prompt(context: str, question: str) -> str:
    """Everything that stands before the answer, ending in a newline: the answer's first token follows directly."""
    ddl, asked, sql = HEADINGS
    return f"{INSTRUCTION}\n\n{ddl}\n{context.strip()}\n\n{asked}\n{question.strip()}\n\n{sql}\n"


def training_text(context: str, question: str, answer: str, eos: str) -> str:
    """The prompt, the answer as one complete statement, and the end-of-sequence token that teaches to stop."""
    return build_prompt(context, question) + complete_statement(answer) + eos


def complete_statement(sql: str) -> str:
    """The statement without surrounding blanks, ended by exactly one semicolon."""
    return sql.strip().rstrip("; \t\r\n") + ";"
