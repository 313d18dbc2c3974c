"""The one pass, from an opened source to a whole elastic checkpoint: sort, plan, then rotate, refit and quantize."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Int

from uniql_jax import elastic
from uniql_jax.checkpoint import CheckpointWriter, packed, reachable_bias, stored
from uniql_jax.compression.artifacts import LayerStore, StreamStore, fingerprint, flatten, prepare, unflatten
from uniql_jax.compression.contract import Progress, Recovery, Report, Source
from uniql_jax.compression.estimate import disk_bytes, stream_bytes
from uniql_jax.compression.finishing import Finisher, keep_per_window, pack_leaf, refit_rates
from uniql_jax.compression.math.rotation import orthogonal, rotate_block, rotate_top
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorting import final_gram, layer_forward, layer_statistics, loss_gradient, sort_layer
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import embed
from uniql_jax.plan import groups, make_plan
from uniql_jax.train import recover as recovery
from uniql_jax.train.lora import merge_layer, packed_layer, packed_top
from uniql_jax.version import __version__
from uniql_jax.weights.fake_quantized import from_quantized
from uniql_jax.weights.quantized import QuantizedArray


def compress(
    source: Source,
    out: str | Path,
    tokens: Int[np.ndarray, "n t"],
    options: CompressionSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda items, _: items,
    memo: dict[Any, Any] | None = None,
    recover: Recovery | None = None,
) -> Report:
    """Sort, plan, recover if asked, rotate, refit and quantize; one layer is in memory at a time (while recovering,
    the whole model).

    tokens: int32 calibration windows [windows, length] without padding. Work that is done lies in `OUT.partial`
    until the checkpoint is whole; after a kill, resume=True goes on and gives the same bytes. memo: a dict that carries
    the statistics of all layers from one run to the next on the same source and windows (memory: two Gram matrices a
    layer), for comparing options. Raises UserError when
    `out` exists, when another run's work is in the way, or when the disk is too small.
    """
    options = options or CompressionSettings()
    target = Path(out).expanduser().absolute()
    folder = target.with_name(f"{target.name}.partial")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; name another place or add --overwrite")
    tuning = recover is not None and recover.tuning is not None
    name = fingerprint(source, tokens, options, recover)
    prepare(folder, name, resume, disk_bytes(source.config, options, tokens.size, tuning))
    told, gained, tuned = dict(provenance or {}), None, None
    # Statistics and what is solved from them want float32 products; training wants fast ones.
    with jax.default_matmul_precision("highest"):
        run = _Run(source, folder, tokens, options, progress, memo)
        run.sort()
    if recover is not None:
        gained = run.recover(recover)
        told["recovery"] = _told(gained, recover.options)
    with jax.default_matmul_precision("highest"):
        run.finish(positions=tuning)
    if recover is not None and recover.tuning is not None:
        tuned = run.tune(recover)
        told["tuning"] = _told(tuned, recover.tuning)
    size = run.assemble(told)
    old = target.with_name(f"{target.name}.partial-old")
    if target.exists():
        target.rename(old)
    (folder / "checkpoint").rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    return Report(run.plan, tuple(run.influence), size, gained, tuned)


def _told(gained: recovery.Result, options: recovery.RecoverySettings) -> dict[str, Any]:
    """What a checkpoint says of its recovery: the settings, and losses in nats by rate."""
    by_rate = {name: {f"{r:g}": v for r, v in getattr(gained, name).items()} for name in ("before", "after")}
    return {"options": dataclasses.asdict(options), **by_rate, "steps": gained.steps, "best_step": gained.best_step}


def _with_positions(leaves: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """Packed leaves as RoundedArrays that lie at `places`; the others as they are."""
    return {
        name: from_quantized(value, places[name]) if isinstance(value, QuantizedArray) else value
        for name, value in leaves.items()
    }


def _name(i: int) -> str:
    return f"layer_{i:05d}"


class _Run:
    """State of one run: calibration windows in batches, and the two stores of finished layers."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        tokens: np.ndarray,
        options: CompressionSettings,
        progress: Progress,
        memo: dict[Any, Any] | None = None,
    ):
        self.memo, self.keep_statistics = {} if memo is None else memo, memo is not None
        self.source, self.options, self.folder, self.progress = source, options, folder, progress
        self.config = source.config
        size = max(1, options.batch_tokens // tokens.shape[1])
        self.batches = [jnp.asarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        self.count = tokens.size
        self.sorted = LayerStore(folder / "sorted")
        self.recovered = LayerStore(folder / "recovered")
        self.done = LayerStore(folder / "done")
        self.positions = LayerStore(folder / "positions")
        self.tuned = LayerStore(folder / "tuned")
        needed = stream_bytes(self.config, tokens.size)
        self.streams = StreamStore(folder / "streams", needed, options.stream_memory)
        self.groups = dict(groups(self.config))
        self.meta = {"bits": options.bits, "groups": self.groups}
        self.influence: list[float] = []
        self.top = {name: jnp.asarray(value, jnp.float32) for name, value in source.top().items()}

    def _layer(self, i: int, store: LayerStore | None = None) -> dict[str, dict[str, Array]]:
        """Layer i, sorted and, where that was asked, recovered; float32."""
        store = store or (self.recovered if self.recovered.has(_name(i)) else self.sorted)
        loaded = unflatten(store.load(_name(i)))
        return {kind: {n: jnp.asarray(v, jnp.float32) for n, v in block.items()} for kind, block in loaded.items()}

    def _streams(self, table: Any) -> list[Array]:
        return [embed({"embed": table}, batch, jnp.float32) for batch in self.batches]

    def sort(self) -> None:
        """Two sweeps: forward for block influence and the streams between layers, backward for what the loss feels.

        Going back, each layer is sorted as soon as its statistics are known. Then the plan.
        """
        count = len(self.config.pattern)
        self._forward()
        gradients: list[Array] = []
        for i in self.progress(range(count - 1, -1, -1), "sort"):
            if self.sorted.has(_name(i)):
                continue
            if i not in self.memo:
                gradients = gradients or self._gradients_after(i)
                gradients, stats = self._statistics(i, gradients)
                self.streams.save(f"gradient_{i:05d}", np.concatenate(gradients))
                means = jax.tree.map(lambda value: value / self.count, stats)
                if self.keep_statistics:
                    self.memo[i] = means
            else:
                means = self.memo[i]
            layer = jax.tree.map(jnp.asarray, self.source.layer(i))
            kinds = self.config.pattern[i]
            result, losses = sort_layer(self.config, kinds, layer, means, self.options, self.options.seed + i)
            self.sorted.save(_name(i), flatten(result), {a: np.asarray(loss).tolist() for a, loss in losses.items()})
            self.streams.drop(f"gradient_{i + 1:05d}")
            self.streams.drop(_name(i + 1))
        summary = self.sorted.record("final")
        self.influence = summary["influence"]
        kind = self.options.plan
        self.plan = make_plan(
            self.config,
            self.influence if kind == "influence" else None,
            losses=[self.sorted.record(_name(i)) for i in range(count)] if kind == "loss" else None,
            epsilon=self.options.epsilon,
        )

    def _forward(self) -> None:
        """Streams before every layer, block influence, and the Gram of what the head reads."""
        count = len(self.config.pattern)
        if "final" in self.memo:
            self.sorted.save("final", *self.memo["final"])
        todo = [i for i in range(count) if not self.sorted.has(_name(i)) and i not in self.memo]
        if self.sorted.has("final") and (not todo or self.streams.has(_name(max(todo) + 1))):
            return
        influence = []
        xs = self._streams(self.top["embed"])
        self.streams.save(_name(0), np.concatenate(xs))
        for i in self.progress(range(count), "read"):
            layer = jax.tree.map(jnp.asarray, self.source.layer(i))
            cosine = 0.0
            for b, x in enumerate(xs):
                xs[b], part = layer_forward(self.config, self.config.pattern[i], layer, x)
                cosine += float(part)
            influence.append(1.0 - cosine / self.count)
            self.streams.save(_name(i + 1), np.concatenate(xs))
        total = sum(final_gram(x, self.config.norm_eps) for x in xs) / self.count
        self.sorted.save("final", {"gram": total}, {"influence": influence})
        if self.keep_statistics:
            self.memo["final"] = ({"gram": np.asarray(total)}, {"influence": influence})

    def _statistics(self, i: int, gradients: list[Array]) -> tuple[list[Array], Any]:
        """Gradients before layer i from those after it, and the layer's summed statistics."""
        layer = jax.tree.map(jnp.asarray, self.source.layer(i))
        thorough = self.options.thorough or self.keep_statistics
        before, stats = [], None
        for x, gradient in zip(self._stream(_name(i)), gradients, strict=True):
            gradient, found = layer_statistics(self.config, self.config.pattern[i], layer, x, gradient, thorough)
            before.append(gradient)
            stats = found if stats is None else jax.tree.map(jnp.add, stats, found)
        return before, stats

    def _stream(self, name: str) -> list[Array]:
        """A kept stream in batches."""
        ends = np.cumsum([len(b) for b in self.batches])[:-1]
        return [jnp.asarray(part) for part in np.split(self.streams.load(name), ends)]

    def _gradients_after(self, i: int) -> list[Array]:
        """Gradient of the loss at the output of layer i, recomputed from the head where it was not kept."""
        count = len(self.config.pattern)
        if i < count - 1 and self.streams.has(f"gradient_{i + 1:05d}"):
            return self._stream(f"gradient_{i + 1:05d}")
        pairs = zip(self._stream(_name(count)), self.batches, strict=True)
        gradients = [loss_gradient(self.top, x, tokens, self.config.norm_eps) for x, tokens in pairs]
        for j in range(count - 1, i, -1):
            gradients = self._statistics(j, gradients)[0]
        return gradients

    def recover(self, wanted: Recovery) -> recovery.Result:
        """Train masked LoRA on the sorted model, and keep every layer with it merged in."""
        layers = [jax.device_get(self._layer(i, self.sorted)) for i in range(len(self.config.pattern))]
        result = recovery.train(
            self.config,
            layers,
            jax.device_get(self.top),
            self.plan,
            wanted.learnt,
            wanted.judged,
            wanted.options,
            self.folder / "recover",
            lambda steps: self.progress(steps, "recover"),
        )
        factors = jax.device_get(result.factors)
        for i, layer in enumerate(layers):
            self.recovered.save(_name(i), flatten(merge_layer(i, layer, factors, wanted.options.alpha)))
        return result

    def tune(self, wanted: Recovery) -> recovery.Result:
        """Train further with every weight rounded to its stored grid, from the integers that `finish` left; those that
        come of it take their place. The teacher is the unpruned dense model, the original or what recovery made of it.
        """
        options, count = wanted.tuning, len(self.config.pattern)
        if options is None or not self.options.packed:
            raise ValueError("only a packed model is tuned, with settings of its own")
        layers = [self._trainable(i) for i in range(count)]
        teacher = None
        if options.distill:
            store = self.sorted if options.teacher == "original" else None
            teacher = [jax.device_get(self._layer(i, store)) for i in range(count)], jax.device_get(self.top)
        top = _with_positions(self._stored_top(self.done), self.positions.load("top"))
        result = recovery.train(
            self.config, layers, top, self.plan, wanted.learnt, wanted.judged, options, self.folder / "tune",
            lambda steps: self.progress(steps, "tune"), teacher=teacher,
        )  # fmt: skip
        factors = jax.device_get(result.factors)
        for i, layer in enumerate(layers):
            self.tuned.save(_name(i), flatten(packed_layer(self.config, i, layer, factors, options.alpha)))
        self.tuned.save("top", packed_top(top, factors, options.alpha))
        return result

    def _trainable(self, i: int) -> dict[str, dict[str, Any]]:
        """A finished layer with its packed leaves as RoundedArrays."""
        places = unflatten(self.positions.load(_name(i)))
        layer = self._stored_layer(i, self.done)
        return {kind: _with_positions(block, places.get(kind, {})) for kind, block in layer.items()}

    def _finish_top(self, q: Array | None, positions: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Embedding, norm and head as they will be stored, and with `positions` what was rounded, in steps."""
        options = self.options
        dtype = matrix_dtype(options)
        gram = jnp.asarray(self.sorted.load("final")["gram"], jnp.float32)
        norm = self.top["norm"]
        top = rotate_top(self.top, q) if q is not None else self.top
        if not options.packed:
            return {name: stored(elastic.TOP[name], value, dtype) for name, value in top.items()}, {}
        if q is None:
            read = norm[:, None] * gram * norm
        elif "head" in top:
            read = q.T @ gram @ q
        else:
            read = q.T @ (norm[:, None] * gram * norm) @ q
        out: dict[str, Any] = {n: stored(elastic.TOP[n], value, dtype) for n, value in top.items() if n != "head"}
        if "head" in top:
            hessians = {"head": read, "embed": None}
        else:
            # One table is read as embedding and as head: its errors count in both ways.
            mixed = read / jnp.mean(jnp.diagonal(read)) + options.embed_mix * jnp.eye(read.shape[0])
            hessians = {"embed": mixed}
        places = {}
        for name, hessian in hessians.items():
            done = pack_leaf(elastic.TOP[name], top[name], hessian, options, self.groups["embed"], positions)
            out[name] = done.weight
            if done.position is not None:
                places[name] = done.position
        return out, places

    def finish(self, positions: bool = False) -> None:
        """Bring every layer into its stored form; `positions` keeps what was rounded as well, for `tune`."""
        options = self.options
        refitting = options.refit is not None
        rotating = options.packed and options.rotate
        q = jnp.asarray(orthogonal(self.config.hidden_size, options.seed), jnp.float32) if rotating else None
        if not self.done.has("top"):
            top, places = self._finish_top(q, positions)
            if positions:
                self.positions.save("top", places)
            self.done.save("top", top)
        teacher = keep = None
        x = self._streams(self._stored_top(self.done)["embed"])
        if refitting:
            teacher = self._streams(self.top["embed"] @ q if q is not None else self.top["embed"])
            rates = refit_rates(sum(len(b) for b in self.batches), float(options.refit or 0.0))
            per_window = keep_per_window(self.plan, rates.tolist())
            starts = np.cumsum([0] + [len(b) for b in self.batches])
            keep = [
                tuple({a: sizes[lo:hi] for a, sizes in layer.items()} for layer in per_window)
                for lo, hi in itertools.pairwise(starts)
            ]
        finisher = Finisher(self.config, options, self.groups, matrix_dtype(options), x, teacher, keep, positions)
        streaming = refitting or options.packed
        for i in self.progress(range(len(self.config.pattern)), "quantize" if options.packed else "finish"):
            name = _name(i)
            layer = self._layer(i)
            if q is not None:
                layer = {kind: rotate_block(kind, block, q) for kind, block in layer.items()}
            if self.done.has(name):
                if streaming:
                    finisher.replay(i, self._stored_layer(i, self.done), layer)
                continue
            if streaming:
                finished = finisher.layer(i, layer)
                if positions:
                    self.positions.save(name, flatten(finisher.positions))
                self.done.save(name, flatten(finished))
            else:
                dtype = matrix_dtype(options)
                finished = {
                    kind: {leaf: stored(elastic.BLOCKS[kind][leaf], value, dtype) for leaf, value in block.items()}
                    for kind, block in layer.items()
                }
                finished = {kind: reachable_bias(self.config, kind, block) for kind, block in finished.items()}
                self.done.save(name, flatten(finished))

    def _stored_layer(self, i: int, store: LayerStore | None = None) -> dict[str, dict[str, Any]]:
        """A finished layer in its stored form, tuned where that was asked."""
        store = store or (self.tuned if self.tuned.has(_name(i)) else self.done)
        return {
            kind: self._restore(block, elastic.BLOCKS[kind]) for kind, block in unflatten(store.load(_name(i))).items()
        }

    def _stored_top(self, store: LayerStore | None = None) -> dict[str, Any]:
        store = store or (self.tuned if self.tuned.has("top") else self.done)
        return self._restore(store.load("top"), elastic.TOP)

    def _restore(self, tensors: Mapping[str, Any], table: Mapping[str, elastic.Leaf]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tensors.items():
            name, _, part = key.partition(".")
            if part == "scale":
                continue
            if part == "data":
                out[name] = packed(self.config, self.meta, table[name], value, tensors[f"{name}.scale"])
            else:
                out[name] = stored(table[name], value, matrix_dtype(self.options))
        return out

    def assemble(self, provenance: dict[str, Any]) -> int:
        """Write the whole checkpoint into the work folder; returns the bytes of its tensors."""
        folder = self.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        meta = self.meta | {
            "plan": self.plan.to_json(),
            "influence": self.influence,
            "options": dataclasses.asdict(self.options),
            "provenance": {"version": __version__, "source": Path(self.source.name).name} | provenance,
        }
        writer = CheckpointWriter(folder, self.source.hf_config, meta)
        writer.add_top(self._stored_top())
        for i in range(len(self.config.pattern)):
            writer.add_layer(i, self._stored_layer(i))
        size = writer.finish()
        self.source.write_side_files(folder)
        return size


def matrix_dtype(options: CompressionSettings) -> Any:
    """Type of the matrices that are not packed."""
    return np.float32 if options.bits == 32 else ml_dtypes.bfloat16
