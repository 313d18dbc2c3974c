"""A server under load: many streams, some of which hang up, at rates of their own or the server's, which changes.

    python -m benchmarks.load --ckpt DIR [--minutes 5] [--streams 64] [--json FILE]

Checked: no call fails, every finished answer that was made at one rate is what `generate` makes at that rate, and
afterwards the process holds the bytes that it held before. A call may be refused for one reason only: it asked for a
rate that the server's present weights do not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import gc
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import psutil

import uniql_jax
from uniql_jax import console
from uniql_jax.evaluation.timing import environment
from uniql_jax.runtime.generation import decode_stream, prompt_ids
from uniql_jax.server.app import Server
from uniql_jax.server.http import Limits
from uniql_jax.server.running import serving

NAME = "model"
RATES = (0.0, 0.15, 0.35)
PROMPTS = (
    "Once",
    "The people of",
    "def forward(tokens)",
    "at home and abroad",
    "a naïve café",
    "日本語",
    "peace",
    "in",
)
NEW = (1, 5, 12, 30)
REFUSED = "rate_not_held"


class Load:
    """What the clients did, and what went wrong."""

    def __init__(self, url: str, seed: int, streams: int):
        self.url, self.random, self.streams = url, random.Random(seed), streams
        self.finished: list[tuple[str, int, str, str, str]] = []  # prompt, tokens asked for, model, fingerprint, text
        self.left = self.refused = self.switches = 0
        self.wrong: list[str] = []

    async def client(self, end: float) -> None:
        """Ask again and again; hang up now and then."""
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            while time.monotonic() < end:
                rate = self.random.choice(RATES) if self.random.random() < 0.4 else None
                body = {
                    "model": NAME if rate is None else f"{NAME}@{rate:g}",
                    "prompt": self.random.choice(PROMPTS),
                    "max_tokens": self.random.choice(NEW),
                    "temperature": 0,
                    "stream": self.random.random() < 0.7,
                }
                leaves = self.random.random() < 0.25
                try:
                    await (self.streamed if body["stream"] else self.whole)(http, body, leaves)
                except httpx.TimeoutException:
                    if leaves:
                        self.left += 1
                    else:
                        self.wrong.append("timeout")
                except httpx.TransportError as error:
                    self.wrong.append(repr(error))

    def failed(self, body: dict[str, Any], error: dict[str, Any]) -> None:
        """An error instead of an answer."""
        if error["code"] == REFUSED and "@" in body["model"]:
            self.refused += 1
        else:
            self.wrong.append(json.dumps(error))

    def end(self, body: dict[str, Any], fingerprint: str, text: str) -> None:
        """An answer is complete."""
        self.finished.append((body["prompt"], body["max_tokens"], body["model"], fingerprint, text))

    async def whole(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> None:
        """An answer at once."""
        patience = self.random.uniform(0.001, 0.05) if leaves else 600
        answer = await http.post("/v1/completions", json=body, timeout=patience)
        found = answer.json()
        if answer.status_code != 200:
            self.failed(body, found["error"])
        else:
            self.end(body, found["system_fingerprint"], found["choices"][0]["text"])

    async def streamed(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> None:
        """An answer piece by piece."""
        text, finish, fingerprint, count = "", None, "", 0
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.failed(body, json.loads(await answer.aread())["error"])
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.failed(body, event["error"])
                    return
                [choice] = event["choices"]
                text, count = text + choice["text"], count + 1
                finish, fingerprint = choice["finish_reason"] or finish, event["system_fingerprint"]
                if leaves and count > self.random.randrange(6):
                    self.left += 1
                    return
        if finish is None:
            self.wrong.append("a stream ended without a finish reason")
        self.end(body, fingerprint, text)

    async def switch(self, end: float) -> None:
        """Change the rate now and then."""
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            while time.monotonic() < end:
                await asyncio.sleep(self.random.uniform(0.3, 1.5))
                answer = await http.post("/admin/rate", json={"rate": self.random.choice(RATES)})
                self.switches += 1
                if answer.status_code != 200:
                    self.wrong.append(answer.text)

    async def run(self, seconds: float) -> None:
        """All clients at once."""
        end = time.monotonic() + seconds
        await asyncio.gather(self.switch(end), *(self.client(end) for _ in range(self.streams)))


def resident() -> int:
    """Bytes of this process, after what can be freed is."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def held(server: Server) -> tuple[int, int]:
    """Bytes of arrays and of the process, once nothing runs any more and the rate is 0."""
    for _ in range(1200):
        if not server.streams and not any(server.session.load_now().values()):
            break
        time.sleep(0.05)
    else:
        raise SystemExit("something still runs")
    server.session.rate = 0.0
    return sum(x.nbytes for x in jax.live_arrays()), resident()


def unequal(folder: Path, load: Load, tokenizer: Any) -> tuple[int, list[str]]:
    """How many answers were made at one rate, and those of them that are not what `generate` makes."""
    models = {f"uniql-rate-{rate:g}": uniql_jax.load(folder, rate) for rate in RATES}

    @functools.cache
    def alone(prompt: str, new: int, fingerprint: str) -> str:
        ids = prompt_ids(tokenizer, prompt, False)
        made = [int(t[0]) for t in uniql_jax.generate(models[fingerprint], ids, max_new_tokens=max(NEW))][:new]
        return "".join(decode_stream(tokenizer, iter(made), ids.tolist()))

    found = [answer for answer in load.finished if answer[3] in models]
    wrong = [f"{answer}" for answer in found if answer[4] != alone(answer[0], answer[1], answer[3])]
    for prompt, _, model, fingerprint, _ in load.finished:  # who asked for a rate got that, and no other
        if "@" in model and fingerprint != f"uniql-rate-{model.rpartition('@')[2]}":
            wrong.append(f"{model} answered {prompt!r} as {fingerprint}")
    return len(found), wrong


def measure(folder: Path, seconds: float, streams: int, seed: int = 0, rows: int = 8) -> dict[str, Any]:
    """Run the load against a server of this process; everything that was found."""
    session = uniql_jax.Elastic(folder, context=96, batch=rows)
    session.warm_up(RATES, sampling=False)
    server = Server(session, NAME, limits=Limits(streams=2 * streams))
    with serving(server) as url:
        warm = Load(url, seed, streams)
        asyncio.run(warm.run(min(seconds / 4, 30)))  # so that what is kept once is there
        arrays, process = held(server)
        load = Load(url, seed + 1, streams)
        asyncio.run(load.run(seconds))
        arrays_after, process_after = held(server)
    checked, wrong = unequal(folder, load, session.tokenizer)
    return {
        "seconds": seconds, "streams": streams, "rows": rows, "answers": len(load.finished), "hung_up": load.left,
        "refused": load.refused, "switches": load.switches, "errors": warm.wrong + load.wrong, "compared": checked,
        "unequal": wrong, "array_bytes": [arrays, arrays_after], "process_bytes": [process, process_after],
    }  # fmt: skip


def main() -> None:
    """Measure and print; write what --json names; exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="elastic checkpoint with a tokenizer")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="of the server's batch")
    parser.add_argument("--seed", type=int, default=int(np.random.default_rng().integers(2**31)))
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args()
    found = {"environment": environment(["benchmarks.load", *sys.argv[1:]]), "model": args.ckpt.name, "seed": args.seed}
    found |= measure(args.ckpt, 60 * args.minutes, args.streams, args.seed, args.rows)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if args.json:
        console.write_whole(args.json, json.dumps(found, indent=1) + "\n")
    grown = any(after > 1.05 * before for before, after in (found["array_bytes"], found["process_bytes"]))
    sys.exit(1 if found["errors"] or found["unequal"] or grown else 0)


if __name__ == "__main__":
    main()
