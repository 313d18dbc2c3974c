"""A checkpoint's GGUF exports in llama.cpp: bytes, perplexity next to ours, and decoding speed, rate against rate.

    python benchmarks/gguf_export.py --ckpt elastic --text manual=python-docs/ \
        --json benchmarks/results/gguf-smollm2-cpu.json

    python benchmarks/gguf_export.py --ckpt elastic --rates 0 --ours --prompt-tokens 256 --json gap.json

Speeds are measured in turns (A B A B) and compared within a turn; with --ours our own takes turns as well, and the
record says what a token's products with weights take by themselves. On a machine with other work to do, give
--threads 1 and compare the processor's time of a token, which the record has as well (on Linux): threads that wait for
one another spend it too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from uniql_jax import console, data, elastic
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.convert.exporting import Request
from uniql_jax.convert.formats import export_as
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.timing import environment, measure
from uniql_jax.runtime.loading import load
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.weights.quantized import QuantizedArray

SERVERS = """
import sys, xllamacpp
for line in sys.stdin:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = line.strip(), int(sys.argv[1]), 1, 0
    params.cpuparams.n_threads = int(sys.argv[2])
    params.warmup, params.fit_params = True, False
    server = None  # the one before ends first
    server = xllamacpp.Server(params)
    print("\\nLISTENS", server.listening_address, flush=True)
"""
PROMPT = "The history of the city begins in the year 1204, when a small group of traders"


class LlamaCpp:
    """llama.cpp's server in a process of its own, one file after the other."""

    def __init__(self, context: int, threads: int) -> None:
        command = [sys.executable, "-c", SERVERS, str(context), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def load(self, path: Path) -> None:
        """Serve another file."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        self.address = next(line.split()[1] for line in self.process.stdout if line.startswith("LISTENS"))

    def complete(self, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        """The answer to a prompt of token ids."""
        content = json.dumps({"prompt": list(prompt), "temperature": 0, "cache_prompt": True} | options).encode()
        request = urllib.request.Request(f"{self.address}/completion", content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def log_probability(self, prompt: Sequence[int], token: int) -> float:
        """Of one token after a prompt: the bias makes it the one that is drawn, and does not enter its probability."""
        answer = self.complete(prompt, n_predict=1, n_probs=1, logit_bias=[[token, 1e6]])
        found = answer["completion_probabilities"][0]
        if found["id"] != token:
            raise RuntimeError(f"llama.cpp drew {found['id']} instead of {token}")
        return float(found["logprob"])

    def cpu_seconds(self) -> float:
        """Processor time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read(self, prompt: Sequence[int]) -> float:
        """Tokens a second of reading a prompt of which nothing is cached."""
        return self.complete(prompt, n_predict=1, cache_prompt=False)["timings"]["prompt_per_second"]

    def decode(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """Tokens a second, and seconds of the processor for each, of generating after a prompt that is cached."""
        self.complete(prompt, n_predict=1)
        before = self.cpu_seconds()
        answer = self.complete(prompt, n_predict=count, ignore_eos=True)
        return answer["timings"]["predicted_per_second"], (self.cpu_seconds() - before) / count

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


class Ours:
    """The same sizes in this process: tokens a second of reading a prompt, and of a compiled loop after it."""

    def __init__(self, ckpt: str, rates: Sequence[float], prompt: int, new: int) -> None:
        self.prompt = prompt
        self.benches = {rate: Bench(load(ckpt, rate), 1, prompt, new, 1) for rate in rates}
        for bench in self.benches.values():  # compiled, and run once
            bench.ttft(), bench.tpot_loop()

    def speeds(self, rate: float) -> tuple[float, float]:
        """Of one run."""
        bench = self.benches[rate]
        return self.prompt / bench.ttft().median, 1 / bench.tpot_loop().median

    def products(self, rate: float) -> float:
        """Seconds that a token's products with all packed weights take, in a program that does nothing else."""
        params = self.benches[rate].model.params
        blocks = [(elastic.BLOCKS[kind], block) for layer in params["layers"] for kind, block in layer.items()]
        leaves = [
            (leaf.contract, block[name])
            for table, block in [*blocks, (elastic.TOP, params)]
            for name, leaf in table.items()
            if isinstance(block.get(name), QuantizedArray)
        ]

        @jax.jit
        def run(weights: list[Any], x: jax.Array) -> jax.Array:
            for (contract, _), weight in zip(leaves, weights, strict=True):  # each waits for the one before
                width = weight.shape[-1] if contract == "last" else math.prod(weight.shape[:-1])
                given = jnp.broadcast_to(x, (1, width))
                x = jnp.mean(weight.rows(given) if contract == "last" else weight.columns(given)).reshape(1, 1)
            return x

        weights, x = [weight for _, weight in leaves], jnp.ones((1, 1))
        run(weights, x).block_until_ready()
        return measure(lambda: run(weights, x), 9).median


def drawable(tokenizer: Any, window: np.ndarray, first: int) -> list[int]:
    """Places of a window from `first` on whose token the server answers with: no special one, no part of a letter."""
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in window.tolist()]
    return [i for i in range(first, len(texts)) if texts[i] and "\ufffd" not in texts[i]]


def losses(
    server: LlamaCpp, path: Path, ckpt: str, rate: float, windows: np.ndarray, tokenizer: Any
) -> tuple[float, float, int]:
    """Mean negative log probability of the windows' tokens in llama.cpp and with us, and how many they are."""
    model = load(ckpt, prune_rate=rate, dtype=jnp.float32)
    server.load(path)
    theirs, ours = [], []
    for window in windows:
        logits = np.asarray(model(jnp.asarray(window[None], jnp.int32)), np.float64)[0]
        shifted = logits - logits.max(-1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
        for i in drawable(tokenizer, window, 16):
            ours.append(-shifted[i - 1, window[i]])
            theirs.append(-server.log_probability(window[:i].tolist(), int(window[i])))
    return float(np.mean(theirs)), float(np.mean(ours)), len(ours)


def main() -> None:
    """Export, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="elastic checkpoint")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.15, 0.35])
    parser.add_argument("--text", help="NAME=SPEC to measure perplexity on; none: only bytes and speed")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="store_true", help="our own speed in the same turns")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the prompt that --ours reads")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.ckpt)
    assert tokenizer is not None
    server = LlamaCpp(args.length + args.new_tokens + 64 + args.prompt_tokens, args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {rate: Path(folder) / f"{rate}.gguf" for rate in args.rates}
        for rate, path in files.items():
            export_as("gguf", Request(args.ckpt, path, rate, load_tokenizer=load_tokenizer))
            rows.append({"prune_rate": rate, "bytes": path.stat().st_size})
        if args.text:
            name, spec = args.text.split("=", 1)
            count = args.windows * args.length
            vocab = open_checkpoint(args.ckpt).config.vocab_size
            windows = data.evaluation_windows([spec], tokenizer, args.length, count, vocab_size=vocab).tokens
            for row in rows:
                theirs, ours, tokens = losses(
                    server, files[row["prune_rate"]], args.ckpt, row["prune_rate"], windows, tokenizer
                )
                row |= {"text": name, "tokens": tokens, "llamacpp_perplexity": math.exp(theirs)}
                row |= {"perplexity": math.exp(ours), "difference": math.exp(theirs - ours) - 1}
                print(row, flush=True)
        found: dict[float, list[tuple[float, float]]] = {rate: [] for rate in args.rates}
        prompt = tokenizer(PROMPT).input_ids
        many = (prompt * (1 + args.prompt_tokens // len(prompt)))[: args.prompt_tokens]
        ours = Ours(args.ckpt, args.rates, args.prompt_tokens, args.new_tokens) if args.ours else None
        gaps: dict[float, list[tuple[float, ...]]] = {rate: [] for rate in args.rates}
        for turn in range(args.turns):
            for rate in args.rates:
                server.load(files[rate])
                found[rate].append(server.decode(prompt, args.new_tokens))
                if ours is not None:
                    gaps[rate].append((server.read(many), found[rate][-1][0], *ours.speeds(rate)))
            print(
                turn, {rate: f"{values[-1][0]:.1f} {values[-1][1]:.4f}" for rate, values in found.items()}, flush=True
            )
        for row in rows:
            own, first = np.array(found[row["prune_rate"]]), np.array(found[args.rates[0]])
            row["tokens_per_second"] = own[:, 0].round(2).tolist()
            row["cpu_seconds_per_token"] = own[:, 1].round(5).tolist()
            row["speedup"] = float(np.median(own[:, 0] / first[:, 0]))
            row["cpu_speedup"] = float(np.median(first[:, 1] / own[:, 1]))
            if ours is not None:
                read, decoded, own_read, own_decoded = np.array(gaps[row["prune_rate"]]).T
                row["ours"] = {
                    "prompt_tokens": args.prompt_tokens,
                    "llamacpp_prompt_tokens_per_second": read.round(1).tolist(),
                    "prompt_tokens_per_second": own_read.round(1).tolist(),
                    "tokens_per_second": own_decoded.round(2).tolist(),
                    "prompt_gap": float(np.median(read / own_read)),
                    "decode_gap": float(np.median(decoded / own_decoded)),
                    "products_seconds": ours.products(row["prune_rate"]),
                }
                print(row["ours"], flush=True)
            row["bytes_ratio"] = row["bytes"] / rows[0]["bytes"]
            print(
                {key: row[key] for key in ("prune_rate", "bytes", "bytes_ratio", "speedup", "cpu_speedup")}, flush=True
            )
    server.close()
    if args.json:
        record = {"environment": environment(), "xllamacpp": importlib.metadata.version("xllamacpp"), "rows": rows}
        console.write_whole(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
