"""What a change of the rate costs, and what it leaves: a running `Elastic` against fresh ones.

    python -m benchmarks.session --ckpt DIR --text TEXT [--json FILE]            switches, memory, perplexity
    python -m benchmarks.session --config llama-3.2-1b --batch 16 [--json FILE]  random weights: also throughput
    python -m benchmarks.session --config llama-3.1-8b --batch 16 --no-switches  throughput alone

Measured: seconds of a warm switch, and until the next token of a text at work, next to `load` in the same process
(files in the page cache, JAX imported) and next to what takes its place where the rate cannot change: a new process,
until it holds the weights, and until it has made the same text's next token; bytes after a switch next to a fresh
session's; perplexity of 512 tokens after 0 -> 0.35 -> 0.15, next to a fresh run at 0.15 with the same prefix, for both
ways to treat caches; seconds to the first token of a conversation's second turn, where its first one is held and where
it is not, with caches of 16 and 8 bits; with nested bits, changes between settings of the joint plan; tokens/s of a
full batch of requests next to `generate_tokens`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import uniql_jax
from uniql_jax import console, data
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.checkpoint_writer import CheckpointWriter
from uniql_jax.evaluation.published import CONFIGS
from uniql_jax.evaluation.random_model import random_model, read_config
from uniql_jax.evaluation.timing import device_name, environment
from uniql_jax.plan import grouping, make_plan
from uniql_jax.runtime.loading import load_size
from uniql_jax.runtime.requests import Settings
from uniql_jax.tokenizer import load_tokenizer

RATES = (0.0, 0.15, 0.35)


def random_checkpoint(name: str, folder: Path) -> Path:
    """An elastic checkpoint of random weights of a published config."""
    config = read_config(name)
    plan = make_plan(config, None)
    model = random_model(config, 4, plan=plan)
    folder.mkdir()
    hf = json.loads((CONFIGS / f"{name}.json").read_text())
    writer = CheckpointWriter(
        folder, hf, {"bits": 4, "groups": dict(grouping(config)["groups"]), "plan": plan.to_json()}
    )
    params = dict(model.params)
    layers = params.pop("layers")
    plain = lambda tree: jax.tree.map(  # noqa: E731
        lambda w: w.in_layout("plain") if hasattr(w, "in_layout") else w,
        tree,
        is_leaf=lambda w: hasattr(w, "in_layout"),
    )
    writer.add_top(plain(params))
    for i, layer in enumerate(layers):
        writer.add_layer(i, plain(layer))
    writer.finish()
    return folder


FRESH = """
import sys, time, uniql_jax, jax, numpy as np
from uniql_jax.runtime.requests import Settings
ckpt, rate, context = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
session = uniql_jax.Elastic(ckpt, rate=rate, context=context)
jax.block_until_ready(jax.tree.leaves(dict(session.model.params)))
print("weights", time.process_time(), flush=True)
next(iter(session.submit(np.arange(3, 3 + context // 2), Settings(context // 2))))
print("token", time.process_time(), flush=True)
"""


@functools.cache
def fresh_process(ckpt: Path, rate: float, context: int) -> dict[str, float]:
    """Seconds, and of CPUs, of a new process until it holds the weights, and until a text's next token is there."""
    start, found = time.perf_counter(), {}
    command = [sys.executable, "-c", FRESH, str(ckpt), str(rate), str(context)]
    # this process holds most of a GPU's memory already
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout or ():
            what, cpu = line.split()
            found[f"fresh_{what}_seconds"], found[f"fresh_{what}_cpu_seconds"] = time.perf_counter() - start, float(cpu)
    if process.returncode:
        raise SystemExit("the fresh process failed")
    return found


def seconds(run: Any) -> float:
    """How long something takes until the device is done."""
    return timed(run)[0]


def timed(run: Any) -> tuple[float, float]:
    """The same, and the seconds of CPUs that it takes, which other programs on them hardly change."""
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - start, time.process_time() - cpu


def switches(ckpt: Path, context: int) -> Iterator[dict[str, Any]]:
    """Changes of the rate with a text at work: seconds next to those of loading, bytes next to a fresh session's."""
    session = uniql_jax.Elastic(ckpt, context=context)
    session.warm_up(RATES, sampling=False, lengths=[context // 2, context])
    request = session.submit(np.arange(3, 3 + context // 2), Settings(context // 2))
    session.step()

    def change(rate: float) -> Any:
        session.rate = rate
        return jax.tree.leaves(dict(session.model.params))

    for rate in (0.35, 0.0, 0.15, 0.35, 0.15):  # once each way, so that what follows is warm
        change(rate)
        session.step()
    change(0.0)
    session.step()
    for before, after in ((0.0, 0.35), (0.35, 0.15), (0.15, 0.35), (0.35, 0.0)):
        made = request.made
        while request.made < made + 2:  # until the text has been read again, where that is needed
            session.step()
        start = time.perf_counter()
        took, cpu = timed(lambda rate=after: change(rate))
        made = request.made  # steps that were under way have landed with the switch
        while request.made == made:
            session.step()
        next_token = time.perf_counter() - start
        load = min(timed(lambda rate=after: jax.tree.leaves(dict(uniql_jax.load(ckpt, rate).params))) for _ in range(3))
        bytes_held = sum(session.memory().values())
        yield {
            "from": before, "to": after, "seconds": took, "cpu_seconds": cpu, "next_token_seconds": next_token,
            "load_seconds": load[0], "load_cpu_seconds": load[1], **fresh_process(ckpt, after, context),
            "held_bytes": bytes_held, "fresh_bytes": session.bytes_at(after),
        }  # fmt: skip
    request.cancel()


def perplexities(ckpt: Path, tokens: np.ndarray, prompt: int) -> Iterator[dict[str, Any]]:
    """Perplexity of what follows 0 -> 0.35 -> 0.15, for both policies, next to fresh runs with the same prefix."""
    context, third = len(tokens), 64

    def run(changes: dict[int, float], **settings: Any) -> np.ndarray:
        session = uniql_jax.Elastic(ckpt, context=context, **settings)
        scores, found = session.score(tokens[:prompt], tokens[prompt:]), []
        for i in range(len(tokens) - prompt):
            if i in changes:
                session.rate = changes[i]
            found.append(next(scores))
        return np.asarray(found)

    def value(scores: np.ndarray) -> float:
        return math.exp(-scores[2 * third + 2 :][:512].mean())

    fresh = {rate: value(run({}, rate=rate)) for rate in (0.15, 0.35)}
    up = value(run({2 * third: 0.35}))
    yield {"switch": "0 -> 0.35", "cache": "cut", "perplexity": up, "fresh": fresh[0.35], "ratio": up / fresh[0.35]}
    for policy in ("read-again", "extend"):
        found = value(run({third: 0.35, 2 * third: 0.15}, cache=policy))
        yield {
            "switch": "0 -> 0.35 -> 0.15", "cache": policy, "perplexity": found, "fresh": fresh[0.15],
            "ratio": found / fresh[0.15],
        }  # fmt: skip


def throughput(ckpt: Path, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Tokens/s of a full batch of requests, and of `generate_tokens` with the same prompts."""
    model = uniql_jax.load(ckpt)
    rng, vocabulary = np.random.default_rng(0), model.config.vocab_size
    prompts = rng.integers(3, vocabulary, (batch, prompt)).astype(np.int32)
    loop = min(
        seconds(lambda: uniql_jax.generate_tokens(model, prompts, max_new_tokens=new, eos_ids=())) for _ in range(3)
    )
    session = uniql_jax.Elastic(ckpt, context=prompt + new, batch=batch)

    def serve() -> list[int]:
        others = rng.integers(3, vocabulary, prompts.shape).astype(np.int32)  # which no row holds
        requests = [session.submit(row, Settings(new)) for row in others]
        while session.step():
            pass
        return [len(request.tokens) for request in requests]

    serve()
    requests = min(seconds(serve) for _ in range(3))
    rates = {"requests_tokens_per_second": batch * new / requests, "loop_tokens_per_second": batch * new / loop}
    return rates | {"batch": batch, "prompt": prompt, "new": new, "ratio": loop / requests}


def turns(ckpt: Path, context: int, bits: int) -> dict[str, Any]:
    """Seconds to the first token of a conversation's second turn, where a row holds the first, and where none does."""
    session = uniql_jax.Elastic(ckpt, context=context, cache_bits=bits)
    rng, half = np.random.default_rng(0), context // 2
    vocabulary, found = session.checkpoint.config.vocab_size, {}

    def first_token(prompt: np.ndarray) -> float:
        start, request = time.perf_counter(), session.submit(prompt, Settings(8))
        next(iter(request))  # which cancels it
        return time.perf_counter() - start

    for _ in range(3):  # the first time compiles
        before, other = rng.integers(3, vocabulary, (2, half)).astype(np.int32)
        more = rng.integers(3, vocabulary, 16).astype(np.int32)
        for name, prompt in (("before", before), ("held", np.append(before, more)), ("anew", np.append(other, more))):
            found[f"{name}_seconds"] = first_token(prompt)
    return {"tokens": half + 16, "cache_bits": bits, "cache_bytes": session.memory()["cache"]} | found


def settings(ckpt: Path) -> Iterator[dict[str, Any]]:
    """Changes between settings of a joint plan: seconds and bytes read, next to loading the setting."""
    session = uniql_jax.Elastic(ckpt, context=256)
    last = len(session.sizes) - 1
    for steps in (0, last // 2, last // 4, last, 0):
        size, read = session.sizes[steps], session.checkpoint.bytes_read

        def change(size: Any = size) -> Any:
            session.set_size(size)
            return jax.tree.leaves(dict(session.model.params))

        row: dict[str, Any] = {"size": size.label, "bytes": size.bytes, "seconds": seconds(change)}
        row["bytes_read"] = session.checkpoint.bytes_read - read
        yield row | {"load_seconds": seconds(lambda size=size: load_size(session.checkpoint, size).params)}


def main() -> None:
    """Measure and print; write what --json names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--ckpt", help="elastic checkpoint")
    model.add_argument("--config", help="random weights of a published config")
    parser.add_argument("--no-switches", action="store_true", help="leave out changes of the rate and turns")
    parser.add_argument("--text", help="held-out text: perplexities are measured on it")
    parser.add_argument("--tokens", type=int, default=768, help="of the text")
    parser.add_argument("--context", type=int, default=512, help="of the session whose switches are timed")
    parser.add_argument("--batch", type=int, default=0, help="measure the throughput of so many requests at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of their prompts")
    parser.add_argument("--new", type=int, default=256, help="tokens of their answers")
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ckpt = Path(args.ckpt) if args.ckpt else random_checkpoint(args.config, Path(scratch) / args.config)
        found: dict[str, Any] = {"environment": environment(["benchmarks.session", *sys.argv[1:]]), "model": ckpt.name}
        print(device_name())

        def record(name: str, value: Any, shown: str) -> None:
            """Print what was measured and write all there is so far."""
            print(shown, flush=True)
            found[name] = value
            if args.json:
                console.write_whole(args.json, json.dumps(found, indent=1) + "\n")

        if args.batch:
            many = throughput(ckpt, args.batch, args.prompt, args.new)
            record("throughput", many, json.dumps(many))
        if not args.no_switches:
            changes = []
            for row in switches(ckpt, args.context):
                changes.append(row)
                record("switches", changes, str(row))
            print(console.table([list(row.values()) for row in changes], list(changes[0])))
            rows = [turns(ckpt, args.context, bits) for bits in (16, 8)]
            record("turns", rows, json.dumps(rows))
        if args.text:
            tokenizer = load_tokenizer(str(ckpt))
            vocabulary = open_checkpoint(ckpt).config.vocab_size
            made = data.evaluation_windows([args.text], tokenizer, args.tokens, args.tokens, vocab_size=vocabulary)
            rows = list(perplexities(ckpt, np.asarray(made.tokens[0]), 64))
            names = ["switch", "cache", "perplexity", "fresh run", "ratio"]
            record("perplexity", rows, console.table([list(row.values()) for row in rows], names))
        if not args.no_switches and open_checkpoint(ckpt).joint_plan is not None:
            rows = list(settings(ckpt))
            record("settings", rows, console.table([list(row.values()) for row in rows], list(rows[0])))


if __name__ == "__main__":
    main()
