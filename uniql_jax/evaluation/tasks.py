"""Zero-shot tasks, asked and judged by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), the `eval` extra:
an elastic model at one rate is one of its models.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from uniql_jax.errors import UserError
from uniql_jax.evaluation.likelihood import continuations
from uniql_jax.model.causal_lm import CausalLM

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
SPREAD = "_stderr"
UNUSABLE = (OSError, ValueError, LookupError, TemplateError)
"""What lm-eval and datasets raise for data that is not there or not as described."""
WRITING = "a task that has text written is not supported, only those that choose or rate text"


def require() -> None:
    """Raises UserError when lm-eval is missing; asked before long work, not after."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval: pip install 'uniql-jax[eval]'")


def harness_model(
    model: CausalLM, tokenizer: Any, window: int, batch_tokens: int, progress: Progress | None = None, desc: str = ""
) -> Any:
    """The model as lm-eval's LM, which answers for likelihoods; text is encoded as its tokenizer does by default."""
    from lm_eval.api.model import TemplateLM  # slow to import
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ends = model.config.eos_ids
    shown = functools.partial(_shown, progress, desc)

    class Elastic(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return ends[0] if ends else int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer(string, **given)["input_ids"]

        def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            return continuations(model, pairs, window, batch_tokens, shown)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return self._scores([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, window - 1, 1)
                found.append(sum(value for value, _ in self._scores([make_disjoint_window(one) for one in windows])))
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise UserError(WRITING)

    return Elastic()


def _shown(progress: Progress | None, desc: str, batches: Sequence[Any]) -> Iterable[Any]:
    return batches if progress is None else progress(batches, desc, len(batches))


def named(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """(names, lm-eval's TaskManager) of names that it knows, or paths of .yaml files that describe tasks; their data is
    fetched here. Raises UserError for other names, where data cannot be had, and for tasks that have text written.
    """
    require()
    from lm_eval.tasks import TaskManager

    names, folders = [], []
    for task in tasks:
        path = Path(task).expanduser()
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise UserError(f"no task file {task}")
            found = re.search(r"^task:\s*(\S+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            if found is None:
                raise UserError(f"{task} names no task")
            names.append(found.group(1))
            folders.append(str(path.parent.absolute()))
        else:
            names.append(task)
    # Its own thousands of tasks take seconds to list.
    manager = TaskManager(include_path=list(dict.fromkeys(folders)) or None, include_defaults=len(folders) < len(names))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}; lm-eval ls tasks lists those it knows")
    for name in names:
        try:
            found = manager.load(name)["tasks"]
        except UNUSABLE as error:
            raise _refusal(name, error) from None
        if any(task.get_config("output_type") == "generate_until" for task in found.values()):
            raise UserError(f"{name}: {WRITING}")
    return names, manager


def _refusal(name: str, error: Exception) -> UserError:
    return UserError(f"task {name}: {type(error).__name__}: {str(error).strip()}".splitlines()[0])


def measure(
    model: CausalLM,
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    *,
    window: int,
    batch_tokens: int = 4096,
    limit: int | None = None,
    progress: Progress | None = None,
    desc: str = "tasks",
) -> list[dict[str, Any]]:
    """Rows {"source": task, "metric", "value", "stderr"}, no examples in the prompt; `limit`: the first questions.

    Raises UserError where what a task asks for is not a likelihood.
    """
    from lm_eval.evaluator import simple_evaluate  # slow to import

    wrapped = harness_model(model, tokenizer, window, batch_tokens, progress, desc)
    try:
        found: Any = simple_evaluate(
            wrapped, tasks=list(names), num_fewshot=0, limit=limit, task_manager=manager, log_samples=False,
            bootstrap_iters=100,
        )  # fmt: skip
    except UNUSABLE as error:
        raise _refusal(", ".join(names), error) from None
    rows = []
    results = found["results"]
    # A tag has no result of its own, but its tasks do.
    for name in names if all(name in results for name in names) else results:
        values = results[name]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith(SPREAD) and isinstance(value, (int, float)):
                spread = values.get(f"{metric}{SPREAD},{kind}")
                metric = metric if kind == "none" else f"{metric} ({kind})"
                error = float(spread) if isinstance(spread, (int, float)) else None
                rows.append({"source": name, "metric": metric, "value": float(value), "stderr": error})
    return rows
