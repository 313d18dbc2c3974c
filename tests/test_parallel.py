"""A model on 2, 4 or 8 virtual devices answers as on one, at every prune rate, and each reads its own part."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from tests import compressed, published, tiny, virtual_devices
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.checkpoint_leaves import assembled
from uniql_jax.commands import benchmark, evaluate, generate
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.plan import axis_layout, grouping, make_plan
from uniql_jax.runtime.loading import load, split_for
from uniql_jax.weights.parts import part_of
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray, from_codes
from uniql_jax.weights.split import AXIS, SPLIT, Split, split_dim, split_of

RUN = """
import json, sys, jax, jax.numpy as jnp, numpy as np
from uniql_jax import load, prune
from uniql_jax.evaluation.likelihood import masks, token_nll
from uniql_jax.runtime.generation import generate_tokens

found, cases = {}, json.loads(sys.argv[1])
rng = np.random.default_rng(0)
tokens = jnp.asarray(rng.integers(3, 256, (2, 24)).astype(np.int32))
real = jnp.ones(tokens.shape, jnp.int32).at[1, :5].set(0)

def far(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())

for name, (folder, rate, devices, thorough) in cases.items():
    one, many = load(folder, rate), load(folder, rate, devices=devices)
    new = [generate_tokens(model, tokens, real, 8, eos_ids=()).tolist() for model in (one, many)]
    keep = masks(one.plan, 0.25)  # of no device as it is loaded
    found[name] = {"new": new, "masked": far(*(token_nll(model, tokens, 16, keep)[0] for model in (many, one)))}
    if thorough:
        found[name]["far"] = far(many(tokens, real), one(tokens, real))
        found[name]["cut"] = far(*(prune(model, 0.35)(tokens) for model in (many, one)))
    jax.clear_caches()
print(json.dumps(found))
"""


def on_eight_devices(program: str, *arguments: str) -> Any:
    """What a program on eight virtual devices prints, which is JSON."""
    return json.loads(virtual_devices.run(program, 8, *arguments).splitlines()[-1])


def check(cases: dict[str, tuple[str, float, int, bool]]) -> None:
    """Tokens equal, all else within float32 rounding."""
    for name, found in on_eight_devices(RUN, json.dumps(cases)).items():
        first, second = found.pop("new")
        assert first == second, name
        assert all(value < 1e-5 for value in found.values()), (name, found)


def test_eight_devices_answer_as_one(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Attention, mixers and plain MLPs of 4 bits; fewer keys and values, and groups of B and C, than devices."""
    folder = compressed.made(tmp_path_factory, seed).checkpoint("nemotron_h", CompressionSettings())
    check({"hybrid": (str(folder), 0.15, 8, False)})


@pytest.mark.slow
@pytest.mark.parametrize("family", compressed.FAMILIES)
def test_every_family_answers_alike(family: str, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    made = compressed.made(tmp_path_factory, seed)
    folders = {
        "4": made.checkpoint(family, CompressionSettings()),
        "8, portable": made.checkpoint(family, CompressionSettings(bits=8, groups="portable")),
        "dense": made.checkpoint(family, CompressionSettings(bits=32)),
    }
    cases = {
        f"{name}, {rate}, {devices}": (str(folder), rate, devices, True)
        for name, folder in folders.items()
        for rate, devices in ((0.0, 2), (0.15, 4), (0.25, 8), (0.25, 3))
    }
    check(cases)


def split_among(devices: int, config: ModelConfig, portable: bool = False, bits: int = 4) -> Split:
    """Who has what; no device is needed for that."""
    meta = grouping(config, portable) if bits < 16 else {}
    unit = axis_layout(config, "ffn").unit
    return split_of(config, AbstractMesh((devices,), (AXIS,)), meta.get("groups", {}), meta.get("runs", {}), unit)


CONFIGS = {
    # grouped heads; nine heads that share three; SSM heads of one group, and of several
    "llama": published.shrink(published.LLAMA_3_1_8B),
    "smollm2": published.SMOLLM2_135M,
    "bamba": published.shrink_ssm(published.BAMBA_9B_V2),
    "mamba2": published.shrink_ssm(published.MAMBA2_8B),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("devices", [2, 3, 4, 8, 16])
def test_every_entry_is_on_one_device(name: str, devices: int) -> None:
    """Copies are of what several devices' heads share, keys and values or B and C, and of nothing else."""
    config = model_config.from_hf(CONFIGS[name])
    split, full = split_among(devices, config), elastic.sizes(config)
    for dim in SPLIT:
        size = full[dim] * 2 // 3 // 8 * 8 if dim == "ffn" else full[dim]
        if not size:
            continue
        parts = [split.index(dim, device, size) for device in range(devices)]
        assert len({len(part) for part in parts}) == 1, "all parts are of one size"
        found = np.concatenate(parts)
        found = found[found >= 0]
        copies = split.sharing(dim) if dim in ("kv_head", "mamba_group") else 1
        np.testing.assert_array_equal(np.sort(found), np.repeat(np.arange(size), copies))
        if dim == "ffn":
            assert [int(split.kept(size, i)) for i in range(devices)] == [(part >= 0).sum() for part in parts]
    for heads, groups in (("head", "kv_head"), ("mamba_head", "mamba_group")):
        for device in range(devices if full[groups] else 0):
            own, shared = (split.index(dim, device, full[dim]) for dim in (heads, groups))
            own = own.reshape(len(shared), -1)
            there = own >= 0
            whole = full[heads] // full[groups]
            np.testing.assert_array_equal((own // whole)[there], np.broadcast_to(shared[:, None], own.shape)[there])


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("bits", "devices"), [(4, 2), (4, 4), (4, 8), (4, 16), (8, 3)])
@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_a_part_of_packed_integers_is_that_part_of_the_weight(
    name: str, bits: int, devices: int, portable: bool, rng: np.random.Generator
) -> None:
    """Bit for bit, also where a word holds entries of two devices, and at a pruned size."""
    config = model_config.from_hf(CONFIGS[name])
    split = split_among(devices, config, portable, bits)
    meta = grouping(config, portable) | {"bits": bits}
    keep = make_plan(config, None, portable=portable).keep(0.25)[-1]
    seen = set()
    for kind in ("attention", "mlp", "mamba2"):
        for leaf in elastic.leaves(config, kind).values() if config.ssm or kind != "mamba2" else ():
            if leaf.contract is None or leaf in seen or leaf.dims[0] not in {"ffn", "mamba_head", *keep}:
                continue
            seen.add(leaf)
            weight = random_weight(config, meta, leaf, keep, rng)
            whole = np.asarray(dense(weight))
            for device in range(devices):
                part = part_of(leaf, weight, split, device)
                assert isinstance(part, QuantizedArray)
                np.testing.assert_array_equal(dense(part), part_of(leaf, whole, split, device))
    assert len(seen) > 3


def random_weight(
    config: ModelConfig, meta: dict[str, Any], leaf: elastic.Leaf, keep: dict[str, int], rng: np.random.Generator
) -> QuantizedArray:
    """Random integers and scales, as a checkpoint holds them, in numpy."""
    shape, last = elastic.shape(config, leaf, keep), leaf.contract == "last"
    group = meta["groups"]["embed" if last else leaf.dims[0]]
    run = 1 if last else meta.get("runs", {}).get(leaf.dims[0], 1)
    width = shape[-1] if last else int(np.prod(shape[:-1]))
    rows, inner = int(np.prod(shape)) // width, int(np.prod(shape[1:-1]))
    groups = -(-shape[0] // group) * inner if run > 1 else -(-width // group)
    codes = rng.integers(-7, 8, (rows, width)).astype(np.int32)
    scale = rng.uniform(0.5, 2, (rows, groups)).astype(np.float32)
    made = from_codes(
        jax.numpy.asarray(codes), jax.numpy.asarray(scale),
        bits=meta["bits"], group=group, contract=str(leaf.contract), shape=shape, run=run,
    )  # fmt: skip
    parts = {"data": np.asarray(made.data), "scale": np.asarray(made.scale)}
    return assembled(config, meta, leaf, parts, keep)


def test_a_device_reads_its_own_bytes(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Of what is shared out a half each, and nothing twice; of norms and the like all."""
    made = compressed.made(tmp_path_factory, seed)
    folder = made.checkpoint("nemotron_h", CompressionSettings())
    checkpoint = open_checkpoint(folder)
    split = split_for(checkpoint.config, 1, checkpoint.meta)
    assert split is None, "one device has all"
    split = split_among(2, checkpoint.config)
    for rate in (0.0, 0.35):
        for i, keep in enumerate(checkpoint.keep(rate)):
            for kind, block in checkpoint.layer(i, keep, lazy=True).items():
                for name, value in block.items():
                    leaf = elastic.BLOCKS[kind][name]
                    before, total = checkpoint.bytes_read, value.nbytes
                    read = []
                    for device in (0, 1):
                        part_of(leaf, value, split, device)
                        read.append(checkpoint.bytes_read - before)
                        before = checkpoint.bytes_read
                    if split_dim(leaf) is None:
                        assert read == [total, total]
                    elif leaf.dims[0] == "ffn":  # to a unit
                        assert sum(read) == total
                    elif leaf.contract != "first":  # there, a word holds heads of both devices in a model this small
                        assert read == [total // 2, total // 2], (kind, name)


def test_the_host_holds_less_than_two_layers_while_it_loads(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays of numpy that live whenever something is put on a device, which gets copies here.

    JAX gives back what it transfers when its threads come to it: only what the loader itself holds is counted.
    """
    config = tiny.HF | {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 64}
    folder = tiny.packed(tmp_path / "model", config, 4, rng)
    sizes = open_checkpoint(folder).tensor_bytes()
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    put, held = jax.device_put, []
    ours = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain), tracemalloc.Filter(False, __file__)]

    def watched(value: Any, *place: Any) -> Any:
        held.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces))
        return put(np.array(value), *place, may_alias=False)

    monkeypatch.setattr(jax, "device_put", watched)
    tracemalloc.start()
    try:
        load(folder, devices=Mesh(np.asarray(jax.devices()[:1]), ("all",)))
    finally:
        tracemalloc.stop()
    assert len(held) > 6 * 7
    assert sum(sizes.values()) > 6 * layer
    assert 0 < max(held) < layer


def test_more_devices_than_there_are(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = compressed.made(tmp_path_factory, seed).checkpoint("nemotron_h", CompressionSettings())
    with pytest.raises(UserError, match="among 4096 devices: JAX sees"):
        load(folder, devices=4096)
    common = ["--ckpt", str(folder), "--devices", "4096"]
    for command, more in (
        (generate, ["--prompt", "x"]),
        (evaluate, ["--text", "nothing.txt"]),
        (benchmark, ["--size"]),
    ):
        with pytest.raises(UserError, match="among 4096 devices: JAX sees"):
            command.main([*common, *more])
