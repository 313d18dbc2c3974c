"""Every test runs on the CPU (unless the environment says otherwise), offline, with types and shapes checked.

Random inputs come from the `rng` fixture: another draw for every test, the same draw on every run; `--seed N` gives
fresh ones.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Before jax and transformers are imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Processes of the suite, commands that it starts, and the next run share what is compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tiny models run in no time and compile in minutes: leave optimizations out. (On a GPU they make the kernels.)
    XLA_FLAGS = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jax").startswith("0.10."):  # XLA ends a process whose flags it does not know
        XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if os.environ.get("UNIQL_TYPECHECK", "1") != "0":
    # Before our packages are imported: every annotated call in the tests then checks its shapes and dtypes.
    from jaxtyping import install_import_hook

    import tests.typecheck  # noqa: F401  the hook finds it by name, but does not import it

    install_import_hook(["uniql_jax", "tools"], "tests.typecheck.check")

# A first example compiles, so no deadline; few examples, since a new shape is a new compilation.
settings.register_profile(
    "uniql",
    deadline=None,
    max_examples=25,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("uniql")


ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"


def pytest_configure() -> None:
    """Several processes share a GPU; bounds of float32 are float32's, not TF32's."""
    if not ON_CPU:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seed N`: other random inputs than last time."""
    parser.addoption("--seed", type=int, default=0, help="base seed of the random inputs")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where JAX may take a GPU, the kernels' suites are GPU tests: the same cases, compiled instead of interpreted."""
    for item in items:
        if not ON_CPU and item.path.name.startswith("test_pallas_"):
            item.add_marker("gpu")
            item.add_marker(pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"))


def pytest_report_header(config: pytest.Config) -> str:
    """What it takes to repeat a run."""
    return f"uniql-jax: seed {config.getoption('--seed')}, JAX_PLATFORMS={os.environ['JAX_PLATFORMS'] or '(any)'}"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The run's base seed."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def rng(request: pytest.FixtureRequest, seed: int) -> np.random.Generator:
    """A generator of this test's own."""
    return np.random.default_rng([seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 to choose and to lower for, if not to run on."""
    from uniql_jax.pallas_kernels import compat

    if compat.mosaic_gpu is None:
        pytest.skip("this JAX has no Mosaic GPU")
    monkeypatch.setattr(compat, "capability", lambda: 9.0)
    monkeypatch.setattr(compat, "cores", lambda: 132)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Kernels check themselves although a CPU interprets them, and remember in the folder returned."""
    from uniql_jax.pallas_kernels import selfcheck

    monkeypatch.setattr(selfcheck, "needed", lambda: True)
    monkeypatch.setattr(selfcheck, "FOUND", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Callable[[str], Path]:
    """name of a published config -> folder of its tiny random model, saved by transformers, hub-style config.json.

    Built once per name and process; read only.
    """
    from tests import published, reference

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            config = published.shrunk(name)
            model = reference.build(config, seed + zlib.crc32(name.encode()))
            made[name] = reference.save(model, tmp_path_factory.mktemp(name) / "hub", config)
        return made[name]

    return folder


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """A file's compiled programs are of no use to the next: gigabytes, and a process may map only so many regions."""
    yield
    import jax

    jax.clear_caches()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what is freed
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session", autouse=True)
def _quiet_libraries() -> None:
    """Imports whose own warnings are not ours happen here once; what our code does afterwards is held to errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax

    assert not jax.config.jax_enable_x64
