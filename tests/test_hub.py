"""Downloads from a hub that counts: only the bytes of a rate, once, whole, and again after whatever went wrong."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import uniql_jax
from tests import hub_server
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.errors import UserError
from uniql_jax.files import save_tensors
from uniql_jax.partial import PartialFile, joined, merged, without
from uniql_jax.runtime import hub as client

GOLDEN = Path(__file__).parent / "golden"
REPO = "someone/elastic"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(client.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    with hub_server.hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        # as a new process would have it
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.add(REPO, GOLDEN / "llama")
        yield server


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: tuple(sorted(pair))), max_size=8)


@given(ranges, ranges)
def test_ranges_are_sets_of_bytes(a: list, b: list) -> None:
    def bytes_of(found: list) -> set[int]:
        return {at for start, end in found for at in range(start, end)}

    assert bytes_of(merged(a)) == bytes_of(a)
    assert bytes_of(without(a, b)) == bytes_of(a) - bytes_of(b)
    more = joined(a, waste=0.5)
    assert bytes_of(a) <= bytes_of(more)
    assert len(bytes_of(more)) <= 1.5 * len(bytes_of(a))
    for found in (merged(a), without(a, b), more):
        assert all(x[1] < y[0] for x, y in itertools.pairwise(found))


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_a_rate_costs_its_bytes(hub: Any, family: str) -> None:
    folder = GOLDEN / family
    hub.add(REPO, folder)
    model = uniql_jax.load(REPO, 0.35)
    same(model, uniql_jax.load(folder, 0.35))
    headers = total(folder) - open_checkpoint(folder).weight_bytes()
    assert hub.weights_sent <= 1.03 * open_checkpoint(folder).weight_bytes(0.35) + headers
    before = hub.weights_sent
    same(uniql_jax.load(REPO, 0.35), model)  # all there: nothing is fetched
    assert hub.weights_sent == before
    same(uniql_jax.load(REPO, 0.0), uniql_jax.load(folder, 0.0))  # what the higher rate lacks comes, and no more
    assert hub.weights_sent <= 1.05 * total(folder)
    assert Path(str(model.folder)).is_dir()


def test_bytes_over_the_wire_at_a_high_rate(hub: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """A model with its usual share of MLPs, sent whole and at 0.35, in several files."""
    from tests import compressed, published, reference
    from uniql_jax.compression.pipeline import compress
    from uniql_jax.compression.settings import CompressionSettings
    from uniql_jax.convert.source import open_source

    hf = published.shrink(published.LLAMA_3_1_8B, num_hidden_layers=4, intermediate_size=1024)
    reference.save(reference.build(hf, 0), tmp_path / "m", hf)
    settings = CompressionSettings(rounding="nearest", scale_search=False, plan="uniform")
    compress(open_source(tmp_path / "m"), tmp_path / "whole", compressed.tokens(rng, 4, 48), settings)
    split(tmp_path / "whole", tmp_path / "ours", 3)
    hub.add(REPO, tmp_path / "ours")
    sent = {}
    for rate in (0.35, 0.0):
        shutil.rmtree(client.cache_folder(), ignore_errors=True)
        hub.sent.clear()
        same(uniql_jax.load(REPO, rate), uniql_jax.load(tmp_path / "ours", rate))
        sent[rate] = sum(hub.sent.values())
    assert sent[0.35] <= 0.72 * sent[0.0]


def split(folder: Path, out: Path, count: int) -> None:
    """The same checkpoint in several files."""
    from safetensors.numpy import load_file

    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(folder / "model.safetensors")
    names, where = list(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        own = names[i * len(names) // count : (i + 1) * len(names) // count]
        save_tensors({name: tensors[name] for name in own}, out / file, {"format": "pt"})
        where |= dict.fromkeys(own, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_revisions(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, GOLDEN / "qwen2", "old")
    commit = hub_server.COMMITS["old"]
    for revision in ("old", commit):
        assert uniql_jax.load(REPO, 0.35, revision=revision).config.model_type == "qwen2"
    assert uniql_jax.load(REPO, 0.35).config.model_type == "llama"
    with pytest.raises(UserError, match="has no revision 'never'"):
        uniql_jax.load(REPO, revision="never")
    with pytest.raises(UserError, match="is no hub id"):
        uniql_jax.load(GOLDEN / "llama", revision="old")
    # a commit never changes: no question is asked about it again
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert uniql_jax.load(REPO, 0.35, revision=commit).config.model_type == "qwen2"
    assert uniql_jax.load(REPO, 0.35).config.model_type == "llama"  # offline: what main was last
    with pytest.raises(UserError, match="cannot fetch someone/elastic, which is no folder here") as error:
        uniql_jax.load(REPO, 0.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (lambda hub: hub.repos.clear(), "is no folder here and no repository"),
        (lambda hub: hub.private.add(REPO), r"private one: log in \(hf auth login\)"),
        (lambda hub: hub.gated.add(REPO), "accept its terms"),
        (lambda hub: hub.add(REPO, GOLDEN / "../train"), "it has no config.json"),
        (lambda hub: hub.add(REPO, GOLDEN / "../../examples/tiny/qwen2"), f"{REPO} is no elastic checkpoint yet"),
        (lambda hub: hub.shutdown() or hub.server_close(), "cannot fetch"),
    ],
    ids=["missing", "private", "gated", "no model", "not elastic", "no network"],
)
def test_what_the_hub_refuses_is_one_line(hub: Any, prepare: Any, match: str) -> None:
    prepare(hub)
    with pytest.raises(UserError, match=match) as error:
        uniql_jax.load(REPO)
    assert "\n" not in str(error.value)
    assert hub.weights_sent == 0


def test_a_private_repository_with_a_token(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add(REPO)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    same(uniql_jax.load(REPO, 0.35), uniql_jax.load(GOLDEN / "llama", 0.35))


def test_broken_connections_are_taken_up_again(hub: Any) -> None:
    hub.break_after = 5000
    same(uniql_jax.load(REPO, 0.35), uniql_jax.load(GOLDEN / "llama", 0.35))
    assert hub.break_after is None
    assert hub.weights_sent <= 1.05 * total(GOLDEN / "llama")
    hub.failures = 2
    same(uniql_jax.load(REPO, 0.0), uniql_jax.load(GOLDEN / "llama", 0.0))


def test_a_download_goes_on_where_it_was_stopped(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrived before an error is not fetched again, by another process either."""
    client.local(REPO)
    folder = Path(client.local(REPO))
    monkeypatch.setattr(client, "TRIES", 1)
    monkeypatch.setattr(client, "THREADS", 1)
    monkeypatch.setattr(client, "PIECE", 4096)
    hub.break_after = 1000
    with pytest.raises(UserError, match="stays"):
        uniql_jax.load(REPO, 0.35)
    held = sum(end - start for start, end in PartialFile(folder / "model.safetensors").have)
    assert held >= 1000
    with open(folder / "model.safetensors.ranges", "a") as log:
        log.write("12 99")  # a line that a kill cut short does not count
    same(uniql_jax.load(REPO, 0.35), uniql_jax.load(GOLDEN / "llama", 0.35))
    assert hub.weights_sent <= 1.05 * total(GOLDEN / "llama")


def test_a_server_without_ranges_sends_all(hub: Any) -> None:
    hub.ranges = False
    same(uniql_jax.load(REPO, 0.35), uniql_jax.load(GOLDEN / "llama", 0.35))


def test_bytes_that_are_not_here_are_never_zeros(hub: Any) -> None:
    folder = uniql_jax.load(REPO, 0.35).folder
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(UserError, match="downloaded for a higher prune rate only"):
        [checkpoint.layer(i, keep) for i, keep in enumerate(checkpoint.keep(0.0))]
    same(uniql_jax.load(str(folder), 0.0), uniql_jax.load(GOLDEN / "llama", 0.0))  # by its folder: the rest comes


def test_a_folder_of_that_name_wins(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "qwen2", tmp_path / REPO)
    assert uniql_jax.load(REPO, 0.35).config.model_type == "qwen2"
    assert not hub.requests


def test_commands_take_a_hub_id(hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from uniql_jax.commands import export, inspect

    inspect.main([REPO, "--revision", "main", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    headers = total(GOLDEN / "llama") - open_checkpoint(GOLDEN / "llama").weight_bytes()
    assert hub.weights_sent == headers  # nothing but headers
    export.main([REPO, str(tmp_path / "dense"), "--prune-rate", "0.35"])
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="is no hub id"):
        inspect.main([str(GOLDEN / "llama"), "--revision", "main"])
