"""Tasks item by item against lm-eval's own `hf` backend, which runs stock transformers on the exported checkpoint."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tests import tiny
from uniql_jax.commands import cli
from uniql_jax.commands import evaluate as evaluate_command
from uniql_jax.evaluation import paired, tasks, writing
from uniql_jax.runtime.loading import load

RATE = 0.25
HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
"""
CHOOSING = (
    HEAD
    + """\
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""
)
WRITING = (
    HEAD
    + """\
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["{stop}"]
  max_gen_toks: 70
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    """A tiny checkpoint, its export at RATE, and two tasks of which no text is longer than the model takes."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from uniql_jax.convert.to_hf import export

    root = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(5)
    folder = tiny.checkpoint(root / "model", rng)
    words = sorted({word for line in tiny.LINES for word in line.split()})
    docs = [
        {
            "question": " ".join(rng.choice(words, int(rng.integers(1, 4)))),
            "choices": [" ".join(rng.choice(words, count)) for count in (1, 2, 3)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(24)
    ]
    data = root / "data.jsonl"
    data.write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
    files = []
    for name, text in (("choosing", CHOOSING), ("writing", WRITING)):
        files.append(root / f"{name}.yaml")
        files[-1].write_text(text.format(name=name, data=data, stop="e"))
    export(folder, root / "exported", RATE, dtype="float32")
    return types.SimpleNamespace(folder=folder, exported=root / "exported", files=files, docs=docs, data=data)


def samples(model: Any, made: types.SimpleNamespace, fewshot: int) -> dict[str, Any]:
    """What lm-eval notes of every item; a harness model or the `hf` backend answers."""
    from lm_eval.evaluator import simple_evaluate

    names, manager = tasks.named([str(path) for path in made.files])
    found: Any = simple_evaluate(
        model, tasks=list[Any](names), num_fewshot=fewshot, task_manager=manager, bootstrap_iters=0
    )
    return {name: sorted(found["samples"][name], key=lambda one: one["doc_id"]) for name in names}


@pytest.mark.parametrize("fewshot", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_items_equal_those_of_the_hf_backend(
    made: types.SimpleNamespace, fewshot: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same answers and texts on every item, log-likelihoods within 1e-3, at a rate that is masked here."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    backend: Any = HFLM
    theirs = backend(pretrained=str(made.exported), dtype="float32", device="cpu", batch_size=8)
    ours = tasks.harness_model(load(made.folder), tiny.tokenizer(), 256, 1024, rate=RATE)
    want, found = samples(theirs, made, fewshot), samples(ours, made, fewshot)
    lengths = set()
    for one, other in zip(found["choosing"], want["choosing"], strict=True):
        assert one["arguments"] == other["arguments"]
        assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
        for (value, greedy), (expected, first) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert value == pytest.approx(expected, abs=1e-3)
            assert greedy == first
    for one, other in zip(found["writing"], want["writing"], strict=True):
        assert one["arguments"] == other["arguments"]
        assert one["filtered_resps"] == other["filtered_resps"]
        assert "e" not in one["filtered_resps"][0]
        lengths.add(len(one["filtered_resps"][0]))
    assert len(lengths) > 5  # some are cut early, some are not


@pytest.mark.slow
def test_the_command_pairs_with_the_original(
    made: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates against a baseline on the same items: counts, test and interval are those of the samples."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    out = tmp_path / "rows.json"
    argv = ["--ckpt", made.folder, "--baseline", made.exported, "--prune-rates", "0,0.25", "--json", out]
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate_command.main, [str(a) for a in [*argv, "--fewshot", 1, "--tasks", *made.files]])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    rows = {(row["prune_rate"], row["source"], row["metric"]): row for row in json.loads(out.read_text())}
    same, differing = rows[RATE, "choosing", "acc"], rows[0.0, "choosing", "acc"]
    assert same["paired"] == {"difference": 0.0, "better": 0, "worse": 0, "p_value": 1.0, "low": 0.0, "high": 0.0}
    assert "paired" not in rows[None, "choosing", "acc"]
    pair = differing["paired"]
    assert pair["difference"] == pytest.approx(differing["value"] - same["value"])
    assert pair["better"] - pair["worse"] == pytest.approx(pair["difference"] * len(made.docs))
    assert differing["items"] == len(made.docs)
    assert f"{pair['low']:+.4f} .. {pair['high']:+.4f}" in printed
    assert (None, "writing", "exact_match") in rows


def test_paired_results_by_definition(rng: np.random.Generator) -> None:
    """McNemar's exact test from the discordant items alone; the interval is a bootstrap's."""
    values, reference = rng.random(200) < 0.6, rng.random(200) < 0.5
    found = paired.compare(values, reference)
    better, worse = int((values & ~reference).sum()), int((~values & reference).sum())
    assert (found["better"], found["worse"]) == (better, worse)
    assert found["p_value"] == pytest.approx(binomtest(min(better, worse), better + worse).pvalue)
    draws = rng.integers(0, 200, (2000, 200))
    change = values.astype(float) - reference
    low, high = np.quantile(change[draws].mean(1), (0.025, 0.975))  # a bootstrap's
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.02)
    with pytest.raises(ValueError, match="items"):
        paired.compare(values, reference[1:])


def test_mean_of_tasks_has_the_bootstraps_interval(rng: np.random.Generator) -> None:
    reference = [rng.random(n) < 0.5 for n in (300, 400)]
    values = [(one & (rng.random(len(one)) < 0.9)) | (rng.random(len(one)) < 0.05) for one in reference]
    found = paired.mean_of_tasks(values, reference)
    ratios = []
    for _ in range(2000):
        draws = [rng.integers(0, len(one), len(one)) for one in reference]
        means = [np.mean([np.mean(one[d]) for one, d in zip(kind, draws, strict=True)]) for kind in (values, reference)]
        ratios.append(means[0] / means[1])
    low, high = np.quantile(ratios, (0.025, 0.975))
    assert (found["ratio_low"], found["ratio_high"]) == pytest.approx((low, high), abs=0.015)


def test_sampling_is_read_as_lm_eval_reads_it() -> None:
    pytest.importorskip("lm_eval")
    assert writing.writing({"until": "x", "max_new_tokens": 3}, "</s>") == writing.Writing(("x", "</s>"), 3)
    assert writing.writing({"do_sample": False, "temperature": 0.5}, "</s>").temperature == 0
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5}
    assert writing.writing(asked, "</s>") == writing.Writing(("</s>",), 256, 0.7, 0.9, 5)
