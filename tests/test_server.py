"""The server through its sockets: OpenAI's own client, answers that are `generate`'s, and hostile requests."""

from __future__ import annotations

import functools
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import uniql_jax
from tests import tiny
from uniql_jax.runtime.generation import decode_stream, prompt_ids
from uniql_jax.server import schemas
from uniql_jax.server.app import Server
from uniql_jax.server.choices import StopFilter
from uniql_jax.server.http import Keys, Limits
from uniql_jax.server.running import serving

NEW = 12
KEY, ADMIN = "a-key-of-the-tests", "an-admin-key-of-the-tests"
PROMPT = "Once there was"
LIMITS = Limits(body_bytes=20_000, body_seconds=1.0, tokens=64, default_tokens=NEW, streams=12, seconds=60.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(11))


@pytest.fixture(scope="module")
def server(folder: Path) -> Server:
    session = uniql_jax.Elastic(folder, context=96, batch=3)
    return Server(session, "tiny", keys=Keys(KEY, ADMIN), limits=LIMITS, quality={0.0: 12.5})


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    with serving(server) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=100) as made:
        yield made


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=100) as made:
        yield made


@functools.cache
def model_at(folder: Path, rate: float) -> Any:
    return uniql_jax.load(folder, rate)


def alone(folder: Path, prompt: Any = PROMPT, rate: float = 0.0, new: int = NEW, **options: Any) -> str:
    """What `generate` makes of it; always of one length, so that little is compiled, and then cut."""
    ids = prompt_ids(tiny_tokenizer(), prompt, False) if isinstance(prompt, str) else np.asarray(prompt, np.int32)
    tokens = uniql_jax.generate(model_at(folder, rate), ids, max_new_tokens=64, **options)
    made = [int(token[0]) for token in itertools.islice(tokens, new)]
    return "".join(decode_stream(tiny_tokenizer(), iter(made), ids.tolist()))


@functools.cache
def tiny_tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = tiny.CHAT_TEMPLATE
    return made


def idle(server: Server) -> bool:
    """Whether nothing runs any more, waiting a little for it."""
    for _ in range(200):
        if not server.streams and not any(server.session.load_now().values()):
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------------ OpenAI's client


def test_completion(client: openai.OpenAI, folder: Path) -> None:
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NEW, temperature=0)
    [choice] = done.choices
    assert choice.text == alone(folder)
    assert choice.finish_reason == "length"
    assert done.usage is not None
    prompt = len(tiny.tokenizer()(PROMPT)["input_ids"])
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt, NEW)
    assert done.system_fingerprint == "uniql-rate-0"


def test_completion_stream_and_draws(client: openai.OpenAI, folder: Path) -> None:
    options: dict[str, Any] = dict(model="tiny", prompt=PROMPT, max_tokens=NEW, temperature=0.9, top_p=0.8, seed=7)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == alone(folder, temperature=0.9, top_p=0.8, seed=7)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NEW
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    whole = client.completions.create(n=3, **options)
    assert [choice.text for choice in whole.choices] == [
        alone(folder, temperature=0.9, top_p=0.8, seed=seed) for seed in (7, 8, 9)
    ]
    assert client.completions.create(**(options | {"seed": None})).choices[0].text


def test_prompts_of_ids_and_of_several_texts(client: openai.OpenAI, folder: Path) -> None:
    ids = tiny.tokenizer()(PROMPT)["input_ids"]
    prompts: list[Any] = [ids, [ids, ids[:1]], [PROMPT, "The people"]]
    for prompt in prompts:
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
        each = [prompt] if isinstance(prompt[0], int) else prompt
        wanted = [alone(folder, np.asarray(p, np.int32) if isinstance(p, list) else p, new=4) for p in each]
        assert [choice.text for choice in done.choices] == wanted
        assert [choice.index for choice in done.choices] == list(range(len(wanted)))


def test_chat(client: openai.OpenAI, folder: Path) -> None:
    turns: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "people"}]},
    ]
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the people"}]
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    wanted = alone(folder, ids, new=NEW)
    done = client.chat.completions.create(model="tiny", messages=turns, temperature=0)
    assert done.choices[0].message.content == wanted
    assert done.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="tiny", messages=turns, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[0].choices[0].delta.role == "assistant"


def test_prompts_that_were_read_before(
    client: openai.OpenAI, http: httpx.Client, folder: Path, rng: np.random.Generator
) -> None:
    """Whole answers and streams say how many tokens of their prompts were there already; so do the numbers."""
    ids = rng.integers(3, 256, 30).tolist()
    options: dict[str, Any] = dict(model="tiny", prompt=ids, max_tokens=NEW, temperature=0)
    found = []
    for more in ({}, {"n": 2}, {"prompt": [*ids, 5, 6, 7]}):
        done = client.completions.create(**options | more)
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        found.append(done.usage.prompt_tokens_details.cached_tokens)
        wanted = alone(folder, np.asarray((options | more)["prompt"], np.int32))
        assert {choice.text for choice in done.choices} == {wanted}
    assert found == [0, 29, 30]
    *_, last = client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 29
    lines = http.get("/metrics").text.splitlines()
    counted = next(line for line in lines if line.startswith("uniql_cached_prompt_tokens_total"))
    assert float(counted.split()[1]) >= sum(found)


def test_stop_strings(client: openai.OpenAI, folder: Path) -> None:
    """The text ends before the first of them, however tokens cut it, streamed or not, and a row is free again."""
    whole = alone(folder)
    for stop in (whole[5:7], whole[-1], "never", [whole[6:9], whole[3:5]]):
        stops = [stop] if isinstance(stop, str) else stop
        places = [whole.find(s) for s in stops if s in whole]
        wanted = whole[: min(places)] if places else whole
        options: dict[str, Any] = dict(model="tiny", prompt=PROMPT, max_tokens=NEW, temperature=0, stop=stop)
        [choice] = client.completions.create(**options).choices
        assert choice.text == wanted
        assert choice.finish_reason == ("stop" if places else "length")
        chunks = list(client.completions.create(stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted


def test_logprobs(client: openai.OpenAI, server: Server) -> None:
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2)
    found = done.choices[0].logprobs
    assert found is not None
    ids = tiny.tokenizer()(PROMPT)["input_ids"]
    tokens = [int(t[0]) for t in uniql_jax.generate(server.session.model, np.asarray(ids, np.int32), max_new_tokens=5)]
    decode = tiny.tokenizer().decode
    assert found.tokens == [decode([token]) for token in tokens]
    logits = jax.jit(lambda model, text: model(text)[0])(server.session.model, jnp.asarray([ids + tokens]))
    scores = np.asarray(logits, np.float64)[len(ids) - 1 : -1]
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.token_logprobs, scores[np.arange(5), tokens], atol=1e-4)
    assert found.top_logprobs is not None
    assert all(1 <= len(top) <= 2 for top in found.top_logprobs)
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=3, max_tokens=4
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [len(item.top_logprobs) for item in chat.choices[0].logprobs.content] == [3] * 4


def test_many_at_once_are_each_alone(client: openai.OpenAI, folder: Path) -> None:
    prompts = ["Once", "The people of", "def forward", "at home and", "a naïve", "peace", "to everyone", "in"]
    found: dict[str, str] = {}

    def ask(prompt: str, new: int) -> None:
        found[prompt] = (
            client.completions.create(model="tiny", prompt=prompt, max_tokens=new, temperature=0).choices[0].text
        )

    threads = [threading.Thread(target=ask, args=(p, 5 + 3 * i)) for i, p in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert found == {p: alone(folder, p, new=5 + 3 * i) for i, p in enumerate(prompts)}


def test_models(client: openai.OpenAI, folder: Path) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny"
    assert "tiny@0.25" in names
    assert client.models.retrieve("tiny@0.25").id == "tiny@0.25"
    done = client.completions.create(model="tiny@0", prompt=PROMPT, max_tokens=3, temperature=0)
    assert done.choices[0].text == alone(folder, new=3)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_each_call_at_its_own_rate(client: openai.OpenAI, http: httpx.Client, folder: Path, server: Server) -> None:
    """One streams at whatever there is while others run at theirs; numbers and lists say so."""
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=64, temperature=0, stream=True)
    first, weights = next(stream), server.session.memory()["weights"]
    done = client.completions.create(model="tiny@0.25", prompt=PROMPT, max_tokens=NEW, temperature=0, n=2)
    assert [choice.text for choice in done.choices] == [alone(folder, rate=0.25)] * 2
    assert (done.model, done.system_fingerprint) == ("tiny@0.25", "uniql-rate-0.25")
    assert server.session.memory()["weights"] == weights
    chunks = [first, *stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone(folder, new=64)
    assert {chunk.system_fingerprint for chunk in chunks} == {"uniql-rate-0"}
    metrics = http.get("/metrics").text
    assert 'uniql_rate_tokens_total{rate="0.25"}' in metrics
    assert 'uniql_rate_active{rate="0.0"}' in metrics or 'uniql_rate_active{rate="0"}' in metrics


def test_rates_that_the_weights_do_not_hold(client: openai.OpenAI, http: httpx.Client, folder: Path) -> None:
    """After a shrink, lists say what is still there, calls for the rest are refused, and those under way end so."""
    admin = {"Authorization": f"Bearer {ADMIN}"}
    stream = client.completions.create(model="tiny@0", prompt=PROMPT, max_tokens=64, temperature=0, stream=True)
    try:
        next(stream)
        assert http.post("/admin/rate", json={"rate": 0.25}, headers=admin).status_code == 200
        with pytest.raises(openai.APIError, match="does not hold"):
            list(stream)
        listed = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
        assert not listed["tiny@0"]["available"]
        assert listed["tiny@0.25"]["running"]
        assert listed["tiny@0.3"]["available"]
        for streams in (True, False):
            with pytest.raises(openai.ConflictError, match=r"0 needs weights that a session at 0\.25 does not hold"):
                client.completions.create(model="tiny@0", prompt=PROMPT, stream=streams)
    finally:
        assert http.post("/admin/rate", json={"rate": 0}, headers=admin).json()["rate"] == 0


# ------------------------------------------------------------------------------------------------ the rate


def test_the_rate_changes_live(client: openai.OpenAI, http: httpx.Client, folder: Path, server: Server) -> None:
    admin = {"Authorization": f"Bearer {ADMIN}"}
    try:
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, temperature=0, stream=True)
        chunks = [next(stream)]
        answer = http.post("/admin/rate", json={"rate": 0.25}, headers=admin)
        assert answer.json()["rate"] == 0.25
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert "0.25" in str(chunks[-1].system_fingerprint) or chunks[-1].system_fingerprint == "uniql-rate-0"
        done = client.completions.create(model="tiny@0.25", prompt=PROMPT, max_tokens=NEW, temperature=0)
        assert done.choices[0].text == alone(folder, rate=0.25)
        assert done.system_fingerprint == "uniql-rate-0.25"
        status = http.get("/status").json()
        assert status["rate"] == 0.25
        assert status["memory"]["weights"] < server.session.bytes_at(0.0)
        metrics = http.get("/metrics").text
        assert "uniql_prune_rate 0.25" in metrics
        assert 'uniql_requests_total{path="/v1/completions",status="200"}' in metrics
    finally:
        assert http.post("/admin/rate", json={"memory_budget": "1TB"}, headers=admin).json()["rate"] == 0


@pytest.mark.parametrize(
    ("body", "says"),
    [({"rate": 0.5}, "rate"), ({}, "either"), ({"rate": 0.1, "memory_budget": "1GB"}, "either"),
     ({"memory_budget": "1KB"}, "too little"), ({"memory_budget": "much"}, "3GiB"), ({"rate": True}, "rate"),
     ({"memory_budget": "1e3GiB"}, "3GiB"), ({"memory_budget": 10**40}, "budget"), ({"memory_budget": 1.5}, "budget"),
     ({"memory_budget": "0%"}, "share"), ({"memory_budget": []}, "budget"), ({"rate": "0.1"}, "rate"),
     ({"rate": 10**400}, "rate"), ({"rate": None}, "either"), ({"rate": -1e-9}, "rate"), ({"rate": 0.1, "x": 1}, "x")],
)  # fmt: skip
def test_rates_that_cannot_be(http: httpx.Client, body: dict[str, Any], says: str) -> None:
    answer = http.post("/admin/rate", json=body, headers={"Authorization": f"Bearer {ADMIN}"})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ hostile requests


def refused(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of a refusal, which is one clear sentence in JSON."""
    assert answer.status_code in statuses, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert "Traceback" not in error["message"]
    return error


GOOD: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 1, "temperature": 0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": 10**9}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 90}, "max_tokens"),
        ({"max_tokens": 64, "prompt": [3] * 60}, "context"), ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"temperature": -1}, "temperature"),
        ({"temperature": 99}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 1.1}, "top_p"),
        ({"n": 17}, "n:"), ({"n": 0}, "n:"), ({"prompt": ""}, "empty"), ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"), ({"prompt": [999999]}, "vocabulary"), ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": ["a"] * 17}, "prompt"),
        ({"stop": [""]}, "stop"), ({"stop": ["a"] * 5}, "stop"),
        ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"), ({"echo": True}, "echo"), ({"frequency_penalty": 1.0}, "not supported"),
        ({"unknown": 1}, "unknown"), ({"model": "../../etc/passwd"}, "no model"), ({"model": 3}, "model"),
        ({"model": "tiny@nan"}, "no model"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)  # fmt: skip
def test_bad_fields(http: httpx.Client, change: dict[str, Any], says: str) -> None:
    error = refused(http.post("/v1/completions", json=GOOD | change), 400, 404)
    assert says in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 9000, b'{"model": "tiny"' + b" " * 5000,
     b'{"model":"tiny","prompt":"hi","temperature":NaN}', b'{"model":"tiny","prompt":"hi","max_tokens":1e999}',
     b'{"model":"tiny","prompt":"hi","max_tokens":' + b"9" * 6000 + b"}", b'{"model":"tiny","prompt":"\\ud800"}',
     b'{"model":"tiny","prompt":"hi","stop":["\\udc00"]}', b'{"\\ud800":1}', b'{"model":"\\ud83d"}',
     b'{"model":"tiny","model":"tiny","prompt":"hi"}', b'{"model":"tiny","prompt":"hi","user":{"a":1,"a":2}}',
     b'\xef\xbb\xbf{"model":"tiny"}', b'{"model":"tiny","prompt":' + b"[" * 3000 + b"]" * 3000 + b"}"],
)  # fmt: skip
def test_bad_json(http: httpx.Client, body: bytes) -> None:
    refused(http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), 400)
    refused(http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}), 400)


def test_huge_bodies(http: httpx.Client) -> None:
    """By their word, and without a word."""
    json_type = {"Content-Type": "application/json"}
    refused(http.post("/v1/completions", json=GOOD | {"prompt": "a" * 30_000}), 413)
    refused(http.post("/v1/completions", content=(b"x" * 5000 for _ in range(6)), headers=json_type), 413)
    for kind in ("text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        refused(http.post("/v1/completions", content=b"{}", headers={"Content-Type": kind}), 415)
    refused(http.post("/v1/completions", content=b"{}", headers=json_type | {"Content-Encoding": "gzip"}), 415)


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [("GET", "/v1/completions", (404, 405)), ("POST", "/v1/nothing", (404, 405)), ("GET", "/../../etc/passwd", (404,)),
     ("GET", "/%2e%2e/%2e%2e/etc/passwd", (404,)), ("GET", "/..%2f..%2fetc/passwd", (404,)), ("GET", "/app.py", (404,)),
     ("GET", "/%00", (404,)), ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", (404,)), ("DELETE", "/", (405,)),
     ("GET", "/admin/rate", (404, 405))],
)  # fmt: skip
def test_paths_that_are_not(http: httpx.Client, method: str, path: str, statuses: tuple[int, ...]) -> None:
    refused(http.request(method, path), *statuses)


def test_keys(url: str) -> None:
    with httpx.Client(base_url=url, timeout=30) as bare:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ):
            refused(bare.post("/v1/completions", json=GOOD, headers=headers), 401)
            refused(bare.get("/status", headers=headers), 401)
            refused(bare.post("/admin/rate", json={"rate": 0.1}, headers=headers), 401)
        refused(bare.post("/admin/rate", json={"rate": 0.1}, headers={"Authorization": f"Bearer {KEY}"}), 401)
        assert bare.get("/status", headers={"Authorization": f"Bearer {ADMIN}"}).status_code == 200
        assert bare.get("/health").json() == {"status": "ok"}
        page = bare.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]


def test_pages_of_other_sites(http: httpx.Client, url: str) -> None:
    host = url.removeprefix("http://")
    refused(http.get("/status", headers={"Origin": "https://evil.example"}), 403)
    refused(http.get("/status", headers={"Origin": "http://["}), 403)
    refused(http.get("/status", headers={"Host": "evil.example"}), 403)
    refused(http.post("/admin/rate", json={"rate": 0.1}, headers={"Origin": "null"}), 403)
    assert http.get("/status", headers={"Origin": url}).status_code == 200
    assert http.get("/status", headers={"Host": f"localhost:{host.rpartition(':')[2]}"}).status_code == 200


def raw(url: str, *parts: bytes, pause: float = 0.0, patience: float = 20.0) -> bytes:
    """What comes back for bytes that are sent one after another, until the server hangs up."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=patience) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except ConnectionResetError:
            pass
        return found


def test_slow_senders(url: str) -> None:
    """Headers, or a body, that never come: the server hangs up within its limit."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
    start = time.monotonic()
    assert raw(url, head) == b""
    assert raw(url) == b""
    late = raw(url, head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    assert late.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start < 4 * LIMITS.body_seconds + 3


JSON_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01garbage\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
     JSON_HEAD + b"Content-Length: -5\r\n\r\n", JSON_HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
     JSON_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
     JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n"],
)  # fmt: skip
def test_what_is_no_http(url: str, sent: bytes) -> None:
    assert raw(url, sent).startswith((b"HTTP/1.1 400", b"HTTP/1.1 401"))  # one whose body is not read lacks the key


def test_whoever_hangs_up_is_forgotten(http: httpx.Client, server: Server) -> None:
    long = GOOD | {"max_tokens": 64, "prompt": "Once there"}
    for stream in (True, False, True, False):
        body = json.dumps(long | {"stream": stream}).encode()
        host = str(http.base_url.host)
        with socket.create_connection((host, http.base_url.port), timeout=20) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            if stream:
                assert connection.recv(100)
    assert idle(server)
    assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_more_than_there_is_room_for(http: httpx.Client, client: openai.OpenAI, server: Server) -> None:
    streams = [
        client.completions.create(model="tiny", prompt="Once", max_tokens=64, temperature=0, stream=True, n=6)
        for _ in range(2)
    ]
    try:
        if server.streams == LIMITS.streams:
            answer = http.post("/v1/completions", json=GOOD)
            refused(answer, 429)
            assert answer.headers["retry-after"]
    finally:
        for stream in streams:
            stream.close()
    assert idle(server)
    refused(http.post("/v1/completions", json=GOOD | {"n": 13}), 429)


FIELDS = st.sampled_from(
    ["x", *dict.fromkeys(name for kind in (schemas.Completion, schemas.Chat, schemas.Setting, schemas.Message,
                                           schemas.Part, schemas.StreamOptions) for name in kind.model_fields)]
)  # fmt: skip
EDGES = st.sampled_from(
    [-1, 0, 1, 2, 20, 21, 2**31, 2**32, 2**63, -(2**63), 10**19, 1e-320, -0.0, "text", "user", "hi"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | EDGES | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/admin/rate"]),
    change=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3),
)
def test_mutated_bodies(http: httpx.Client, path: str, change: dict[str, Any]) -> None:
    """Whatever is in the fields: an answer, or a refusal that says why."""
    base: dict[str, Any] = {"max_tokens": 1, "model": "tiny"}
    base |= {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps((base if path.startswith("/v1") else {"rate": 0.0}) | change)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN}"}
    answer = http.post(path, content=body, headers=headers)
    if answer.status_code != 200:
        refused(answer, 400, 404, 409)
    elif path.startswith("/v1"):
        assert answer.text.rstrip().endswith(("}", "[DONE]"))
    else:
        assert 0 <= answer.json()["rate"] <= 0.35


def test_nothing_was_harmed(http: httpx.Client, client: openai.OpenAI, folder: Path, server: Server) -> None:
    """After all of the above: idle, still right, and at the rate that it is given."""
    assert idle(server)
    http.post("/admin/rate", json={"rate": 0}, headers={"Authorization": f"Bearer {ADMIN}"})
    assert http.get("/status").json()["rate"] == 0
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NEW, temperature=0)
    assert done.choices[0].text == alone(folder)


# ------------------------------------------------------------------------------------------------ parts


@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    cut=st.integers(1, 4),
)
def test_stop_filter_is_find(text: str, stops: list[str], cut: int) -> None:
    """Piece by piece it shows what a search of the whole text would, and never takes anything back."""
    found, shown = StopFilter(stops), ""
    ended = None
    for i in range(0, len(text), cut):
        shown += found.push(text[i : i + cut])
        if found.stopped:
            ended = i + cut
            break
    else:
        shown += found.push("", last=True)
    seen = text[:ended] if ended is not None else text
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert shown == (seen[: min(places)] if places else seen)
    assert found.stopped == bool(places)


def test_a_stopping_server_lets_answers_end(folder: Path) -> None:
    server = Server(uniql_jax.Elastic(folder, context=96, batch=3), "tiny", limits=LIMITS)
    got: list[httpx.Response] = []
    with serving(server, drain=60) as address:
        ask = threading.Thread(
            target=lambda: got.append(
                httpx.post(f"{address}/v1/completions", json=GOOD | {"max_tokens": 60}, timeout=90)
            )
        )
        ask.start()
        while not server.streams and ask.is_alive():
            time.sleep(0.01)
    ask.join(60)
    assert got[0].status_code == 200
    assert got[0].json()["usage"]["completion_tokens"] >= 1
    assert not server.worker.alive
