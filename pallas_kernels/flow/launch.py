"""Blocks of a Llama or of Mamba2 for one token, each in one launch whose phases wait for each other.

The functions say what `fused.read`, an inner kernel and `fused.write` say one after another, and refuse what these
refuse; they take one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import blocks, compat
from pallas_kernels.ahead import NOTHING, Ahead
from pallas_kernels.attention import decode_pallas
from pallas_kernels.attention.decode import Caches, Place
from pallas_kernels.compat import pl
from pallas_kernels.dequant_matmul import fused
from pallas_kernels.dequant_matmul.fused import Job, Stream
from pallas_kernels.dequant_matmul.fused_kernels import Norm, programs_of, read_phase, write_phase
from pallas_kernels.dequant_matmul.mma import Settings, row_tiles
from pallas_kernels.dequant_matmul.tiling import Weight
from pallas_kernels.flow import order
from pallas_kernels.flow.order import Order

WARPS = 8
"""Of every program: phases of one launch have as many."""
Operands = Sequence[Array]
Refs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the phases are cut: warps that share a row tile's contraction while reading wide and narrow outputs and while
    writing, groups a warp of these loads at a time, and attention's tile and programs.
    """

    wide: int = 4
    narrow: int = WARPS
    writing: int = WARPS
    batch: int = 1
    tile: int = 64
    attending: int = 128

    def read(self, jobs: Sequence[Job]) -> Settings:
        """For the first phase."""
        groups, programs = jobs[0].weights[0].groups, sum(row_tiles(job.weights[0]) for job in jobs)
        along_k = min(self.wide if programs > 512 else self.narrow, fused.tuned_power(groups))
        return Settings(gate=True, along_k=along_k, along_n=WARPS // along_k, stream=programs > 512)

    def write(self, weight: Weight) -> Settings:
        """For the last phase."""
        along_k = min(self.writing, fused.tuned_power(weight.groups))
        batch = self.batch if weight.groups >= self.batch * along_k else 1
        return Settings(gate=True, along_k=along_k, along_n=WARPS // along_k, batch=batch, stream=batch > 1)

    def attend(self, groups: int, slots: int) -> decode_pallas.Settings:
        """None without a tile."""
        split = min(self.attending // groups, pl.cdiv(slots, self.tile), 32)
        return decode_pallas.Settings(self.tile, max(1, split), WARPS)


CUT = Cut()
"""The fastest of those that were timed on an H100."""


def supported(stream: Stream, weights: Sequence[Weight], last: Weight) -> None:
    """Raise NotImplementedError for what these launches cannot do."""
    if stream.x.shape[0] != 1:
        raise NotImplementedError("launches of several phases take one sequence")
    if stream.squares is None:
        raise NotImplementedError("the stream must be prepared")
    fused.supported(stream.x, [*weights, last], 1)
    if any(weight.order not in ("rows", "last") for weight in weights) or last.order not in ("groups", "first"):
        raise NotImplementedError("weights lie in an order that the phases do not take")
    if not order.available():
        raise NotImplementedError("launches cannot have phases here")


def _launch(
    kernel: Callable[[Refs], None],
    name: str,
    programs: int,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    in_place: Mapping[str, str],
) -> dict[str, Array]:
    """A launch whose kernel finds its arrays by name."""
    names = (*inputs, *outputs)
    found = compat.call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        name=name,
        grid=(programs,),
        out_shape=tuple(outputs.values()),
        warps=WARPS,
        aliases={list(inputs).index(old): list(outputs).index(new) for old, new in in_place.items()},
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _held(ref: Refs, name: str) -> list[Any]:
    """Data, scale and, if there is one, bias of a weight."""
    return [ref[f"{name} {part}"] for part in ("data", "scale", "bias") if f"{name} {part}" in ref]


def _named(name: str, operands: Operands) -> dict[str, Array]:
    return {f"{name} {part}": array for part, array in zip(("data", "scale", "bias"), operands, strict=False)}


def _coming(coming: Sequence[Ahead]) -> dict[str, Array]:
    return {f"coming {phase} {i}": array for phase, each in enumerate(coming) for i, array in enumerate(each.arrays)}


@dataclasses.dataclass(frozen=True)
class Ends:
    """The first and the last phase of a block: what reads the stream, and what writes it."""

    jobs: dict[str, Job]
    last: Weight
    eps: float
    cut: Cut

    @property
    def reading(self) -> Settings:
        """How the first phase is cut."""
        return self.cut.read(list(self.jobs.values()))

    @property
    def writing(self) -> Settings:
        """How the last phase is cut."""
        return self.cut.write(self.last)

    @property
    def reads(self) -> int:
        """Programs of the first phase."""
        return sum(programs_of(job.weights[0], self.reading) for job in self.jobs.values())

    @property
    def writes(self) -> int:
        """Programs of the last phase."""
        return programs_of(self.last, self.writing)

    def inputs(
        self, stream: Stream, operands: Mapping[str, Operands], norm: Array, counts: Array, coming: Sequence[Ahead]
    ) -> dict[str, Array]:
        """Arrays by name: "last" is the weight that writes."""
        assert stream.scaled is not None
        assert stream.squares is not None
        arrays = dict(x=stream.x, scaled=stream.scaled, squares=stream.squares, norm=norm, counts=counts)
        for name, held in operands.items():
            arrays |= _named(name, held)
        return arrays | _coming(coming)

    def outputs(self, stream: Stream) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the first phase, by its jobs' names, and of the last."""
        width = stream.x.shape[1]
        row = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        after = {name: row((1, job.weights[0].features)) for name, job in self.jobs.items()}
        after |= {"x after": row((1, width)), "scaled after": row((1, width))}
        after |= {"squares after": jax.ShapeDtypeStruct((1, self.writes), jnp.float32)}
        return after | {"counts after": jax.ShapeDtypeStruct((order.COUNTS,), jnp.int32)}

    def stream(self, found: Mapping[str, Array], stream: Stream) -> Stream:
        """The stream after the block."""
        return Stream(*(found[f"{name} after"] for name in ("x", "scaled", "squares")), stream.counts)

    def read(self, ref: Refs, program: Array) -> None:
        """The first phase."""
        norm = Norm(ref["squares"], ref["x"].shape[1], self.eps)
        operands = [
            [_held(ref, f"{name} {i}") for i in range(len(job.weights))] for name, job in self.jobs.items()
        ]  # fmt: skip
        outs = [ref[name] for name in self.jobs]
        read_phase(ref["scaled"], norm, list(self.jobs.values()), operands, outs, self.reading, 1, (program, 0))

    def write(self, ref: Refs, hidden: Any, program: Array, ready: Callable[[], None]) -> None:
        """The last phase."""
        outs = [ref[f"{name} after"] for name in ("x", "scaled", "squares")]
        before, held = (ref["x"], ref["norm"]), _held(ref, "last")
        write_phase(hidden, self.last, held, before, outs, self.writing, 1, (program, 0), None, ready)


def _pull(ref: Refs, coming: Sequence[Ahead], phase: int, program: Any, programs: int, *, early: bool) -> None:
    each = coming[phase]
    each.pull([ref[f"coming {phase} {i}"] for i in range(len(each.arrays))], program, programs, early=early)


def mlp(
    stream: Stream,
    job: Job,
    operands: Sequence[Operands],
    down: Weight,
    down_operands: Operands,
    norm: Float[Array, " h"],
    counts: Int[Array, " phases"],
    *,
    eps: float,
    coming: Sequence[Ahead] = (NOTHING, NOTHING),
) -> tuple[Stream, Int[Array, " phases"]]:
    """Gate and up with their activation, then down, added to the stream; and the counts to hand on."""
    supported(stream, job.weights, down)
    held = {f"hidden {i}": each for i, each in enumerate(operands)} | {"last": down_operands}
    return _mlp(stream, held, norm, counts, tuple(coming), ends=_Static(Ends({"hidden": job}, down, eps, CUT)))


@dataclasses.dataclass(frozen=True)
class _Static:
    """A static argument that holds a dict."""

    ends: Ends

    def __hash__(self) -> int:
        return hash((tuple(self.ends.jobs.items()), self.ends.last, self.ends.eps, self.ends.cut))


# Compiled once for all layers of equal sizes.
@functools.partial(jax.jit, static_argnames="ends")
def _mlp(
    stream: Stream,
    operands: Mapping[str, Operands],
    norm: Array,
    counts: Array,
    coming: tuple[Ahead, ...],
    *,
    ends: Any,
) -> tuple[Stream, Array]:
    ends = ends.ends
    reads, writes = ends.reads, ends.writes

    def kernel(ref: Refs) -> None:
        program = pl.program_id(0)
        done = Order(ref["counts after"], program)

        @pl.when(program < reads)
        def _() -> None:
            _pull(ref, coming, 0, program, reads, early=True)
            ends.read(ref, program)
            done.arrive(0)
            _pull(ref, coming, 0, program, reads, early=False)

        @pl.when(program >= reads)
        def _() -> None:
            block = program - reads
            _pull(ref, coming, 1, block, writes, early=True)
            ends.write(ref, ref["hidden"], block, lambda: done.wait(0, reads))
            _pull(ref, coming, 1, block, writes, early=False)
            done.finish(1, writes)

    inputs = ends.inputs(stream, operands, norm, counts, coming)
    name = f"mlp_{ends.last.groups * ends.last.group}"
    found = _launch(kernel, name, reads + writes, inputs, ends.outputs(stream), {"counts": "counts after"})
    return ends.stream(found, stream), found["counts after"]


def attention(
    stream: Stream,
    jobs: dict[str, Job],
    operands: Mapping[str, Operands],
    o: Weight,
    o_operands: Operands,
    norm: Float[Array, " h"],
    caches: Caches,
    inv_freq: Float[Array, "qk g"] | None,
    place: Place,
    done: Int[Array, "1 g"],
    counts: Int[Array, " phases"],
    shape: tuple[int, int, int],
    *,
    scale: float,
    eps: float,
    coming: Sequence[Ahead] = (NOTHING, NOTHING, NOTHING),
) -> tuple[Stream, Caches, Int[Array, "1 g"], Int[Array, " phases"]]:
    """Queries, keys and values ("q", "k", "v", perhaps "q_pass" and "k_pass"), attention, o, added to the stream; the
    caches, and the counts to hand on. shape: turning dimensions, how many turn together, query heads.
    """
    supported(stream, [job.weights[0] for job in jobs.values()], o)
    sizes = decode_pallas.Sizes(shape[0] * shape[1], shape[1], shape[2])
    held = {f"{name} 0": each for name, each in operands.items()} | {"last": o_operands}
    static = _Static(Ends(jobs, o, eps, CUT))
    return _attention(
        stream, held, norm, caches, inv_freq, place, done, counts, tuple(coming), ends=static, scale=scale, sizes=sizes
    )


@functools.partial(jax.jit, static_argnames=("ends", "scale", "sizes"))
def _attention(
    stream: Stream,
    operands: Mapping[str, Operands],
    norm: Array,
    caches: Caches,
    inv_freq: Array | None,
    place: Place,
    done: Array,
    counts: Array,
    coming: tuple[Ahead, ...],
    *,
    ends: Any,
    scale: float,
    sizes: decode_pallas.Sizes,
) -> tuple[Stream, Caches, Array, Array]:
    ends = ends.ends
    _, slots, groups, _ = caches.k.shape
    decode_pallas.supported(sizes.heads, caches, stream.x.dtype)
    cut = ends.cut.attend(groups, slots)
    reads, middle, writes = ends.reads, groups * cut.split, ends.writes

    def kernel(ref: Refs) -> None:
        program = pl.program_id(0)
        phases = Order(ref["counts after"], program)

        @pl.when(program < reads)
        def _() -> None:
            _pull(ref, coming, 0, program, reads, early=True)
            ends.read(ref, program)
            phases.arrive(0)
            _pull(ref, coming, 0, program, reads, early=False)

        @pl.when((program >= reads) & (program < reads + middle))
        def _() -> None:
            at = program - reads

            def ready() -> None:
                _pull(ref, coming, 1, at, middle, early=True)
                phases.wait(0, reads)

            of = (0 * program, at % groups, at // groups)
            decode_pallas.attend_phase(ref, cut, scale, sizes, of, ready, lambda: phases.arrive(1))
            _pull(ref, coming, 1, at, middle, early=False)

        @pl.when(program >= reads + middle)
        def _() -> None:
            block = program - reads - middle
            _pull(ref, coming, 2, block, writes, early=True)
            ends.write(ref, ref["out"], block, lambda: phases.wait(1, groups))
            _pull(ref, coming, 2, block, writes, early=False)
            phases.finish(2, writes)

    inputs = ends.inputs(stream, operands, norm, counts, coming) | dict(k_cache=caches.k, v_cache=caches.v, done=done)
    inputs |= dict(positions=place.positions, visible=place.visible, slot=place.slot.reshape(1))
    inputs |= {} if inv_freq is None else dict(inv_freq=inv_freq)
    outputs = ends.outputs(stream) | decode_pallas.outputs_of(caches, done, sizes.heads, cut)
    outputs["out"] = jax.ShapeDtypeStruct(blocks.shape(1, caches.v.shape[3] * sizes.heads, False), jnp.bfloat16)
    in_place = {"counts": "counts after", **decode_pallas.IN_PLACE}
    programs = reads + middle + writes
    found = _launch(kernel, f"attention_{slots}", programs, inputs, outputs, in_place)
    caches = Caches(found["k_after"], found["v_after"])
    return ends.stream(found, stream), caches, found["done_after"], found["counts after"]
