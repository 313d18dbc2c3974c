"""Sampling, streaming and batched generation, and the command."""

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
from hypothesis import given
from hypothesis import strategies as st

import uniql_jax
from tests import tiny
from uniql_jax.commands import cli
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime import generation as runtime
from uniql_jax.runtime import sampling

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


# ------------------------------------------------------------------------------------------------ sampling


FILTERED = jax.jit(runtime.filtered_logits)


def kept_set(logits: np.ndarray, **settings: float) -> set[int]:
    found = FILTERED(
        jnp.asarray(logits)[None], 1.0, top_p=float(settings.get("top_p", 1)), top_k=settings.get("top_k", 0)
    )
    return set(np.flatnonzero(np.isfinite(np.asarray(found)[0])).tolist())


@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set(seed: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 3
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum()
    kept = kept_set(logits, top_p=top_p)
    mass = chances[list(kept)].sum()
    least = chances[list(kept)].min()
    assert mass >= top_p - 1e-5
    assert len(kept) == 1 or mass - least < top_p + 1e-5
    assert least >= max(np.delete(chances, list(kept)), default=0)


def by_sorting(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float64 from logits over temperature on: which tokens stay, and how near to top_p each one's
    share before it is.
    """
    x = logits / np.float32(temperature)
    order = np.argsort(-x, kind="stable")
    chances = np.exp((x[order] - x.max()).astype(np.float64))
    if top_k:
        chances[top_k:] = 0
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    kept = (np.arange(len(x)) < (top_k or len(x))) & ((before < top_p) | (np.arange(len(x)) == 0) | (top_p >= 1))
    found, near = np.zeros(len(x), bool), np.zeros(len(x))
    found[order], near[order] = kept, np.abs(before - top_p)
    return found, near


@pytest.mark.parametrize("digit", [1, 8])
@pytest.mark.parametrize("kind", ["spread", "ties", "few values", "huge", "flat"])
def test_thresholds_are_what_sorting_finds(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, digit: int, kind: str
) -> None:
    """Every row has its own settings; what is equal stays by its id; only shares within rounding may differ."""
    monkeypatch.setitem(sampling.DIGIT, jax.default_backend(), digit)
    rows, size = 40, 333
    x = rng.standard_normal((rows, size)) * 4
    x = {"spread": x, "ties": np.round(x), "few values": np.sign(np.round(x / 4)), "huge": x * 1e30, "flat": 0 * x}[
        kind
    ]
    x = x.astype(np.float32) * rng.choice(np.asarray([-1, 1], np.float32), (rows, 1))  # zeros of both signs
    temperature = rng.uniform(0.3, 2, rows).astype(np.float32)
    top_p = rng.choice([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6], rows).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 7, 100, size - 1, size, 10**6], rows).astype(np.int32)
    found = np.asarray(jax.jit(lambda *a: runtime.filtered_logits(*a))(x, temperature, top_p, top_k))
    for i in range(rows):
        want, near = by_sorting(x[i], float(temperature[i]), float(top_p[i]), int(min(top_k[i], size)))
        differ = np.isfinite(found[i]) != want
        assert (near[differ] < 1e-6).all()
        np.testing.assert_allclose(found[i][want & ~differ], (x[i] / temperature[i])[want & ~differ], rtol=1e-6)


def test_nothing_is_sorted() -> None:
    text = str(jax.make_jaxpr(runtime.sample)(jnp.zeros((2, 50)), jax.random.key(0), 1.0, 0.9, 5))
    assert "sort" not in text
    assert "top_k" not in text


def test_each_row_may_have_its_own_key(rng: np.random.Generator) -> None:
    logits, keys = jnp.asarray(rng.standard_normal((3, 40)), jnp.float32), jax.random.split(jax.random.key(4), 3)
    temperature = jnp.asarray([0.0, 1.0, 2.0])
    together = runtime.sample(logits, keys, temperature, 0.9, 0)
    alone = [int(runtime.sample(logits[i : i + 1], keys[i], temperature[i], 0.9, 0)[0]) for i in range(3)]
    assert together.tolist() == alone
    assert alone[0] == int(jnp.argmax(logits[0]))


def test_filters_at_their_ends(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(3000).astype(np.float32) * 9
    likely = np.argsort(-logits)
    assert kept_set(logits) == set(range(3000))
    assert kept_set(logits, top_p=1) == set(range(3000))
    assert kept_set(logits, top_p=1e-6) == {int(likely[0])}
    assert kept_set(logits, top_k=1) == {int(likely[0])}
    assert kept_set(logits, top_k=7) == set(likely[:7].tolist())
    assert kept_set(logits, top_k=5000) == set(range(3000))
    assert kept_set(logits, top_k=7, top_p=0.5) <= set(likely[:7].tolist())
    assert len(kept_set(np.zeros(10, np.float32), top_p=0.45)) == 5


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], np.float32))
    assert kept_set(logits, top_p=0.55) == {0, 1}
    assert kept_set(logits, top_k=2, top_p=0.55) == {0}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.8, 0.8, 0), (1.0, 1.0, 4), (1.3, 0.9, 6)]
)
def test_draws_have_the_right_chances(
    temperature: float, top_p: float, top_k: int, rng: np.random.Generator, seed: int
) -> None:
    """Chi-square of 20000 draws against chances computed in numpy: outside 1 in a million means wrong."""
    logits = rng.standard_normal(12).astype(np.float32) * 1.5
    chances = np.exp(logits.astype(np.float64) / temperature)
    if top_k:
        chances[np.argsort(-logits)[top_k:]] = 0
    chances /= chances.sum()
    order = np.argsort(-chances)
    before = np.cumsum(chances[order]) - chances[order]
    if top_p < 1:
        chances[order[before >= top_p]] = 0
    chances /= chances.sum()
    draws = 20_000
    found = runtime.sample(
        jnp.tile(jnp.asarray(logits), (draws, 1)), jax.random.key(seed), temperature, top_p=top_p, top_k=top_k
    )
    counts = np.bincount(np.asarray(found), minlength=12)
    assert (counts[chances == 0] == 0).all()
    expected = chances[chances > 0] * draws
    statistic = ((counts[chances > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 7 * np.sqrt(2 * freedom) + 10


def test_temperature_0_is_the_likeliest(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.standard_normal((5, 40)), jnp.float32)
    found = runtime.sample(logits, jax.random.key(0), 0.0, top_p=0.3)
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))
    assert found.dtype == jnp.int32


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


def command(*argv: object) -> int:
    from uniql_jax.commands.generate import main

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [str(a) for a in argv])
    assert isinstance(stop.value.code, int)
    return stop.value.code


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
