"""Tasks asked and scored by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), the `eval` extra: an elastic
model at one rate is one of its models.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import TemplateError

from uniql_jax.errors import UserError
from uniql_jax.evaluation.likelihood import continuations, masks
from uniql_jax.evaluation.writing import write, writing
from uniql_jax.model.causal_lm import CausalLM, prune, require_plan
from uniql_jax.runtime.text import encode

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
Say = Callable[[str], object]
Items = dict[tuple[str, str], Float[np.ndarray, " items"]]
"""A number for every item, by task and metric: 1 for a right answer, 0 for a wrong one."""
SPREAD = "_stderr"
UNUSABLE = (OSError, ValueError, LookupError, TemplateError)
"""What lm-eval and datasets raise for data that is not there or not as described."""


def require() -> None:
    """Raises UserError when lm-eval is missing; asked before long work, not after."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval: pip install 'uniql-jax[eval]'")


def harness_model(
    model: CausalLM,
    tokenizer: Any,
    window: int,
    batch_tokens: int,
    progress: Progress | None = None,
    desc: str = "",
    say: Say = lambda line: None,
    rate: float | None = None,
) -> Any:
    """The model as lm-eval's LM, which rates text and writes it.

    Text is encoded as lm-eval's own backend for transformers does: special tokens as the tokenizer adds them by
    default, but no second BOS. `say` hears of texts that are longer than `window`. rate: the prune rate at which the
    model answers; None: as it is.
    """
    from lm_eval.api.model import TemplateLM  # slow to import
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ends = model.config.eos_ids
    keep = None if rate is None else masks(require_plan(model.plan), rate)
    shown = functools.partial(_shown, progress, desc)

    class Elastic(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return ends[0] if ends else int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(tokenizer, string, add_special_tokens)

        def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            return continuations(model, pairs, window, batch_tokens, shown, keep)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            for context, continuation in (request.args for request in requests):
                if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                    raise UserError(f"nothing to rate: a continuation {continuation!r} has no tokens")
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = []
            for (context, continuation), before, after in requests:
                if not after:  # the tokens of the whole merge across the border
                    raise UserError(f"nothing to rate after {context[-40:]!r}: {continuation!r} adds no tokens")
                # a context of spaces alone, which go with the continuation, is none
                pairs.append((before or [self.prefix_token_id], after))
            long = [len(before) + len(after) for before, after in pairs if len(before) + len(after) > window]
            if long:
                say(
                    f"{desc}: {len(long)} of {len(pairs)} texts are longer than {window} tokens (up to {max(long)}); "
                    "of these, only the end was seen"
                )
            return self._scores(pairs)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, window - 1, 1)
                found.append(sum(value for value, _ in self._scores([make_disjoint_window(one) for one in windows])))
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            eos = tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
            together: dict[str, list[int]] = {}
            for i, request in enumerate(requests):  # those that are written alike share batches
                together.setdefault(repr(request.args[1]), []).append(i)
            found = [""] * len(requests)
            whole = model if rate is None else prune(model, rate)
            for members in together.values():
                how = writing(requests[members[0]].args[1], eos)
                texts = [requests[i].args[0] for i in members]
                prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
                written = write(whole, tokenizer, prompts, how, window, batch_tokens, shown)
                for i, text in zip(members, written, strict=True):
                    found[i] = text
            return found

    return Elastic()


def _shown(progress: Progress | None, desc: str, batches: Sequence[Any]) -> Iterable[Any]:
    return batches if progress is None else progress(batches, desc, len(batches))


def named(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """(names, lm-eval's TaskManager) of names that it knows (tasks, groups, tags), or paths of .yaml or .yml files that
    describe a task or a group; their data is fetched here.

    Raises UserError for other names, where data cannot be had, and for two files of the same name.
    """
    require()
    from lm_eval.tasks import TaskManager

    entries, names, folders = {}, [], []
    for task in tasks:
        if Path(task).suffix.lower() not in (".yaml", ".yml"):
            names.append(task)
            continue
        entry = _file_entry(task)
        known = entries.setdefault(entry.name, entry)
        if known.yaml_path != entry.yaml_path:
            raise UserError(f"{known.yaml_path} and {entry.yaml_path} both name the task {entry.name}; rename one")
        names.append(entry.name)
        folders.append(str(entry.yaml_path.parent))
    names, folders = list(dict.fromkeys(names)), list(dict.fromkeys(folders))
    # Its own thousands of tasks take seconds to list: only where one of them, or a member of a group, is asked for.
    manager = TaskManager(include_path=folders or None, include_defaults=False)
    members = [name for entry in entries.values() for name in _members(entry)]
    if any(name not in manager.all_tasks for name in (*members, *(name for name in names if name not in entries))):
        manager = TaskManager(include_path=folders or None, include_defaults=True)
    unknown = [name for name in names if name not in entries and name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}; lm-eval ls tasks lists those it knows")
    manager.task_index.update(entries)  # the very files, whatever else their folders hold
    for name in names:
        try:
            manager.load(name)
        except Exception as error:  # lm-eval, datasets and a task's own code raise whatever they like
            raise _refusal(name, error) from None
    return names, manager


def _file_entry(task: str) -> Any:
    """What lm-eval's index keeps of a file: its name is that of its group or task."""
    from lm_eval.tasks._index import Entry, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(task).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"no task file {task}")
    try:
        described = load_yaml(path, resolve_func=False)
        kind = TaskIndex._kind_of(described)
        name = described.get("group") or described.get("task")
    except Exception as error:  # YAML's errors are of many kinds, none of them an OSError or ValueError
        raise UserError(f"{task} names no task: {_first_line(error)}") from None
    if not isinstance(name, str):
        raise UserError(f"{task} names no task: task or group must be a word")
    return Entry(name=name, kind=kind, yaml_path=path, cfg=described)


def _members(entry: Any) -> list[str]:
    """Names of tasks and groups that a group's file refers to."""
    listed = entry.cfg.get("task") if entry.cfg.get("group") else None
    listed = listed if isinstance(listed, list) else [listed]
    found = [one.get("task") if isinstance(one, dict) else one for one in listed]
    return [name for name in found if isinstance(name, str)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refusal(name: str, error: Exception) -> UserError:
    return UserError(f"task {name}: {type(error).__name__}: {_first_line(error)}")


def measure(
    model: CausalLM,
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    *,
    window: int,
    batch_tokens: int = 4096,
    limit: int | None = None,
    fewshot: int | None = None,
    progress: Progress | None = None,
    desc: str = "tasks",
    say: Say = lambda line: None,
    rate: float | None = None,
) -> tuple[list[dict[str, Any]], Items]:
    """What lm-eval finds of a model.

    Args:
        model: the model.
        tokenizer: of transformers.
        names: tasks, groups or tags, as `named` returns them.
        manager: lm-eval's, from there too.
        window: tokens seen at a time.
        batch_tokens: about how many tokens a batch holds.
        limit: the first questions of each task only.
        fewshot: examples in each prompt, drawn by lm-eval from its own seed; None: as many as the task itself says.
        progress: wraps the batches.
        desc: names the model in messages.
        say: hears of texts that are cut.
        rate: the prune rate at which the model answers; None: as it is.

    Returns:
        Rows {"source": task, "metric", "value", "stderr", "items"}, and the items' own numbers wherever their mean is
        the value. items: how many; None where that is not so.

    Raises:
        UserError: the data of a task is not as it says, or it asks for what this package does not have.
    """
    from lm_eval.evaluator import simple_evaluate  # slow to import

    wrapped = harness_model(model, tokenizer, window, batch_tokens, progress, desc, say, rate)
    try:
        found: Any = simple_evaluate(
            wrapped, tasks=list(names), num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=True,
            bootstrap_iters=100,
        )  # fmt: skip
    except UNUSABLE as error:
        raise _refusal(", ".join(names), error) from None
    members = {name: found.get("group_subtasks", {}).get(name) or [name] for name in found["results"]}
    rows, items = {}, {}
    for name, values in found["results"].items():
        samples = [one for task in members[name] for one in found["samples"].get(task, [])]
        rows[name] = _rows(name, values, samples, items)
    # A tag, or a group that aggregates nothing, has no result of its own, but its tasks do.
    chosen = names if all(rows.get(name) for name in names) else rows
    return [row for name in chosen for row in rows[name]], items


def _rows(
    name: str, values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], items: Items
) -> list[dict[str, Any]]:
    """What lm-eval found of a task or group: keys are METRIC,FILTER and METRIC_stderr,FILTER. Fills `items`."""
    rows = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith(SPREAD) and isinstance(value, (int, float)):
            spread = values.get(f"{metric}{SPREAD},{kind}")
            error = float(spread) if isinstance(spread, (int, float)) else None
            numbers = [one.get(metric) for one in samples if one.get("filter") == kind]
            metric = metric if kind == "none" else f"{metric} ({kind})"
            row = {"source": name, "metric": metric, "value": float(value), "stderr": error, "items": None}
            if numbers and all(isinstance(one, (int, float, np.number)) for one in numbers):
                each = np.asarray(numbers, np.float64)
                if math.isclose(each.mean(), value, rel_tol=1e-6, abs_tol=1e-9):  # a mean, not a ratio or a perplexity
                    items[name, metric], row["items"] = each, len(each)
            rows.append(row)
    return rows
