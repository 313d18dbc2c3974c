"""The chat command through its stdin: turns, history, rates, and what it refuses."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import uniql_jax
from tests import tiny
from uniql_jax.commands import chat, cli
from uniql_jax.runtime import text

NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(11))


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """talk(folder, lines, *options) -> (exit code, stdout, stderr), stdin no terminal."""

    def run(folder: Path, lines: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as stop:
            cli.run(chat.main, ["--ckpt", str(folder), "--max-new-tokens", str(NEW), *map(str, options)])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return run


def answer(folder: Path, messages: list[dict[str, str]], rate: float = 0.0, **more: int) -> str:
    """What the model says to a conversation, by the public function and the template itself."""
    model, tokenizer = uniql_jax.load(folder, rate), tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    ids = np.asarray(ids, np.int32)
    return "".join(uniql_jax.generate(model, ids, tokenizer=tokenizer, max_new_tokens=NEW, **more))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_the_conversation_is_kept_over_turns_and_rates(folder: Path, talk) -> None:
    code, out, err = talk(folder, "hi\n\n/rate 0.25\nso\n/stats\n/reset\nhi\n/exit\nnever\n")
    first = answer(folder, [user("hi")])
    second = answer(folder, [user("hi"), assistant(first), user("so")], 0.25)
    third = answer(folder, [user("hi")], 0.25)
    assert code == 0
    assert out == f"{first}\n{second}\n{third}\n"
    assert "rate 0," in err
    assert err.count("rate 0.25,") == 2  # once loaded, and in the statistics
    assert f"{NEW} tokens after" in err
    assert "(0 of them read before)" in err  # at another rate
    assert "of weights" in err


def test_a_turn_does_not_read_the_ones_before(folder: Path, talk) -> None:
    """What the cache holds in 8 bits: the prompt so far, and the answer."""
    code, out, err = talk(folder, "the people at home\nand\n/stats\n", "--cache-bits", 8)
    first = answer(folder, [user("the people at home")], cache_bits=8)
    second = answer(folder, [user("the people at home"), assistant(first), user("and")], cache_bits=8)
    assert (code, out) == (0, f"{first}\n{second}\n")
    tokens, cached = (int(err.split(before)[1].split()[0]) for before in ("tokens after ", "conversation ("))
    assert 16 <= cached < tokens


def test_instructions_come_first(folder: Path, talk) -> None:
    system = {"role": "system", "content": "Be kind."}
    code, out, _ = talk(folder, "hi\n/reset\nhi", "--system", "Be kind.", "--prune-rate", 0.1)
    want = answer(folder, [system, user("hi")], 0.1)
    assert (code, out) == (0, f"{want}\n{want}\n")
    assert want != answer(folder, [user("hi")], 0.1)


def test_a_budget_covers_the_cache_too(folder: Path, talk) -> None:
    code, out, err = talk(folder, "hi\n", "--memory-budget", "1GB", "--context", 64)
    assert (code, out) == (0, answer(folder, [user("hi")]) + "\n")
    assert "prune rate 0: the least that fits 1 GB" in err
    assert "of cache" in err
    code, _, err = talk(folder, "hi\n", "--memory-budget", "100KB", "--context", 64)
    assert code == 2
    assert "work space" in err.splitlines()[-1]
    assert talk(folder, "hi\n", "--context", 1000)[0] == 2


def test_nothing_to_say(folder: Path, talk) -> None:
    code, out, err = talk(folder, "")
    assert (code, out) == (0, "")
    assert str(folder) in err
    assert "/rate" in talk(folder, "/help\n")[2]


def test_the_oldest_turns_go_when_the_model_reads_no_more(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many of them as needed, in pairs, never the instructions."""
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    talk = chat.Chat(str(folder), 0.0, settings, "Be kind.")
    old = [turn for i in range(9) for turn in (user(f"the people {i}"), assistant(f"at home {i}"))]
    talk.messages = list(old)
    ids = talk._prompt("hi")
    assert "the oldest turns are forgotten" in capsys.readouterr().err
    kept = talk.messages
    assert kept == [*old[-len(kept) + 1 :], user("hi")]
    assert 1 < len(kept) < len(old)
    assert len(kept) % 2 == 1
    assert tiny.tokenizer().decode(ids).startswith("<s>system: Be kind.")
    assert len(ids) + NEW <= talk.checkpoint.config.max_position
    talk.messages = old[-len(kept) - 1 :]  # one pair more does not fit
    talk._prompt("hi")
    assert talk.messages == kept


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/rate 0.9", "prune rate"), ("/rate", "prune rate"), ("/huh", "/help"),
        ("the people " * 300, "no room"), ("half \ud83d", "U+D83D"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_served_ends_a_script(folder: Path, talk, line: str, says: str) -> None:
    code, out, err = talk(folder, f"{line}\nhi\n")
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


def test_models_that_do_not_chat(tmp_path: Path, talk, rng: np.random.Generator) -> None:
    bare = tiny.checkpoint(tmp_path / "bare", rng, with_tokenizer=False)
    code, _, err = talk(bare, "hi\n")
    assert code == 2
    assert "no tokenizer" in err
    tiny.tokenizer().save_pretrained(bare)
    text._load.cache_clear()
    code, _, err = talk(bare, "hi\n")
    assert code == 2
    assert "no chat template" in err
    assert "generate" in err


def test_on_a_terminal(folder: Path) -> None:
    """Errors do not end the conversation there; the end of input does."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "uniql_jax.chat", "--ckpt", str(folder), "--max-new-tokens", "3"],
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1], env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    os.close(follower)
    os.write(leader, b"/huh\n/rate 7\nhi\n\x04")
    out, err = process.communicate(timeout=200)
    os.close(leader)
    assert process.returncode == 0, err
    assert err.count(b"error: ") == 2
    assert b"/help lists commands" in err
    assert out.count(b"> ") == 4
