"""64 streams for a while, some of which hang up, while the rate changes: no error, no leak, and every answer right.

UNIQL_LOAD_SECONDS sets for how long (default 20).
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import psutil
import pytest

import uniql_jax
from tests import tiny
from uniql_jax.server.app import Server
from uniql_jax.server.http import Limits
from uniql_jax.server.running import serving

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("UNIQL_LOAD_SECONDS", "20"))
STREAMS = 64
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


class Load:
    """What the clients did, and what went wrong."""

    def __init__(self, server: Server, url: str, seed: int):
        self.server, self.url, self.random = server, url, random.Random(seed)
        self.finished: list[tuple[str, int, str, str]] = []  # prompt, tokens asked for, fingerprint, text
        self.left = self.switches = 0
        self.wrong: list[str] = []

    async def client(self, end: float) -> None:
        """Ask again and again; hang up now and then."""
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            while time.monotonic() < end:
                prompt, new, stream = self.random.choice(PROMPTS), self.random.choice(NEW), self.random.random() < 0.7
                body = {"model": "tiny", "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": stream}
                leaves = self.random.random() < 0.25
                try:
                    await (self.streamed if stream else self.whole)(http, body, leaves)
                except httpx.TimeoutException:
                    if not leaves:
                        self.wrong.append("timeout")

    async def whole(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> None:
        """An answer at once."""
        patience = self.random.uniform(0.001, 0.05) if leaves else 300
        answer = await http.post("/v1/completions", json=body, timeout=patience)
        if answer.status_code != 200:
            self.wrong.append(answer.text)
            return
        found = answer.json()
        self.finished.append(
            (body["prompt"], body["max_tokens"], found["system_fingerprint"], found["choices"][0]["text"])
        )

    async def streamed(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> None:
        """An answer piece by piece."""
        text, finish, fingerprint, count = "", None, "", 0
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.wrong.append(str(answer.status_code))
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.wrong.append(line)
                    return
                [choice] = event["choices"]
                text, count = text + choice["text"], count + 1
                finish, fingerprint = choice["finish_reason"] or finish, event["system_fingerprint"]
                if leaves and count > self.random.randrange(6):
                    self.left += 1
                    return
        if finish is None:
            self.wrong.append("a stream ended without a finish reason")
        self.finished.append((body["prompt"], body["max_tokens"], fingerprint, text))

    async def switch(self, end: float) -> None:
        """Change the rate now and then."""
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            while time.monotonic() < end:
                await asyncio.sleep(self.random.uniform(0.3, 1.5))
                answer = await http.post("/admin/rate", json={"rate": self.random.choice(RATES)})
                self.switches += 1
                if answer.status_code != 200:
                    self.wrong.append(answer.text)

    async def run(self, seconds: float) -> None:
        """All clients at once."""
        end = time.monotonic() + seconds
        await asyncio.gather(self.switch(end), *(self.client(end) for _ in range(STREAMS)))


def resident() -> int:
    """Bytes of this process, after what can be freed is."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def test_64_streams(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tiny.checkpoint(tmp_path / "model", rng)
    session = uniql_jax.Elastic(folder, context=96, batch=8)
    session.warm_up(RATES, sampling=False)
    server = Server(session, "tiny", limits=Limits(streams=2 * STREAMS))

    def idle() -> None:
        for _ in range(400):
            if not server.streams and not any(session.load_now().values()):
                return
            time.sleep(0.05)
        pytest.fail("something still runs")

    with serving(server) as url:
        load = Load(server, url, int(rng.integers(2**31)))
        asyncio.run(load.run(SECONDS / 4))  # so that what is kept once is there
        idle()
        session.rate = 0.0
        arrays, before = sum(x.nbytes for x in jax.live_arrays()), resident()
        asyncio.run(load.run(SECONDS))
        idle()
        session.rate = 0.0
        after, arrays_after = resident(), sum(x.nbytes for x in jax.live_arrays())
    assert load.wrong == []
    assert load.left > 5
    assert load.switches > 5
    assert arrays_after <= arrays * 1.05
    assert after <= before * 1.05
    models = {f"uniql-rate-{rate:g}": uniql_jax.load(folder, rate) for rate in RATES}

    @functools.cache
    def alone(prompt: str, new: int, fingerprint: str) -> str:
        return "".join(uniql_jax.generate(models[fingerprint], prompt, max_new_tokens=new, tokenizer=tiny.tokenizer()))

    at_one_rate = [answer for answer in load.finished if answer[2] in models]
    assert len(at_one_rate) > len(load.finished) / 3
    for prompt, new, fingerprint, text in at_one_rate:
        assert text == alone(prompt, new, fingerprint)
    print(f"{len(load.finished)} answers, {load.left} left, {load.switches} switches, {before} -> {after} bytes")
