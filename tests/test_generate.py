"""Streaming and batched generation, and the command."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from tests.commands import exit_code
from uniql_jax.commands import generate as generate_command
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime import generation as runtime

NEW = 12


@functools.cache
def the_model() -> CausalLM:
    """One model for the file: its compiled steps serve every test. It has no stop ids."""
    return tiny.model(np.random.default_rng(5), eos_token_id=None)


@functools.cache
def _forward() -> object:
    return jax.jit(lambda model, tokens: model(tokens))


def greedy_without_cache(model: CausalLM, prompt: np.ndarray, count: int) -> np.ndarray:
    """The specification: the whole text through the full forward, again and again (padded on the right)."""
    text = list(prompt)
    for _ in range(count):
        padded = np.pad(np.asarray(text, np.int32), (0, 64 - len(text)))[None]
        text.append(int(np.argmax(_forward()(model, padded)[0, len(text) - 1])))  # type: ignore[operator]
    return np.asarray(text[len(prompt) :], np.int32)


def prompt_of(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(2, tiny.VOCAB, length).astype(np.int32)


# ------------------------------------------------------------------------------------------------ loops


@pytest.mark.parametrize("length", [1, 7, 16, 17])
def test_stream_is_the_full_forward_repeated(length: int, rng: np.random.Generator) -> None:
    """Lengths at and around a bucket: padding on the left changes nothing."""
    prompt = prompt_of(rng, length)
    pieces = list(uniql_jax.generate(the_model(), prompt, max_new_tokens=NEW))
    assert all(p.dtype == np.int32 and p.shape == (1,) for p in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), greedy_without_cache(the_model(), prompt, NEW))


def test_batch_equals_each_prompt_alone(rng: np.random.Generator) -> None:
    prompts = [prompt_of(rng, n) for n in (5, 11, 2, 9)]
    tokens, mask = np.zeros((4, 11), np.int32), np.zeros((4, 11), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, 11 - len(prompt) :], mask[i, 11 - len(prompt) :] = prompt, 1
    found = uniql_jax.generate_tokens(the_model(), tokens, mask, NEW)
    assert found.dtype == np.int32
    assert found.shape == (4, NEW)
    for row, prompt in zip(found, prompts, strict=True):
        np.testing.assert_array_equal(row, greedy_without_cache(the_model(), prompt, NEW))


def test_sampled_stream_and_batch_agree_and_follow_the_seed(rng: np.random.Generator) -> None:
    prompt = prompt_of(rng, 6)
    settings = {"max_new_tokens": NEW, "temperature": 1.5, "top_p": 0.95}

    def stream(seed: int) -> np.ndarray:
        return np.concatenate(list(uniql_jax.generate(the_model(), prompt, seed=seed, **settings)))

    first = stream(1)
    np.testing.assert_array_equal(first, stream(1))
    assert (first != stream(2)).any()
    np.testing.assert_array_equal(first, uniql_jax.generate_tokens(the_model(), prompt[None], seed=1, **settings)[0])


def test_stop_ids_end_a_text(rng: np.random.Generator) -> None:
    prompts = np.stack([prompt_of(rng, 9) for _ in range(4)])
    free = uniql_jax.generate_tokens(the_model(), prompts, max_new_tokens=NEW)
    stop = int(free[0, 4])
    found = uniql_jax.generate_tokens(the_model(), prompts, max_new_tokens=NEW, eos_ids=(319, stop))
    for row, full in zip(found, free, strict=True):
        ends = np.flatnonzero(np.isin(full, (319, stop)))
        end = ends[0] if len(ends) else NEW
        np.testing.assert_array_equal(row[: end + 1], full[: end + 1])
        assert (row[end:] == full[min(end, NEW - 1)]).all() or end == NEW
    # every row stops at once: the loop leaves early and the rest is filled
    same = uniql_jax.generate_tokens(the_model(), prompts, max_new_tokens=NEW, eos_ids=free[:, 0].tolist())
    assert (same == free[:, :1]).all()

    stopping = CausalLM(tiny.config(eos_token_id=[319, stop]), the_model().params)
    pieces = list(uniql_jax.generate(stopping, prompts[0], max_new_tokens=NEW))
    end = int(np.flatnonzero(np.isin(free[0], (319, stop)))[0])
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.int32), *(p for p in pieces)]), free[0, :end])


def test_stop_ids_of_config_and_generation_config(tmp_path: Path) -> None:
    model = CausalLM(tiny.config(eos_token_id=[3, 1]), {"layers": []}, folder=str(tmp_path))
    assert runtime.stop_ids(model) == (1, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert runtime.stop_ids(model) == (1, 3, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert runtime.stop_ids(model) == (1, 3, 9)
    # no model makes these, so that they end nothing
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [-1, {tiny.VOCAB}, {10**12}]}}')
    assert runtime.stop_ids(model) == (1, 3)


@pytest.mark.parametrize(
    "text",
    ["[", "[1]", '{"eos_token_id": "2"}', '{"eos_token_id": [[1], 2]}', '{"eos_token_id": {"a": 1}}',
     '{"eos_token_id": 1.5}', '{"eos_token_id": true}', '{"eos_token_id": [null]}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_a_generation_config_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    model = CausalLM(tiny.config(), {"layers": []}, folder=str(tmp_path))
    (tmp_path / "generation_config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match="generation_config"):
        runtime.stop_ids(model)


def test_a_generation_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(UserError, match="generation_config"):
        runtime.stop_ids(CausalLM(tiny.config(), {"layers": []}, folder=str(tmp_path)))


def test_changing_settings_compiles_nothing(rng: np.random.Generator) -> None:
    def go(**settings: float) -> None:
        list(uniql_jax.generate(the_model(), prompt_of(rng, 9), max_new_tokens=NEW, **settings))

    go(temperature=0.5)
    before = runtime._pick._cache_size(), runtime._next._cache_size()
    go(temperature=0.9, top_p=0.8, top_k=3, seed=8)
    go(temperature=2)
    assert (runtime._pick._cache_size(), runtime._next._cache_size()) == before


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ([3], {"temperature": -1}, "temperature"),
        ([3], {"temperature": float("nan")}, "temperature"),
        ([3], {"temperature": float("inf")}, "temperature"),
        ([3], {"temperature": 1e39}, "temperature"),
        ([3], {"max_new_tokens": 10**30}, "exceed"),
        ([3], {"seed": 2**32}, "4294967295"),
        ([3], {"seed": -1}, "seed"),
        ("half \ud83d", {"tokenizer": tiny.tokenizer()}, "U\\+D83D"),
        ("", {"tokenizer": tiny.tokenizer()}, "empty"),
        ([3], {"top_p": 0}, "top_p"),
        ([3], {"top_p": 1.5}, "top_p"),
        ([3], {"top_k": -1}, "top_k"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens"),
        ([3] * 250, {"max_new_tokens": 7}, "exceed the model's 256"),
        (np.zeros(0, np.int32), {}, "empty"),
        ([3, -1], {}, "-1 is outside"),
        ([tiny.VOCAB], {}, "320 is outside"),
        ("text", {}, "no tokenizer"),
        ([3], {"chat": True}, "must be text"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(prompt: object, settings: dict[str, float], says: str) -> None:
    given_prompt = prompt if isinstance(prompt, str) else np.asarray(prompt)
    with pytest.raises(UserError, match=says):
        uniql_jax.generate(the_model(), given_prompt, **settings)


def test_more_than_the_vocabulary_for_top_k_is_all_of_it() -> None:
    found = [
        uniql_jax.generate_tokens(the_model(), np.asarray([[3, 4]]), None, 3, temperature=1.0, top_k=k)
        for k in (0, tiny.VOCAB, 3_000_000_000)
    ]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_model_makes_no_text(temperature: float) -> None:
    model = the_model()
    params = dict(model.params) | {"norm": model.params["norm"] * jnp.nan}
    broken = CausalLM(model.config, params)
    settings = {"max_new_tokens": NEW, "temperature": temperature}
    with pytest.raises(UserError, match="not finite"):
        uniql_jax.generate_tokens(broken, np.asarray([[3]]), eos_ids=(), **settings)
    with pytest.raises(UserError, match="not finite"):
        list(uniql_jax.generate(broken, np.asarray([3]), **settings))


@pytest.mark.parametrize("mask", [[1, 0, 1], [1, 1, 0]])
def test_padding_is_on_the_left(mask: list[int]) -> None:
    with pytest.raises(UserError, match="padding on the left"):
        uniql_jax.generate_tokens(the_model(), np.full((1, 3), 5, np.int32), np.asarray([mask]), 2)


def test_padding_on_the_right_is_refused() -> None:
    mask = np.asarray([[1, 1, 0], [1, 1, 1]], np.int32)
    with pytest.raises(UserError, match="padding on the left"):
        uniql_jax.generate_tokens(the_model(), np.full((2, 3), 5, np.int32), mask, 2)


# ------------------------------------------------------------------------------------------------ text


@functools.cache
def _tokenizer() -> object:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(11))


def test_text_in_text_out(folder: Path) -> None:
    model = uniql_jax.load(str(folder), 0.25)
    prompt = "Once there was"
    ids = np.asarray(_tokenizer()(prompt)["input_ids"], np.int32)  # type: ignore[operator]
    new = uniql_jax.generate_tokens(model, ids[None], max_new_tokens=NEW)[0]
    stops = np.flatnonzero(new == 1)
    expected = _tokenizer().decode(new[: stops[0]] if len(stops) else new)  # type: ignore[attr-defined]
    assert "".join(uniql_jax.generate(model, prompt, max_new_tokens=NEW)) == expected.rstrip("\ufffd")
    given_tokenizer = uniql_jax.generate(model, ids, max_new_tokens=NEW, tokenizer=_tokenizer())
    assert "".join(given_tokenizer) == expected.rstrip("\ufffd")


# ------------------------------------------------------------------------------------------------ command


command = functools.partial(exit_code, generate_command.main)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--ckpt", folder, "--prune-rate", 0.25, "--prompt", "Once there", "--max-new-tokens", NEW)
    assert command(*argv) == 0
    out = capsys.readouterr().out
    model = uniql_jax.load(str(folder), 0.25)
    assert out == "".join(uniql_jax.generate(model, "Once there", max_new_tokens=NEW)) + "\n"
    assert command(*argv, "--temperature", 1, "--top-p", 0.9, "--top-k", 9, "--seed", 3) == 0
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 9, "seed": 3}
    sampled = "".join(uniql_jax.generate(model, "Once there", max_new_tokens=NEW, **settings)) + "\n"
    assert capsys.readouterr().out == sampled != out


def test_importing_the_command_leaves_the_function() -> None:
    import uniql_jax.commands.generate

    assert list(uniql_jax.generate(the_model(), np.asarray([4]), max_new_tokens=NEW))


def test_memory_budget(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from uniql_jax.checkpoint import open_checkpoint

    size = open_checkpoint(folder).weight_bytes
    rates = []
    monkeypatch.setattr(runtime, "generate", lambda model, prompt, **settings: rates.append(model.rate) or iter(()))
    argv = ("--ckpt", folder, "--prompt", "Once")
    assert command(*argv, "--memory-budget", size(0.0)) == 0
    assert "prune rate 0:" in capsys.readouterr().err
    assert command(*argv, "--memory-budget", size(0.2)) == 0
    rate = float(capsys.readouterr().err.split("prune rate ")[1].split(":")[0])
    assert size(rate) <= size(0.2) < size(rate - 0.001)
    assert rates == [0.0, rate]
    assert command(*argv, "--memory-budget", size(0.35) - 1) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "0.35" in err


@pytest.mark.parametrize(
    "more",
    [
        ("--prune-rate", "0.9"),
        ("--prune-rate", "0.1", "--memory-budget", "3GiB"),
        ("--memory-budget", "lots"),
        ("--temperature", "-1"),
        ("--top-p", "2"),
        ("--top-p", "0"),
        ("--top-p", "0.9"),
        ("--top-k", "5", "--temperature", "0"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "5000"),
    ],
)
def test_command_refuses(folder: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--ckpt", folder, "--prompt", "Once", *more) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_command_without_tokenizer_or_prompt(
    tmp_path: Path, folder: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tiny.checkpoint(tmp_path / "bare", rng, with_tokenizer=False)
    assert command("--ckpt", bare, "--prompt", "Once") == 2
    assert "no tokenizer" in capsys.readouterr().err
    assert command("--ckpt", folder, "--prompt", "") == 2
    assert "prompt is empty" in capsys.readouterr().err
    assert command("--ckpt", tmp_path / "nowhere", "--prompt", "Once") == 2
    assert "nowhere" in capsys.readouterr().err


WITHOUT_TORCH = """
import importlib.util, runpy
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
runpy.run_module("uniql_jax.generate", run_name="__main__", alter_sys=True)
"""


def test_command_as_a_program(folder: Path) -> None:
    """Nothing but the text on stdout, nothing but the plan on stderr, also where there is no PyTorch."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_TORCH,
            "--ckpt",
            str(folder),
            "--prompt",
            "Once",
            "--max-new-tokens",
            "3",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    [plan] = done.stderr.splitlines()
    for part in (str(folder), "rate 0,", "of weights", "cache", "3 tokens", "CPU"):
        assert part in plan


@pytest.mark.parametrize("new", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 9))])
def test_several_tokens_a_call_are_the_same_tokens(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    """As on a GPU, where a call makes a chunk: streamed and in one loop, whatever part of the last chunk is wanted."""
    model, prompts = the_model(), np.stack([prompt_of(rng, 5) for _ in range(3)])
    want = uniql_jax.generate_tokens(model, prompts, max_new_tokens=new, eos_ids=())
    stop = int(want[1, new // 2])
    ended = uniql_jax.generate_tokens(model, prompts, max_new_tokens=new, eos_ids=(stop,))
    streamed = [int(token[0]) for token in uniql_jax.generate(model, prompts[1], max_new_tokens=new)]
    drawn = [int(t[0]) for t in uniql_jax.generate(model, prompts[1], max_new_tokens=new, temperature=1.0, seed=3)]
    monkeypatch.setattr(runtime, "chunk", lambda: 4)
    jax.clear_caches()
    np.testing.assert_array_equal(uniql_jax.generate_tokens(model, prompts, max_new_tokens=new, eos_ids=()), want)
    again = uniql_jax.generate_tokens(model, prompts, max_new_tokens=new, eos_ids=(stop,))
    np.testing.assert_array_equal(again, ended)
    assert [int(token[0]) for token in uniql_jax.generate(model, prompts[1], max_new_tokens=new)] == streamed
    settings = dict(max_new_tokens=new, temperature=1.0, seed=3)
    assert [int(token[0]) for token in uniql_jax.generate(model, prompts[1], **settings)] == drawn
    jax.clear_caches()
