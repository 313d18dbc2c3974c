"""What runs where a backend of Pallas, or the GPU itself, is missing: looked at one by one, said once, never wrong."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.pallas_cases import random_case, relative
from uniql_jax.commands import inspect
from uniql_jax.errors import UserError
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.pallas_kernels import compat, dispatch, jaxtriton
from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul, pallas, selfcheck, tuned
from uniql_jax.pallas_kernels.dequant_matmul import jaxtriton as through_triton
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight
from uniql_jax.runtime.loading import check_scales, load
from uniql_jax.weights.quantized import from_codes

H100 = "NVIDIA H100 80GB HBM3"
TILES = Weight("rows", 4096, 32, 128)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Dispatch as on a Hopper GPU; what is computed is computed here."""
    monkeypatch.setattr(compat, "capability", lambda: 9.0)
    monkeypatch.setattr(dispatch, "REFUSALS", {})
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return monkeypatch


@pytest.mark.parametrize("count", [1, 4, 5, 16, 17, 64, 65, 300])
def test_each_backend_is_looked_at_alone(gpu: pytest.MonkeyPatch, count: int) -> None:
    if compat.mosaic_gpu is None:
        pytest.skip("this JAX has no Mosaic GPU")
    assert pallas.missing() is None
    gpu.setattr(compat, "plgpu", None)
    assert pallas.missing() is None
    of_mosaic = [kernel for kernel, _ in tuned.choices(TILES, count, H100)]
    assert set(of_mosaic) <= {"cluster", "wgmma"}
    gpu.undo()


@pytest.mark.parametrize("count", [1, 16, 64, 300])
def test_without_mosaic_triton_runs(gpu: pytest.MonkeyPatch, count: int) -> None:
    gpu.setattr(compat, "mosaic_gpu", None)
    gpu.setattr("uniql_jax.pallas_kernels.dequant_matmul.hopper.common.plgpu", None)
    assert pallas.missing() is None
    kernels = {kernel for kernel, _ in tuned.choices(TILES, count, H100)}
    assert kernels
    assert not kernels & {"cluster", "wgmma"}


@pytest.mark.parametrize(("bits", "contract"), [(4, "last"), (4, "first"), (8, "last")])
@pytest.mark.parametrize("count", [1, 40])
def test_without_any_it_says_so_once_and_holds_no_dense_matrix(
    gpu: pytest.MonkeyPatch, rng: np.random.Generator, bits: int, contract: str, count: int
) -> None:
    gpu.setattr(compat, "plgpu", None)
    gpu.setattr(compat, "mosaic_gpu", None)
    group, width, out = 64, 512, 320
    codes = rng.integers(-7, 8, (out, width)).astype(np.int32)
    scales = rng.uniform(0.5, 1.5, (out, width // group)).astype(np.float32)
    shape = (out, width) if contract == "last" else (width, out)
    weight = from_codes(jnp.asarray(codes), jnp.asarray(scales), bits=bits, group=group, contract=contract, shape=shape)
    x = jnp.asarray(rng.standard_normal((count, width)), jnp.bfloat16)
    multiply = weight.rows if contract == "last" else weight.columns
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = multiply(x)
        multiply(x)
        text = str(jax.make_jaxpr(multiply)(x))
    if bits == 4:
        assert len([each for each in said if "inspect --kernels" in str(each.message)]) == 1
        assert any("no Pallas Triton backend" in refusal.reason for refusal in dispatch.REFUSALS)
    dense = np.asarray(weight.dense(), np.float64).reshape(shape)
    want = np.asarray(x, np.float64) @ (dense.T if contract == "last" else dense)
    assert relative(got, want) < 5e-3
    for whole in (shape, shape[::-1]):
        assert f"f32[{whole[0]},{whole[1]}]" not in text


def test_an_unknown_gpu_is_said_once(gpu: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator) -> None:
    """A whole model, bf16 and packed: one warning, whatever else refuses."""
    gpu.setattr(compat, "capability", lambda: 0.0)
    model = load(tiny.packed(tmp_path / "model", tiny.HF, 4, rng))
    assert model.dtype == jnp.bfloat16

    def run() -> jax.Array:
        logits, cache = prefill(model, jnp.ones((2, 3), jnp.int32), None, init_cache(model, 2, 8))
        for _ in range(2):
            logits, cache = decode(model, jnp.argmax(logits, axis=-1), cache)
        return logits

    with pytest.warns(RuntimeWarning, match="no fast kernel .*for NVIDIA GPUs of compute capability") as said:
        jax.eval_shape(run)  # kernels are chosen, and refuse, while they are traced
    assert len(said) == 1
    assert {"rope_qk", "decode of attention blocks"} <= {refusal.kernel for refusal in dispatch.REFUSALS}


def test_a_cpu_is_noted_once_and_for_packed_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, rng: np.random.Generator
) -> None:
    for bits, lines in ((16, 0), (4, 1)):
        dispatch.note.cache_clear()
        model = load(tiny.packed(tmp_path / f"model{bits}", tiny.HF, bits, rng))
        assert not caplog.records  # not by loading
        for length in (4, 5):
            jax.eval_shape(functools.partial(decode, model), jnp.ones(1, jnp.int32), init_cache(model, 1, length))
        assert len(caplog.records) == lines
    assert "for NVIDIA GPUs; on this CPU" in caplog.text


def test_a_wrong_kernel_is_noted_and_not_used(gpu: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    def wrong(kernel: str, layout: str) -> None:
        raise NotImplementedError(f"the {kernel} kernel is off by 1 for data in layout {layout!r} on this device")

    gpu.setattr(selfcheck, "verify", wrong)
    gpu.setattr(pallas, "fast", lambda *args, **more: True)
    case = random_case(rng, 40, 128, 64)
    x = jnp.asarray(rng.normal(size=(2, 128)), jnp.float32)
    with pytest.warns(RuntimeWarning, match="no fast kernel"):
        got = dequant_matmul(x, case.data, case.scale, **case.options)
    assert relative(got, np.asarray(x).astype(np.float64) @ case.dense.T) < 1e-5
    refused = {refusal.implementation: refusal.reason for refusal in dispatch.REFUSALS}
    assert "is right on this device" in refused["pallas"]
    assert refused.keys() & {"mma", "dot"}


@pytest.mark.parametrize(
    ("platform", "about", "version", "capability"),
    [
        ("gpu", "PJRT C API\ncuda 12090", "9.0", 9.0),
        ("gpu", "PJRT C API\nrocm 60300", "9.0", 0.0),
        ("gpu", "PJRT C API\nrocm 60300", "gfx942", 0.0),
        ("gpu", "PJRT C API\ncuda 12090", "9.0a", 0.0),
        ("tpu", "TFRT TPU v5", "9.0", 0.0),
        ("cpu", "<unknown>", "", 0.0),
    ],
)
def test_the_vendor_comes_before_the_capability(
    monkeypatch: pytest.MonkeyPatch, platform: str, about: str, version: str, capability: float
) -> None:
    client = types.SimpleNamespace(platform_version=about)
    device = types.SimpleNamespace(platform=platform, client=client, device_kind="a GPU", compute_capability=version)
    monkeypatch.setattr(compat.jax, "devices", lambda: [device])
    assert compat.capability() == capability


@pytest.mark.parametrize("rows", [2**19, 2**21])
def test_rows_beyond_32_bit_offsets_go_to_blocks(gpu: pytest.MonkeyPatch, rows: int) -> None:
    """x or the product has 2**31 elements: refused while it is traced, by every kernel."""
    gpu.setattr(jaxtriton, "missing", lambda: None)
    gpu.setattr(through_triton, "verify", lambda *args: None)
    width, features = (4096, 64) if rows == 2**19 else (1024, 64)
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    data, scale = jnp.zeros((features, width // 8), jnp.int32), jnp.ones((features, width // 128), jnp.bfloat16)
    for name in ("pallas", "jax-triton"):
        run = functools.partial(dequant_matmul, bits=4, group=128, contract="last", width=width, implementation=name)
        with pytest.raises(NotImplementedError, match="counts elements in 32 bits"):
            jax.eval_shape(run, x, data, scale)


def test_arrays_beyond_32_bit_offsets_are_refused() -> None:
    shape = jax.ShapeDtypeStruct((64, 2**17, 8, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"\(64, 131072, 8, 128\) has 8589934592, more than 2147483647"):
        compat.check_offsets("decode_attention", [shape])
    compat.check_offsets("decode_attention", [jax.ShapeDtypeStruct((2**31 - 1,), jnp.int8)])


@pytest.mark.parametrize("scale", [2.0**27, -(2.0**27), np.inf])
def test_scales_that_no_weight_has_are_refused_at_load(
    scale: float, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = np.ones((3, 64), np.int32), np.full((3, 1), 2.0**26, np.float32)
    options = dict(bits=4, group=64, contract="last", shape=(3, 64))
    check_scales(jax.tree.map(np.asarray, from_codes(jnp.asarray(codes), jnp.asarray(scales), **options)), "mlp.up")
    scales[1] = scale
    with pytest.raises(UserError, match=r"mlp.up has a scale of .*, at or above 2\^27"):
        check_scales(jax.tree.map(np.asarray, from_codes(jnp.asarray(codes), jnp.asarray(scales), **options)), "mlp.up")
    folder = tiny.packed(tmp_path / "model", tiny.HF, 4, rng)
    load(folder)
    monkeypatch.setattr("uniql_jax.runtime.loading.LARGEST_SCALE", 1e-3)
    with pytest.raises(UserError, match="2\\^27"):
        load(folder)


def test_inspect_shows_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main(["--kernels"])
    out = capsys.readouterr().out
    assert jax.devices()[0].device_kind in out
    for name in ("dequant_matmul", "causal_attention", "mma (rows)", "cluster (groups)", "Pallas Triton"):
        assert name in out
    if jax.default_backend() == "cpu":
        assert "for NVIDIA GPUs" in out


BLOCKED = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import jax.numpy as jnp
from uniql_jax.pallas_kernels import compat
from uniql_jax.weights.quantized import from_codes
weight = from_codes(jnp.ones((32, 64), jnp.int32), jnp.ones((32, 1)), bits=4, group=64, contract="last", shape=(32, 64))
assert float(weight.rows(jnp.ones((1, 64))).sum()) == 32 * 64
print(compat.plgpu is None, compat.mosaic_gpu is None)
"""


def test_imports_that_fail_are_declined() -> None:
    modules = ["jax.experimental.pallas.triton", "jax.experimental.pallas.mosaic_gpu", "jax.experimental.mosaic.gpu"]
    command = [sys.executable, "-c", BLOCKED, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
