"""Tasks: likelihoods of continuations against their definition, and lm-eval scoring a task of our own."""

from __future__ import annotations

import functools
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from tests.commands import exit_code
from uniql_jax.commands import evaluate as evaluate_command
from uniql_jax.errors import UserError
from uniql_jax.evaluation import likelihood, tasks
from uniql_jax.model.causal_lm import CausalLM

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""
CHOICE = "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm"


whole_logits = jax.jit(lambda model, tokens: model(tokens))


def by_definition(model: CausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """In float64 from the logits of this one text."""
    row = [*context, *continuation]
    filled = jnp.asarray([row + [0] * (64 - len(row))])  # of one length: compiled once; nothing looks behind itself
    logits = np.asarray(whole_logits(model, filled), np.float64)[0, len(context) - 1 : len(row) - 1]
    log_chances = logits - np.logaddexp.reduce(logits, axis=-1)[:, None]
    return float(log_chances[np.arange(len(continuation)), continuation].sum()), bool(
        (logits.argmax(-1) == continuation).all()
    )


def test_continuations_are_their_definition(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any length, in batches that are not full, logits in chunks that do not divide them."""
    monkeypatch.setattr(likelihood, "LOGITS", tiny.VOCAB * 17)
    model = tiny.model(rng)
    pairs = [
        (rng.integers(0, tiny.VOCAB, a).tolist(), rng.integers(0, tiny.VOCAB, b).tolist())
        for a, b in ((1, 1), (5, 9), (30, 2), (31, 1), (40, 20), (3, 60))
    ]
    likeliest = int(np.asarray(jax.jit(lambda t: model(t))(jnp.asarray([pairs[1][0]])))[0, -1].argmax())
    pairs.append((pairs[1][0], [likeliest]))
    shown: list[int] = []
    found = likelihood.continuations(model, pairs, 64, 100, lambda batches: shown.append(len(batches)) or batches)
    assert shown == [2 + 2]  # two of up to 64 tokens, one at a time; five of up to 32, three at a time
    for (value, greedy), pair in zip(found, pairs, strict=True):
        want, first = by_definition(model, *pair)
        assert value == pytest.approx(want, rel=1e-4)
        assert greedy == first
    assert found[-1][1]


def test_of_a_long_text_the_end_is_seen(rng: np.random.Generator) -> None:
    model = tiny.model(rng)
    context, continuation = rng.integers(0, tiny.VOCAB, 50).tolist(), rng.integers(0, tiny.VOCAB, 10).tolist()
    [(value, _)] = likelihood.continuations(model, [(context, continuation)], 32)
    assert value == pytest.approx(by_definition(model, context[-22:], continuation)[0], rel=1e-4)
    [(value, _)] = likelihood.continuations(model, [(context, continuation)], 6)  # not even the continuation has room
    assert value == pytest.approx(by_definition(model, continuation[4:5], continuation[5:])[0], rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(12))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a task of our own: its .yaml."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def write(name: str, docs: list[dict[str, Any]], kind: str = "multiple_choice", **given: str) -> Path:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
        values = {"target": "answer", "more": CHOICE} | given
        path = tmp_path / f"{name}.yaml"
        path.write_text(YAML.format(name=name, data=data, kind=kind, **values))
        return path

    return write


command = functools.partial(exit_code, evaluate_command.main)


def test_accuracy_is_how_often_the_right_choice_is_likeliest(
    folder: Path, task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sorted({word for line in tiny.LINES for word in line.split()})
    rng = np.random.default_rng(0)
    docs = [
        {
            "question": " ".join(rng.choice(words, 4)),
            "choices": [" ".join(rng.choice(words, count)) for count in (1, 2, 4)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(12)
    ]
    path, other = task("ours", docs), task("theirs", docs[:5])
    out = tmp_path / "rows.json"
    argv = ["--ckpt", folder, "--prune-rates", "0,0.25", "--tasks", path, other, "--json", out, "--limit", 10]
    assert command(*argv) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {(row["prune_rate"], row["source"], row["metric"]) for row in rows} == {
        (rate, name, metric) for rate in (0.0, 0.25) for name in ("ours", "theirs") for metric in ("acc", "acc_norm")
    }
    tokenizer = tiny.tokenizer()
    for rate in (0.0, 0.25):
        model = uniql_jax.load(str(folder), rate)
        right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
        for doc in docs[:10]:
            scores = []
            for choice in doc["choices"]:
                context = tokenizer(doc["question"])["input_ids"]
                whole = tokenizer(f"{doc['question']} {choice}")["input_ids"]
                scores.append(by_definition(model, context, whole[len(context) :])[0])
            lengths = [len(choice) for choice in doc["choices"]]
            right["acc"].append(int(np.argmax(scores)) == doc["answer"])
            right["acc_norm"].append(int(np.argmax(np.divide(scores, lengths))) == doc["answer"])
        for metric, found in right.items():
            [row] = [row for row in rows if (row["prune_rate"], row["source"], row["metric"]) == (rate, "ours", metric)]
            assert row["value"] == pytest.approx(np.mean(found))
            assert row["stderr"] > 0
            assert row["weight_bytes"] > 0
            assert f"{row['value']:.4f}" in printed
    assert "mean" in printed


def test_text_is_rated_whole(rng: np.random.Generator, task: Any) -> None:
    """What perplexity tasks ask: log p of a text, longer than the model reads at a time."""
    model, tokenizer = tiny.model(rng), tiny.tokenizer()
    ours = tasks.harness_model(model, tokenizer, 16, 64)
    text = " ".join(tiny.LINES[:3])
    ids = [ours.prefix_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    [found] = ours.loglikelihood_rolling([types.SimpleNamespace(args=(text,))])
    rest = (len(ids) - 1) % 15  # the last window reaches back as far as it can
    want = sum(by_definition(model, ids[at : at + 1], ids[at + 1 : at + 16])[0] for at in range(0, len(ids) - 15, 15))
    want += by_definition(model, ids[-16:-rest], ids[-rest:])[0]
    assert found == pytest.approx(want, rel=1e-4)


def test_what_cannot_be_asked_is_said(folder: Path, task: Any, tmp_path: Path, capsys: Any) -> None:
    docs = [{"question": "the", "choices": ["a", "b"], "answer": 0}]
    beams = "generation_kwargs:\n  num_beams: 4\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match"
    searching = task("searching", docs, "generate_until", target="question", more=beams)
    endless = task(
        "endless",
        docs,
        "generate_until",
        target="question",
        more=beams.replace("num_beams: 4", "until: x").replace("8", "256"),
    )
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("dataset_path: json\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00task")
    blank = tmp_path / "blank.yaml"
    blank.write_text(task("blank", docs).read_text().replace("question", "nothing.there"))
    gone = task("gone", docs)
    (tmp_path / "gone.jsonl").unlink()
    for name, says in (
        ("no_such_task", "no_such_task"),
        (tmp_path / "none.yaml", "none.yaml"),
        (nameless, "names no task"),
        (binary, "names no task"),
        (blank, "undefined"),
        (searching, "num_beams"),
        (endless, "256 tokens"),
        (gone, "gone"),
    ):
        assert command("--ckpt", folder, "--prune-rates", "0", "--tasks", name) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert says in error


@pytest.fixture
def harness(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Any:
    """harness(tokenizer, window) -> lm-eval's model; what it scores is noted, not computed."""
    pytest.importorskip("lm_eval")

    def make(tokenizer: Any = None, window: int = 64) -> Any:
        said: list[str] = []
        ours = tasks.harness_model(tiny.model(rng), tokenizer or tiny.tokenizer(), window, 64, say=said.append)
        scored: list[Any] = []
        monkeypatch.setattr(
            type(ours), "_scores", lambda self, pairs: scored.extend(pairs) or [(0.0, True)] * len(pairs)
        )
        return ours, scored, said

    return make


def asked(*pairs: tuple[str, str]) -> list[Any]:
    return [types.SimpleNamespace(args=pair) for pair in pairs]


@pytest.mark.parametrize("pair", [("the people", ""), ("", "")])
def test_a_continuation_without_tokens_has_no_likelihood(harness: Any, pair: tuple[str, str]) -> None:
    ours, scored, _ = harness()
    with pytest.raises(UserError, match="tokens"):
        ours.loglikelihood(asked(("the", " people"), pair))
    assert scored == []
    with pytest.raises(UserError, match="at least one token"):
        likelihood.continuations(tiny.model(np.random.default_rng(0)), [([1], [])], 8)


def test_a_context_without_tokens_is_the_first_token_of_a_text(harness: Any) -> None:
    ours, scored, _ = harness()
    ours.loglikelihood(asked(("", "people"), ("  ", "people")))
    tokenizer = tiny.tokenizer()
    assert scored == [([0], tokenizer(text)["input_ids"]) for text in ("people", "  people")]


def test_one_bos_by_lm_evals_own_rule(harness: Any) -> None:
    from lm_eval.models.utils import has_bos_prefix
    from tokenizers import processors

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    ours, _, _ = harness(tokenizer)
    for text in ("the people", "<s>the people", "<s>", "", "the <s>"):
        want = tokenizer.encode(text, add_special_tokens=not has_bos_prefix(text, tokenizer.decode(0)))
        assert ours.tok_encode(text) == want
        for special in (True, False):
            assert ours.tok_encode(text, special) == tokenizer.encode(text, add_special_tokens=special)


def test_what_is_not_seen_is_said(harness: Any) -> None:
    ours, _, said = harness(window=8)
    ours.loglikelihood(asked(("the", " people"), ("the people " * 9, "home"), ("peace " * 5, "home")))
    [line] = said
    assert "2 of 3 texts are longer than 8 tokens" in line
    ours, _, said = harness(window=64)
    ours.loglikelihood(asked(("the", " people")))
    assert said == []


def test_tasks_see_as_much_as_the_model_takes(folder: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user lowers it, or memory does; a window for perplexity is none for tasks."""
    from uniql_jax.evaluation import evaluate

    windows: list[int] = []
    monkeypatch.setattr(tasks, "measure", lambda *args, window, **rest: windows.append(window) or ([], {}))
    monkeypatch.setattr(evaluate, "WINDOW", 32)
    path = str(task("ours", [{"question": "the", "choices": ["a", "b"], "answer": 0}]))
    evaluate.evaluate(str(folder), [0], [], asked=[path])
    evaluate.evaluate(str(folder), [0], [], asked=[path], window=48)
    monkeypatch.setattr(evaluate, "memory_limit", lambda: 4 * 4 * 4 * 100**2)
    evaluate.evaluate(str(folder), [0], [], asked=[path])
    assert windows == [256, 48, 100]


def test_the_very_file_is_measured(task: Any, tmp_path: Path) -> None:
    """Whatever other files of its folder call themselves; also quoted, as .yml, and a group."""
    docs = [{"question": "the", "choices": ["a", "b"], "answer": 0}]
    text = task("v1", docs).read_text().replace("task: v1", 'task: "same name"')
    (tmp_path / "v1.yaml").write_text(text)
    second = tmp_path / "v2.yml"
    second.write_text(text.replace(str(tmp_path / "v1.jsonl"), str(tmp_path / "v2.jsonl")))
    (tmp_path / "v2.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs * 3))
    for path, count in ((tmp_path / "v1.yaml", 1), (second, 3)):
        names, manager = tasks.named([str(path)])
        assert names == ["same name"]
        assert len(manager.load(names)["tasks"]["same name"].test_docs()) == count
    with pytest.raises(UserError, match="both name the task same name"):
        tasks.named([str(tmp_path / "v1.yaml"), str(second)])
    assert tasks.named([str(second)] * 2)[0] == ["same name"]


@pytest.mark.parametrize("aggregate", [True, False])
def test_groups_of_tasks(task: Any, tmp_path: Path, rng: np.random.Generator, aggregate: bool) -> None:
    docs = [
        {"question": "the", "choices": ["a", "b"], "answer": 0},
        {"question": "of", "choices": ["b", "c"], "answer": 1},
    ]
    task("one", docs)
    task("two", docs[:1])
    group = tmp_path / "group.yaml"
    mean = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n" if aggregate else ""
    group.write_text(f"group: ours\ntask:\n  - one\n  - two\n{mean}")
    names, manager = tasks.named([str(group)])
    rows, _ = tasks.measure(tiny.model(rng), tiny.tokenizer(), names, manager, window=64)
    found = {row["source"]: row["value"] for row in rows if row["metric"] == "acc"}
    if aggregate:
        alone, _ = tasks.measure(
            tiny.model(rng), tiny.tokenizer(), *tasks.named([str(tmp_path / "one.yaml")]), window=64
        )
        assert set(found) == {"ours"}
        assert alone
    else:
        assert set(found) == {"one", "two"}


def test_a_damaged_model_answers_nothing(rng: np.random.Generator) -> None:
    model = tiny.model(rng)
    model.params["norm"] = model.params["norm"] * np.nan
    with pytest.raises(UserError, match="not finite"):
        likelihood.continuations(model, [([1, 2], [3])], 32)


def test_lm_eval_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UserError, match="eval"):
        tasks.named(["piqa"])
