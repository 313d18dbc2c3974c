"""Rows of JSON and of data sets: what a row says, as plain text, as a prompt with its answer, or as a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uniql_jax.chat_template import render_chat, without_bos
from uniql_jax.errors import UserError

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
"""Names of speakers in rows of `conversations` (ShareGPT), in the words of chat templates."""
KNOWN = "text, content, instruction and output, prompt and completion, messages, or conversations"


class Text(NamedTuple):
    """Plain text, all of which counts."""

    text: str


class Task(NamedTuple):
    """A prompt, and the answer that training is for; `document` is both as plain text."""

    prompt: str
    answer: str
    document: str


class Chat(NamedTuple):
    """Messages {role, content}; training is for those of the assistant from number `first` on."""

    messages: list[dict[str, str]]
    first: int = 0


Content = Text | Task | Chat


def json_rows(text: str, name: str) -> list[Any]:
    """The rows of a file: the entries of one JSON array, or one JSON value a line.

    Raises:
        UserError: a line is not JSON; the message names file and line.
    """
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except RecursionError:
        raise UserError(f"{name} is nested too deep to be read") from None
    except ValueError:
        pass  # one value a line, as a rule
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 inside a string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{name} line {number} is not JSON (one array, or one object a line)") from None
    return rows


def parse(row: Any, where: str, *, task_first: bool) -> Content:
    """What a row says.

    Args:
        row: a string or an object.
        where: names the row in messages.
        task_first: whether a row with both text and a task (as Alpaca's are) is a task; else it is text.

    Raises:
        UserError: the row has none of the known fields, or one that is not text.
    """
    if isinstance(row, str):
        return Text(_text(row, where, "the row"))
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is neither text nor an object with {KNOWN}")
    kinds = (_task, _plain) if task_first else (_plain, _task)
    for kind in kinds:
        found = kind(row, where)
        if found is not None:
            return found
    raise UserError(f"{where} has no {KNOWN}")


def _plain(row: Mapping[str, Any], where: str) -> Text | None:
    for field in ("text", "content"):
        if row.get(field) is not None:
            return Text(_text(row[field], where, field))
    return None


def _task(row: Mapping[str, Any], where: str) -> Task | Chat | None:
    has = {name for name, value in row.items() if value is not None}
    if {"instruction", "output"} <= has:
        instruction, output = (_text(row[name], where, name) for name in ("instruction", "output"))
        given = _text(row["input"], where, "input") if "input" in has else ""
        document = "\n\n".join(part for part in (instruction, given, output) if part)
        return Task(alpaca_prompt(instruction, given), output, document)
    if {"prompt", "completion"} <= has:
        if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
            prompt, completion = (_text(row[name], where, name) for name in ("prompt", "completion"))
            return Task(prompt, completion, prompt + completion)
        asked, answered = (_messages(row[name], where, name) for name in ("prompt", "completion"))
        return Chat(asked + answered, len(asked))
    for field in ("messages", "conversations"):
        if field in has:
            return Chat(_messages(row[field], where, field))
    return None


def alpaca_prompt(instruction: str, given: str) -> str:
    """The prompts of Stanford Alpaca, which instruction sets of this form are written for."""
    if not given:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    )


def _messages(value: Any, where: str, field: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where}: {field} is not a list of messages")
    found = []
    for number, one in enumerate(value, 1):
        place = f"message {number} of {field}"
        if not isinstance(one, Mapping):
            raise UserError(f"{where}: {place} is not an object")
        if "from" in one and "role" not in one:
            speaker = one["from"]
            if not isinstance(speaker, str) or speaker.lower() not in ROLES:
                raise UserError(f"{where}: {place} is from {speaker!r}, not from one of {', '.join(ROLES)}")
            role, content = ROLES[speaker.lower()], one.get("value")
        else:
            role, content = _text(one.get("role"), where, f"the role of {place}"), one.get("content")
        found.append({"role": role, "content": _text(_joined(content), where, f"the content of {place}")})
    return found


def _joined(content: Any) -> Any:
    """The text of a content that comes in parts, where all of them are text."""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    return content


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{where}: {field} holds {half}, half of a surrogate pair, which is no text") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, (bool, int, float)):
        return f"the number {value}" if not isinstance(value, bool) else str(value).lower()
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else type(value).__name__


def document(content: Content, tokenizer: Any | None, where: str) -> str:
    """A row as plain text; a chat as the tokenizer's template writes it, or its contents where there is none."""
    if isinstance(content, Text):
        return content.text
    if isinstance(content, Task):
        return content.document
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in content.messages)
    text = render_chat(tokenizer, content.messages, where)
    return without_bos(tokenizer, text)
