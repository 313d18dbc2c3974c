"""Only answers count: prompts and padding are seen to carry no loss, and every source has its form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from uniql_jax.documents import Item
from uniql_jax.errors import UserError
from uniql_jax.train import examples

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue {input}."},
    {"instruction": "Add up {x} {input} {0}.", "input": "1 and {instruction}", "output": "3", "text": "not this"},
]


def _items(found: list[Any]) -> list[Item]:
    return [Item(row, "rows", f"row {number} of rows") for number, row in enumerate(found, 1)]


def test_the_answer_and_its_end_count_and_nothing_else() -> None:
    tokenizer = tiny.tokenizer()
    found = examples.encode(_items(ROWS), tokenizer, 400, 1, "rows")
    for row, tokens, valid, learn in zip(ROWS, found.tokens, found.valid, found.learn, strict=True):
        assert tokens[learn][-1] == 1
        assert tokenizer.decode(tokens[learn][:-1]) == row["output"]
        prompt = tokenizer.decode(tokens[valid & ~learn])
        assert f"### Instruction:\n{row['instruction']}\n" in prompt
        assert row["input"] in prompt
        assert prompt.endswith("### Response:\n")
        assert ("### Input:" in prompt) == bool(row["input"])
        assert not learn[~valid].any()
        assert (np.diff(valid.astype(int)) <= 0).all()  # padding on the right
    assert found.valid.sum() < found.valid.size


def test_long_prompts_are_left_out_and_counted() -> None:
    tokenizer = tiny.tokenizer()
    rows = [*ROWS, {"instruction": "word " * 300, "output": "x"}]
    found = examples.encode(_items(rows), tokenizer, 400, 1, "rows")
    assert len(found) == 2
    assert "of 3" in found.description
    with pytest.raises(UserError, match="larger --length"):
        examples.encode(_items(rows), tokenizer, 8, 1, "rows")


def test_sources(tmp_path: Path, rng: np.random.Generator) -> None:
    tokenizer = tiny.tokenizer()
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "word " * 200}) for _ in range(3)))
    (tmp_path / "text.txt").write_text("some words " * 300)
    np.save(tmp_path / "ids.npy", rng.integers(0, 50, (5, 400)).astype(np.int32))
    for name in ("array.json", "lines.jsonl"):
        tasks, plain = examples.task_items(str(tmp_path / name))
        assert [item.value for item in tasks] == ROWS
        assert not plain
    for name in ("text.jsonl", "text.txt", "ids.npy"):
        assert examples.task_items(str(tmp_path / name)) == ([], True)
    tasks, plain = examples.task_items(str(tmp_path))  # each file of a folder in its own way
    assert [item.value for item in tasks] == ROWS
    assert plain

    specs = [str(tmp_path / name) for name in ("array.json", "ids.npy", "text.txt")]
    found = examples.load(specs, tokenizer, 400, None, 0, vocab_size=tiny.VOCAB, end=1)
    assert found.tokens.shape[1] == 400
    assert len(found) > 2 + 5
    assert found.learn[2:].all()
    assert found.valid[2:].all()
    few = examples.load(specs[:2], tokenizer, 400, 1, 0, vocab_size=tiny.VOCAB, end=1)
    assert len(few) == 2
    short = examples.load(
        [str(tmp_path / "array.json"), str(tmp_path / "text.txt")],
        tokenizer,
        2000,
        None,
        0,
        vocab_size=tiny.VOCAB,
        end=1,
    )
    assert short.tokens.shape[1] == 2000
    assert not short.valid.all()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    mixed = tmp_path / "mixed.jsonl"
    for order in ([ROWS[0], {"text": "other"}], [{"text": "other"}, ROWS[0]]):
        mixed.write_text("\n".join(map(json.dumps, order)))
        with pytest.raises(UserError, match=r"row 2 of .*mixed.jsonl is .* its own file"):
            examples.load([str(mixed)], tokenizer, 64, None, 0, vocab_size=tiny.VOCAB)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="no tokenizer"):
        examples.load([str(good)], None, 64, None, 0, vocab_size=tiny.VOCAB)
    with pytest.raises(UserError, match="vocabulary of 20"):
        examples.load([str(good)], tokenizer, 400, None, 0, vocab_size=20)
    with pytest.raises(UserError, match="too little"):
        examples.split(examples.from_windows(np.zeros((1, 8), np.int32)), 0.5, 10, 0)
    with pytest.raises(UserError, match="no such text"):
        examples.load([str(tmp_path / "none.json")], tokenizer, 64, None, 0, vocab_size=tiny.VOCAB)


def test_every_row_is_seen_once_an_epoch(rng: np.random.Generator) -> None:
    steps = [examples.batch_rows(10, 4, 3, step) for step in range(10)]
    rows = np.concatenate(steps).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(10), (4, 1)))
    assert not np.array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(examples.batch_rows(10, 4, 3, 7), steps[7])
    big = examples.batch_rows(3, 8, 3, 0)  # fewer rows than a batch
    assert set(big) == {0, 1, 2}
    whole = examples.from_windows(np.arange(40, dtype=np.int32).reshape(20, 2))
    training, validation = examples.split(whole, 0.25, 3, 0)
    assert len(validation) == 3
    seen = np.concatenate([training.tokens, validation.tokens])
    np.testing.assert_array_equal(np.sort(seen[:, 0]), whole.tokens[:, 0])


def test_padding_comes_last() -> None:
    valid = np.asarray([[True, True, False], [False, True, True]])
    with pytest.raises(ValueError, match="padding must follow"):
        examples.Examples(np.zeros((2, 3), np.int32), valid, valid, "padded on the left")
    assert len(examples.Examples(np.zeros((1, 3), np.int32), valid[:1], valid[:1], "padded on the right")) == 1


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}\\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHATS = [
    [
        ("system", "Be brief."),
        ("user", "Hi {x}?"),
        ("assistant", "Yes."),
        ("user", "So?"),
        ("assistant", "No \u2028 é."),
    ],
    [("user", "Hello"), ("assistant", "the river")],
]


def _messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def test_chats_count_where_transformers_masks_the_assistant(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows: list[Any] = [{"messages": _messages(chat)} for chat in CHATS]
    rows += [{"conversations": [{"from": names[r], "value": c} for r, c in chat]} for chat in CHATS]
    found = examples.encode(_items(rows), tokenizer, 200, 1, "chats")
    for i, chat in enumerate([*CHATS, *CHATS]):
        want = tokenizer.apply_chat_template(
            _messages(chat), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        size = len(want["input_ids"])
        np.testing.assert_array_equal(found.tokens[i][:size], want["input_ids"])
        np.testing.assert_array_equal(found.learn[i][:size], np.asarray(want["assistant_masks"], bool))
        assert found.valid[i].sum() == size
    half = {"prompt": _messages(CHATS[0][:3]), "completion": _messages(CHATS[0][3:])}
    last = examples.encode(_items([half]), tokenizer, 200, 1, "half")
    assert tokenizer.decode(last.tokens[0][last.learn[0]], skip_special_tokens=True) == CHATS[0][-1][1]


def test_prompts_and_completions_stand_as_they_are() -> None:
    tokenizer = tiny.tokenizer()
    row = {"prompt": "Say {input}: ", "completion": "word"}
    found = examples.encode(_items([row]), tokenizer, 100, 1, "rows")
    assert tokenizer.decode(found.tokens[0][found.valid[0] & ~found.learn[0]]) == row["prompt"]
    assert tokenizer.decode(found.tokens[0][found.learn[0]][:-1]) == row["completion"]


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"instruction": "a", "input": 5, "output": "b"}, None, "input is the number 5, not text"),
        ({"instruction": ["a"], "output": "b"}, None, "instruction is a list"),
        ({"instruction": "a", "output": {"b": 1}}, None, "output is an object"),
        ({"prompt": "a", "completion": 1.5}, None, "completion is the number"),
        ({"prompt": "\ud800", "completion": "b"}, None, "prompt holds .ud800"),
        ({"messages": []}, TEMPLATE, "not a list of messages"),
        ({"messages": "hello"}, TEMPLATE, "not a list of messages"),
        ({"messages": [{"role": "user"}]}, TEMPLATE, "content of message 1 of messages is missing"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, TEMPLATE, "half of a surrogate pair"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, TEMPLATE, "from 'cat'"),
        ({"messages": _messages(CHATS[1])}, None, "no chat template"),
        ({"messages": _messages(CHATS[1])}, "{{ nothing.of.that }}", "row 1 of rows: the model's chat template"),
        ({"messages": _messages(CHATS[1])}, "{% if %}", "row 1 of rows: the model's chat template"),
        ({"messages": _messages(CHATS[1])}, "{{ raise_exception('not so') }}", "not so"),
        ({"messages": _messages(CHATS[1])}, "{{ messages | length }}", "distinguished from the prompt"),
        ({"messages": _messages(CHATS[1])[:1]}, TEMPLATE, "no row has an answer"),
        ({"prompt": "a", "completion": ""}, None, "no row has an answer"),
        ({"title": "a"}, None, "row 1 of rows has no text"),
    ],
)
def test_rows_that_cannot_be_used_are_one_line(row: Any, template: str | None, says: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=says) as error:
        examples.encode(_items([row]), tokenizer, 64, 1, "rows")
    assert "\n" not in str(error.value)
