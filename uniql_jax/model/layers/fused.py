"""One new token per sequence through whole blocks of 4-bit weights, in two to five launches each.

Each function here does what a block's `read`, `cached_inner` and `write` do one after another, for kernels that take
norms, biases, activations and residual sums along. What a kernel cannot do, it answers with NotImplementedError while
it is traced, and the caller goes the long way for that block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import LayerCache, SsmCache
from uniql_jax.model.layers.attention import normed_heads
from uniql_jax.pallas_kernels import ahead, dispatch
from uniql_jax.pallas_kernels.ahead import Ahead, Budget
from uniql_jax.pallas_kernels.attention import decode_pallas
from uniql_jax.pallas_kernels.attention.decode import Place, Token
from uniql_jax.pallas_kernels.dequant_matmul import fused, tiling
from uniql_jax.pallas_kernels.dequant_matmul.fused import Job, Stream
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight
from uniql_jax.pallas_kernels.ssd import pallas as ssd
from uniql_jax.pallas_kernels.ssd.api import Kernels, Limits, Weights, Window
from uniql_jax.pallas_kernels.ssd.api import Token as SsmToken
from uniql_jax.weights.mixed import MixedArray
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.quantized import QuantizedArray

Leaves = Mapping[str, Any]
Operands = tuple[Array, ...]


class Step(NamedTuple):
    """What blocks must know about the new tokens: where they stand, and counts that the attention kernels hand on, zero
    in between.
    """

    place: Place
    done: Int[Array, "b g"]
    coming: Sequence[Ahead]
    """What each launch of the block pulls into the cache; see `coming`."""


def wanted() -> bool:
    """Whether decoding should try these kernels here: where "pallas" is the default for it."""
    return dispatch.default("decode") == "pallas"


def weights_of(leaf: Any) -> tuple[Weight, ...]:
    """The static halves of a leaf's entries of 4 bits and of those of 3, if it has both."""
    return (weight_of(leaf.whole), weight_of(leaf.rest)) if isinstance(leaf, MixedArray) else (weight_of(leaf),)


def weight_of(leaf: Any) -> Weight:
    """The static half of a packed leaf. Raises NotImplementedError for any other."""
    if not isinstance(leaf, QuantizedArray) or leaf.bits not in tiling.SHAPES:
        raise NotImplementedError("fused kernels take packed weights of 4 bits and of 3")
    if leaf.run > 1:
        raise NotImplementedError("fused kernels take groups that span all heads")
    last = leaf.contract == "last"
    groups = leaf.scale.shape[-1 if last else 0]
    if groups * leaf.group != leaf.width:
        raise NotImplementedError("fused kernels take whole groups")
    layout = leaf.contract if leaf.layout == "plain" else leaf.layout
    features = math.prod(leaf.scale.shape[:-1]) if last else leaf.scale.shape[-1]
    return Weight(layout, features, groups, leaf.group, leaf.bits)


def operands_of(leaf: QuantizedArray | MixedArray, bias: Array | None = None) -> Operands:
    """Data, scale and, if there is one, bias of a packed leaf, as the kernels want them."""
    if isinstance(leaf, MixedArray):
        return operands_of(leaf.whole) + operands_of(leaf.rest, bias)
    data = leaf.data
    if leaf.layout == "plain" and leaf.contract == "last":
        data = data.reshape(-1, data.shape[-1])
    scale = leaf.scale.reshape(-1, leaf.scale.shape[-1]) if leaf.contract == "last" else leaf.scale
    return (data, scale) if bias is None else (data, scale, bias.reshape(-1))


def _read(
    config: ModelConfig, leaves: Leaves, stream: Stream, names: dict[str, str | None], coming: Ahead
) -> tuple[dict[str, Float[Array, "b rows"]], Stream]:
    """Products of the normed stream with several leaves, in one launch; names: leaf -> its bias, if it has one."""
    jobs = [job_of([leaves[name]], biased=bias in leaves) for name, bias in names.items()]
    operands = [[operands_of(leaves[name], leaves.get(bias) if bias else None)] for name, bias in names.items()]
    stream = prepared(stream, leaves["norm"])
    found, stream = fused.read(stream, jobs, operands, eps=config.norm_eps, coming=coming)
    return dict(zip(names, found, strict=True)), stream


def job_of(leaves: Sequence[Any], **options: Any) -> Job:
    """A product with a leaf, or with two that go row next to row."""
    every = [weights_of(leaf) for leaf in leaves]
    if len(set(every)) > 1:
        raise NotImplementedError("what goes row next to row is of one size, and of as many bits in each row")
    weights, *rest = zip(*every, strict=True)
    return Job(weights, rest=rest[0] if rest else (), **options)


def prepared(stream: Stream, norm: Float[Array, " h"]) -> Stream:
    """The stream, ready for the norm that reads it next."""
    return fused.prepare(stream.x, norm) if stream.squares is None else stream


def _write(leaves: Leaves, name: str, hidden: Array, stream: Stream, norm: Float[Array, " h"], coming: Ahead) -> Stream:
    """Back to the stream."""
    leaf = leaves[name]
    operands = operands_of(leaf, leaves.get(f"{name}_bias"))
    return fused.write(hidden, weights_of(leaf), operands, stream, norm, coming=coming)


def _blocked(leaf: Any, batch: int) -> bool:
    """Whether what a leaf reads should be laid out in blocks."""
    return batch > 1 and weights_of(leaf)[0].group == tiling.GROUP


def mlp(
    config: ModelConfig, leaves: Leaves, stream: Stream, norm: Float[Array, " h"], step: Step, state: None
) -> tuple[Stream, None, Step]:
    """Gate and up with their activation, then down: two launches."""
    names = ("gate", "up") if "gate" in leaves else ("up",)
    options = dict(biased=f"{names[0]}_bias" in leaves, blocked=_blocked(leaves["down"], stream.x.shape[0]))
    job = job_of([leaves[name] for name in names], activation=config.activation, **options)
    operands = [operands_of(leaves[name], leaves.get(f"{name}_bias")) for name in names]
    stream, coming = prepared(stream, leaves["norm"]), step.coming
    [hidden], stream = fused.read(stream, [job], [operands], eps=config.norm_eps, coming=coming[0])
    return _write(leaves, "down", hidden, stream, norm, coming[1]), None, step


def attention(
    config: ModelConfig, leaves: Leaves, stream: Stream, norm: Float[Array, " h"], step: Step, state: LayerCache
) -> tuple[Stream, LayerCache, Step]:
    """Queries, keys and values; rotation, cache and attention; output: three launches, and norms of heads between."""
    names: dict[str, str | None] = {"q": "q_bias", "k": "k_bias", "v": None}
    if "q_pass" in leaves:
        names |= {"q_pass": "q_pass_bias", "k_pass": "k_pass_bias"}
    batch = stream.x.shape[0]
    found, stream = _read(config, leaves, stream, names, step.coming[0])
    found = {name: value.reshape(batch, *leaves[name].shape[:-1]) for name, value in found.items()}
    q, k = normed_heads(config, leaves, found["q"][:, None], found["k"][:, None])
    found |= {"q": q[:, 0], "k": k[:, 0]}
    hidden, caches, done = decode_pallas.attend(
        Token(**found),
        state.caches,
        leaves.get("inv_freq"),
        step.place,
        step.done,
        scale=config.softmax_scale,
        blocked=_blocked(leaves["o"], batch),
        coming=step.coming[1],
    )
    stream = _write(leaves, "o", hidden, stream, norm, step.coming[2])
    return stream, LayerCache(*caches), step._replace(done=done)


def mamba2(
    config: ModelConfig, leaves: Leaves, stream: Stream, norm: Float[Array, " h"], step: Step, state: SsmCache
) -> tuple[Stream, SsmCache, Step]:
    """Projections; convolutions, state, gate; norm; output: four launches."""
    ssm, batch = config.ssm, stream.x.shape[0]
    assert ssm is not None
    names = {name: "dt_proj_bias" if name == "dt" else f"{name}_bias" for name in ("z", "x", "b", "c", "dt")}
    found, stream = _read(config, leaves, stream, dict(names), step.coming[0])
    found = {name: value.reshape(batch, *leaves[name].shape[:-1]) for name, value in found.items()}
    kernels = Kernels(*(leaves[f"conv_{name}"] for name in "xbc"), *(leaves.get(f"conv_{name}_bias") for name in "xbc"))
    weights = Weights(kernels, *(leaves[name] for name in ("dt_bias", "a_log", "d", "gate_norm")))
    hidden, window = ssd.mix(
        SsmToken(**found),
        weights,
        Window(state.x, state.b, state.c, state.state),
        Limits(ssm.dt_min, ssm.dt_max, config.gate_norm_eps, ssm.group_width),
        blocked=_blocked(leaves["out"], batch),
        coming=step.coming[1],
    )
    return _write(leaves, "out", hidden, stream, norm, step.coming[2]), SsmCache(**window._asdict()), step


KINDS: dict[str, Callable[..., tuple[Stream, Any, Step]]] = {"attention": attention, "mlp": mlp, "mamba2": mamba2}
"""Block kind -> its step, (config, leaves, stream, next norm, step, state) -> (stream, state, step)."""


def head(config: ModelConfig, table: Any, norm: Float[Array, " h"] | None, stream: Stream) -> Float[Array, "b vocab"]:
    """Logits of the stream under `norm`, or as it is. Raises NotImplementedError for a table that is not packed."""
    stream = stream if norm is None else prepared(stream, norm)
    [out], _ = fused.read(stream, [job_of([table])], [[operands_of(table)]], eps=config.norm_eps)
    return out


def first_step(batch: int, place: Place, config: ModelConfig) -> Step:
    """What the blocks need, made once a token."""
    return Step(place, decode_pallas.counters(batch, max(1, config.kv_heads)), ())


LAUNCHES: dict[str, list[tuple[str, ...]]] = {
    "attention": [("q", "k", "v", "q_pass", "k_pass"), (), ("o",)],
    "mlp": [("gate", "up"), ("down",)],
    "mamba2": [("z", "x", "b", "c", "dt"), (), ("out",)],
}
"""Block kind -> the leaves that each of its launches reads."""
READ = Budget(4 << 20)
INNER = Budget(8 << 20, early=True)
WRITE = Budget(4 << 20)


def coming(
    params: Mapping[str, Any], places: Sequence[tuple[int, str]], head: Any
) -> dict[tuple[int, str], list[Ahead]]:
    """For every block, (layer, kind), what each of its launches pulls into the cache: nothing where launches cannot."""
    if not ahead.available():
        return {(i, kind): [ahead.NOTHING] * len(LAUNCHES[kind]) for i, kind in places}
    launches: list[list[Array]] = []
    budgets: list[Budget] = []
    for i, kind in places:
        leaves = params["layers"][i][kind]
        for number, names in enumerate(LAUNCHES[kind]):
            launches.append([part for name in names if name in leaves for part in _stored(leaves[name])])
            last = number == len(LAUNCHES[kind]) - 1
            budgets.append(WRITE if last else READ if number == 0 else INNER)
    plans = iter(ahead.plan([*launches, _stored(head)], budgets))
    return {(i, kind): [next(plans) for _ in LAUNCHES[kind]] for i, kind in places}


def _stored(leaf: Any) -> list[Array]:
    """The bytes of a leaf that count."""
    if isinstance(leaf, MixedArray):
        return _stored(leaf.whole) + _stored(leaf.rest)
    if isinstance(leaf, NestedArray):
        return [leaf.leading]
    return [leaf.data if isinstance(leaf, QuantizedArray) else leaf]
