"""Streams on disk, in memory and on neither; files written in order behind the work, and errors of writing."""

from __future__ import annotations

import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.compression.artifacts import LayerStore
from uniql_jax.compression.streams import DTYPES, StreamStore, Windows
from uniql_jax.compression.writer import Writer


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def windows(rng: np.random.Generator) -> Windows:
    """Five windows of six tokens, in batches of two, two and one."""
    return Windows(rng.integers(0, 9, (5, 6)).astype(np.int32), 12)


def _stream(windows: Windows, dtype: str, rng: np.random.Generator) -> list[jnp.ndarray]:
    return [jnp.asarray(rng.standard_normal((*batch.shape, 3)), DTYPES[dtype]) for batch in windows.batches]


def _same(found: list, stream: list) -> None:
    assert len(found) == len(stream)
    for a, b in zip(found, stream, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("behind", [False, True])
def test_what_is_kept_comes_back_bit_by_bit(
    behind: bool, dtype: str, windows: Windows, rng: np.random.Generator, tmp_path: Path
) -> None:
    values = [_stream(windows, dtype, rng) for _ in range(5)]
    with Writer() as writer:
        store = StreamStore(tmp_path, windows, 2, dtype, writer if behind else None)
        assert [store.save("x", i, value) for i, value in enumerate(values)] == [True, False, True, False, True]
        assert [store.has("x", i) for i in range(5)] == [True, False, True, False, True]
        _same(store.load("x", 4), values[4])
    again = StreamStore(tmp_path, windows, 2, dtype)
    _same(again.load("x", 2), values[2])
    assert again.nearest("x", 3) == 2
    assert again.nearest("y", 3) is None
    again.drop("x", range(3))
    assert [again.has("x", i) for i in range(5)] == [False, False, False, False, True]


def test_memory_is_held_while_there_is_room(
    dtype: str, windows: Windows, rng: np.random.Generator, tmp_path: Path
) -> None:
    values = [_stream(windows, dtype, rng) for _ in range(4)]
    size = sum(part.nbytes for part in values[0])
    with Writer() as writer:
        store = StreamStore(tmp_path, windows, 100, dtype, writer, held_bytes=2 * size)
        for i, value in enumerate(values):
            store.hold("x", i + 1, value)
        assert [store.has("x", i + 1) for i in range(4)] == [True, True, False, False]
        for i in range(2):
            _same(store.load("x", i + 1), values[i])
        store.release("x", 1)
        store.hold("x", 3, values[2])
        assert [store.has("x", i + 1) for i in range(4)] == [False, True, True, False]
        store.hold("x", 4, values[3], always=True)
        _same(store.load("x", 4), values[3])
    assert not list(tmp_path.iterdir())


def test_files_are_written_in_order_and_unlinked_after(tmp_path: Path) -> None:
    seen: list[int] = []
    gate = threading.Event()
    with Writer(ahead=10) as writer:
        writer.submit(gate.wait)
        for i in range(5):
            writer.submit(seen.append, i)
        assert seen == []
        gate.set()
        writer.flush()
        assert seen == list(range(5))


def test_an_error_of_writing_reaches_the_work(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    def submit(ahead: int, times: int) -> None:
        with Writer(ahead) as writer:
            for _ in range(times):
                writer.submit(fail)

    for ahead, times in ((4, 1), (1, 20)):
        with pytest.raises(OSError, match="No space"):
            submit(ahead, times)


def test_what_has_not_begun_is_dropped_after_an_error(tmp_path: Path) -> None:
    gate, seen = threading.Event(), []

    def run() -> None:
        with Writer(ahead=10) as writer:
            writer.submit(gate.wait)
            writer.submit(seen.append, 1)
            threading.Timer(0.05, gate.set).start()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run()
    assert seen == []


def test_a_layer_store_waits_for_what_it_is_asked(tmp_path: Path) -> None:
    gate = threading.Event()
    with Writer(ahead=10) as writer:
        store = LayerStore(tmp_path, writer)
        writer.submit(gate.wait)
        store.save("a", {"w": jnp.arange(3.0)}, {"loss": 1})
        assert not (tmp_path / "a.safetensors").exists()
        threading.Timer(0.05, gate.set).start()
        assert store.has("a")
        assert store.record("a") == {"loss": 1}
        np.testing.assert_array_equal(store.load("a")["w"].astype(np.float32), [0, 1, 2])
