"""The five exact properties that everything else stands on, for every family: lossless sorting, masked = sliced,
quantized then pruned = pruned then quantized, export = model, nested rates."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import compressed, reference
from tests.compressed import FAMILIES, RATES, Made
from uniql_jax import elastic
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert import to_hf
from uniql_jax.model.causal_lm import CausalLM, hidden_states, logits
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

DENSE, FULL = CompressionSettings(bits=32), CompressionSettings(bits=4)
# GPTQ and scale search choose integers, which no property here depends on: one family pays for compiling them.
PACKED = dataclasses.replace(FULL, rounding="nearest", scale_search=False)
HALF = CompressionSettings(bits=16)
BYTES = dataclasses.replace(PACKED, bits=8)
KINDS = pytest.mark.parametrize("packed", [False, True], ids=["32 bits", "4 bits"])
EVERY = pytest.mark.parametrize("family", sorted(FAMILIES))
# Biases and a tied head of a state-space model are in what it computes and in what is exported, nowhere else; so are
# the scales of granite and what phi3 packs into one tensor; mistral has the blocks of llama, smollm3 without RoPE here
# and there, and granitemoehybrid those of bamba.
SPARED = ("mamba2-tied-biased", "granite", "granitemoehybrid", "mistral", "phi3", "smollm3")
FAMILY = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SPARED else name for name in sorted(FAMILIES)]
)
SLOW = pytest.mark.slow


def _product(*chosen: tuple[bool, tuple[float, ...]]) -> pytest.MarkDecorator:
    """A family meets every way of storing, each rate in one of the two ways; all pairs when slow."""
    pairs = {(packed, rate) for packed, rates in chosen for rate in rates}
    every = sorted({*RATES, *(rate for _, rate in pairs)})
    others = [(packed, tuple(rate for rate in every if (packed, rate) not in pairs)) for packed in (False, True)]
    names = {False: "32 bits", True: "4 bits"}
    cases = [pytest.param(*case, id=f"{names[case[0]]} {case[1]}") for case in chosen]
    cases += [pytest.param(*case, id=f"{names[case[0]]} {case[1]}", marks=SLOW) for case in others]
    return pytest.mark.parametrize(("packed", "rates"), cases)


BATCH, LENGTH = 2, 40  # one shape for all, so that a model at a rate compiles once


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Made:
    return compressed.made(tmp_path_factory, seed)


@functools.cache
def _load(folder: Path, rate: float = 0.0) -> CausalLM:
    return uniql_jax.load(folder, rate, dtype=jnp.float32)


@functools.cache
def _jitted() -> dict[str, Any]:
    def masked(model: CausalLM, tokens: jax.Array, keep: tuple[elastic.Keep, ...]) -> jax.Array:
        return logits(model, hidden_states(model, tokens, keep=keep))

    return {
        "call": jax.jit(lambda model, tokens: model(tokens)),
        "masked": jax.jit(masked),
        "forward": jax.jit(uniql_jax.forward, static_argnames="prune_rate"),
        "prefill": jax.jit(prefill),
        "decode": jax.jit(decode),
    }


def _logits(model: CausalLM, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_jitted()["call"](model, tokens))


def _tokens(rng: np.random.Generator) -> np.ndarray:
    return compressed.tokens(rng, BATCH, LENGTH)


@functools.cache
def _dense(folder: Path, rate: float = 0.0) -> CausalLM:
    """The checkpoint with dense weights, so that 4 and 32 bits share programs.

    Dequantizing comes before slicing here; that the order does not matter is tested below.
    """
    return uniql_jax.prune(_unpacked(_load(folder)), rate)


def _unpacked(model: CausalLM) -> CausalLM:
    params = jax.tree.map(dense, model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    return CausalLM(model.config, params, model.plan, model.rate, None, model.dtype)


def _traced(keep: tuple[dict[str, int], ...]) -> tuple[elastic.Keep, ...]:
    return tuple({axis: jnp.int32(count) for axis, count in layer.items()} for layer in keep)


def _options(family: str, packed: bool) -> CompressionSettings:
    return DENSE if not packed else FULL if family == "llama-grouped-tied" else PACKED


# ------------------------------------------------------------------------------- 1. sorting is lossless


@EVERY
def test_sorted_at_rate_0_is_the_original(family: str, made: Made, rng: np.random.Generator) -> None:
    tokens = _tokens(rng)
    original = _logits(uniql_jax.load_source(str(made.source(family)), dtype=jnp.float32), tokens)
    error = reference.relative_error(_logits(_dense(made.checkpoint(family, DENSE)), tokens), original)
    assert error < 2e-5
    # and it was really sorted
    before = uniql_jax.load_source(str(made.source(family))).params["layers"]
    after = _load(made.checkpoint(family, DENSE)).params["layers"]
    moved = set()
    for ours, theirs in zip(after, before, strict=True):
        for kind, block in ours.items():
            for name, value in block.items():
                a, b, axis = np.asarray(value), np.asarray(theirs[kind][name]), elastic.BLOCKS[kind][name].axis
                if axis in (None, "vo"):
                    continue
                if not np.array_equal(a, b):
                    moved.add(axis)
                np.testing.assert_array_equal(np.sort(a, axis=0), np.sort(b, axis=0))  # a permutation
    config = open_checkpoint(made.checkpoint(family, DENSE)).config
    axes = {axis for kinds in config.pattern for axis in elastic.layer_axes(config, kinds)}
    assert moved == axes - {"vo"}


# ------------------------------------------------------------------------------- 2. masked = sliced


@_product((False, RATES[3:]), (True, RATES[1:2]))
@FAMILY
def test_masked_equals_sliced(
    family: str, packed: bool, rates: tuple[float, ...], made: Made, rng: np.random.Generator
) -> None:
    """Masks with traced sizes and prefixes give the same logits."""
    folder = made.checkpoint(family, _options(family, packed))
    full, plan = _dense(folder), open_checkpoint(folder).plan
    assert plan is not None
    tokens = _tokens(rng)
    whole, compiled = _logits(full, tokens), _jitted()["masked"]._cache_size()
    for rate in rates:
        sliced = _logits(_dense(folder, rate), tokens)
        assert reference.relative_error(sliced, whole) > 1e-3  # the cut is felt, so the test can fail
        masked = np.asarray(_jitted()["masked"](full, tokens, _traced(plan.keep(rate))))
        assert reference.relative_error(masked, sliced) < 1e-5
    assert _jitted()["masked"]._cache_size() <= compiled + 1  # one compilation serves all rates
    traced = np.asarray(_jitted()["forward"](full, tokens, prune_rate=rates[-1]))
    assert reference.relative_error(traced, sliced) < 1e-6


@FAMILY
def test_masked_equals_sliced_on_packed_weights(family: str, made: Made, rng: np.random.Generator) -> None:
    """The same where the products read integers, and dequantizing beforehand changes nothing."""
    folder = made.checkpoint(family, _options(family, True))
    full, small, plan = _load(folder), _load(folder, RATES[-1]), open_checkpoint(folder).plan
    assert plan is not None
    tokens = _tokens(rng)
    sliced = _logits(small, tokens)
    assert reference.relative_error(_logits(_unpacked(small), tokens), sliced) < 1e-5
    masked = np.asarray(_jitted()["masked"](full, tokens, _traced(plan.keep(RATES[-1]))))
    assert reference.relative_error(masked, sliced) < 1e-5
    if family == "qwen2":
        traced = np.asarray(_jitted()["forward"](full, tokens, prune_rate=RATES[-1]))
        assert reference.relative_error(traced, sliced) < 1e-6


@FAMILY
def test_every_sample_may_have_its_own_mask(family: str, made: Made, rng: np.random.Generator) -> None:
    folder = made.checkpoint(family, DENSE)
    plan = open_checkpoint(folder).plan
    assert plan is not None
    rates = (0.15, 0.35)
    tokens = _tokens(rng)
    layers = zip(*(plan.keep(rate) for rate in rates), strict=True)
    keep = tuple({axis: jnp.asarray([k[axis] for k in kept]) for axis in kept[0]} for kept in layers)
    masked = np.asarray(_jitted()["masked"](_dense(folder), tokens, keep))
    for row, rate in enumerate(rates):
        assert reference.relative_error(masked[row], _logits(_dense(folder, rate), tokens)[row]) < 1e-5


# ------------------------------------------------------------------------------- 3. prune and quantize commute


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama-grouped-tied", FULL), ("llama-biased", PACKED), ("qwen2", PACKED), ("qwen2", BYTES), ("qwen2", DENSE)],
    ids=["llama 4 bits", "biased 4 bits", "qwen2 4 bits", "qwen2 8 bits", "qwen2 32 bits"],
)
def test_a_prefix_on_disk_is_a_prefix_in_memory(family: str, options: CompressionSettings, made: Made) -> None:
    """Bytes from disk at a rate = bytes sliced in memory, and dequantizing commutes with slicing, bit for bit."""
    folder = made.checkpoint(family, options)
    full = _load(folder)
    count = 0
    for rate in (0.0, *RATES):
        small, pruned = _load(folder, rate), uniql_jax.prune(full, rate)
        assert small.keep == pruned.keep == open_checkpoint(folder).keep(rate)
        assert jax.tree.structure(small.params) == jax.tree.structure(pruned.params)
        for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(pruned.params), strict=True):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for i, layer in enumerate(small.params["layers"]):
            for kind, block in layer.items():
                for name, value in block.items():
                    whole = full.params["layers"][i][kind][name]
                    assert value.shape == elastic.shape(small.config, elastic.BLOCKS[kind][name], small.keep[i])
                    if isinstance(value, QuantizedArray):
                        count += 1
                        cut = np.asarray(whole.dense())[: value.shape[0]]
                        np.testing.assert_array_equal(np.asarray(value.dense()), cut)
    config = full.config
    blocks = [elastic.leaves(config, kind) for kinds in config.pattern for kind in kinds]
    matrices = sum(leaf.contract is not None for block in blocks for leaf in block.values())
    assert count == (matrices * (1 + len(RATES)) if options.packed else 0)


@FAMILY
def test_cuts_never_split_a_group(family: str, made: Made) -> None:
    """Exported or not, a scale belongs to whole groups at every rate there is."""
    checkpoint = open_checkpoint(made.checkpoint(family, _options(family, True)))
    plan, config = checkpoint.plan, checkpoint.config
    assert plan is not None
    inner = {"ffn": 1, "vo": config.heads, "ssm_head": elastic.sizes(config)["mamba_head"]}
    for rate in np.linspace(0, 0.35, 71):
        for kept in plan.keep(float(rate)):
            for axis, size in kept.items():
                assert 0 < size <= plan.sizes[axis]
                if axis in inner and size < plan.sizes[axis]:
                    assert size * inner[axis] % checkpoint.meta["groups"][axis] == 0


@KINDS
def test_only_kept_bytes_are_read(packed: bool, made: Made) -> None:
    folder = made.checkpoint("llama-biased", _options("llama-biased", packed))
    sizes = []
    for rate in (0.0, *RATES):
        checkpoint = open_checkpoint(folder)
        assert checkpoint.bytes_read == 0
        checkpoint.top()
        for i, keep in enumerate(checkpoint.keep(rate)):
            checkpoint.layer(i, keep)
        assert checkpoint.bytes_read == checkpoint.weight_bytes(rate)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(_load(folder, rate).params))
        assert held == checkpoint.weight_bytes(rate)
        sizes.append(checkpoint.bytes_read)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


# ------------------------------------------------------------------------------- 4. export = model


@_product((False, (0.0, 0.15)), (True, (0.35,)))
@EVERY
def test_export_is_the_model(
    family: str, packed: bool, rates: tuple[float, ...], made: Made, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Stock transformers runs what we write, at any rate, and gives our logits."""
    folder = made.checkpoint(family, _options(family, packed))
    tokens = _tokens(rng)
    for rate in rates:
        out = tmp_path / f"hf-{rate}"
        to_hf.export(str(folder), str(out), rate, dtype="float32")
        theirs = reference.load(out)
        assert theirs.config.model_type == FAMILIES[family]["model_type"]
        assert sum(p.numel() for p in theirs.parameters()) > 0
        ours = _logits(_dense(folder, rate), tokens)
        error = reference.relative_error(reference.logits(theirs, tokens), ours)
        assert error < 1e-4
        original = reference.load(made.source(family)).state_dict()
        for name, gain in theirs.state_dict().items():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # of no pair is the gain lost, cut or not
                np.testing.assert_array_equal(gain, original[name])


# ------------------------------------------------------------------------------- 5. nested


@KINDS
@FAMILY
def test_a_higher_rate_keeps_a_prefix_of_a_lower_one(family: str, packed: bool, made: Made) -> None:
    folder = made.checkpoint(family, _options(family, packed))
    rates = (0.0, *RATES)
    for low, high in itertools.pairwise(rates):
        large, small = _load(folder, low), _load(folder, high)
        assert large.keep != small.keep
        for more, less in zip(large.params["layers"], small.params["layers"], strict=True):
            for a, b in zip(jax.tree.leaves(more), jax.tree.leaves(less), strict=True):
                if a.ndim:
                    np.testing.assert_array_equal(np.asarray(a)[: b.shape[0]], np.asarray(b))


def test_pruning_step_by_step_is_pruning_at_once(made: Made) -> None:
    full = _load(made.checkpoint("qwen2", PACKED))
    stepwise = full
    for rate in RATES:
        stepwise = uniql_jax.prune(stepwise, rate)
    at_once = uniql_jax.prune(full, RATES[-1])
    for a, b in zip(jax.tree.leaves(stepwise.params), jax.tree.leaves(at_once.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(uniql_jax.UserError, match=r"0\.35"):
        uniql_jax.prune(at_once, 0.1)


# ------------------------------------------------------------------------------- all of them at 16 bits


@SLOW
@EVERY
def test_the_same_holds_at_16_bits(family: str, made: Made, rng: np.random.Generator, tmp_path: Path) -> None:
    folder, tokens = made.checkpoint(family, HALF), _tokens(rng)
    full, plan = _load(folder), open_checkpoint(folder).plan
    assert plan is not None
    original = _logits(uniql_jax.load_source(str(made.source(family)), dtype=jnp.float32), tokens)
    assert reference.relative_error(_logits(_load(folder), tokens), original) < 0.03  # bfloat16 weights
    for rate in (0.0, 0.15, 0.35):
        small, pruned = _load(folder, rate), uniql_jax.prune(full, rate)
        for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(pruned.params), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        sliced = _logits(small, tokens)
        masked = np.asarray(_jitted()["masked"](full, tokens, _traced(plan.keep(rate))))
        assert reference.relative_error(masked, sliced) < 1e-5
        to_hf.export(str(folder), str(tmp_path / f"{rate}"), rate, dtype="float32")
        error = reference.relative_error(reference.logits(reference.load(tmp_path / f"{rate}"), tokens), sliced)
        assert error < 1e-4


# ------------------------------------------------------------------------------- and decoding


@pytest.mark.parametrize(
    ("family", "packed"),
    [(name, False) if name != "mistral" else pytest.param(name, False, marks=SLOW) for name in sorted(FAMILIES)]
    + [("qwen2", True)],
    ids=str,
)
def test_decoding_through_a_pruned_cache(family: str, packed: bool, made: Made, rng: np.random.Generator) -> None:
    """64 greedy tokens: the logits of every step are those of one full forward at that rate."""
    folder = made.checkpoint(family, _options(family, packed))
    model = _load(folder, 0.35)
    count = 64
    prompt = _tokens(rng)[:, :9]
    cache = init_cache(model, 2, prompt.shape[1] + count)
    scores, cache = _jitted()["prefill"](model, prompt, None, cache)
    steps, sequence = [scores], [prompt]
    for _ in range(count - 1):
        sequence.append(np.asarray(jnp.argmax(steps[-1], axis=-1).astype(jnp.int32))[:, None])
        scores, cache = _jitted()["decode"](model, sequence[-1][:, 0], cache)
        steps.append(scores)
    whole = _logits(_unpacked(model), np.concatenate(sequence, axis=1))
    found = np.stack([np.asarray(s) for s in steps], axis=1)
    assert reference.relative_error(found, whole[:, prompt.shape[1] - 1 :]) < 1e-5


@FAMILY
def test_the_cache_shrinks_with_the_rate(family: str, made: Made) -> None:
    folder = made.checkpoint(family, _options(family, True))
    batch, slots, sizes = 3, 20, []
    for rate in (0.0, *RATES):
        model = _load(folder, rate)
        full, numbers = elastic.sizes(model.config), 0
        for keep in model.keep:
            if "vo" in keep:
                width = full["pair"] * keep["qk"] + keep.get("qk_pass", 0) + keep["vo"]
                numbers += slots * width * full["kv_head"]
            if "ssm_head" in keep:
                channels = keep["ssm_head"] * full["mamba_head"]
                states = keep["ssm_state"] * full["mamba_group"]
                numbers += (full["conv"] - 1) * (channels + 2 * states) + channels * keep["ssm_state"]
        cache = init_cache(model, batch, slots)
        assert cache.nbytes == batch * numbers * 4
        sizes.append(cache.nbytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
