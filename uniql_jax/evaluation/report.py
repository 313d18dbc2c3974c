"""What a checkpoint is, for people: one HTML page, and a model card with the hub's metadata."""

from __future__ import annotations

import functools
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.evaluation import charts
from uniql_jax.evaluation.describe import describe_checkpoint
from uniql_jax.files import read_json
from uniql_jax.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
MAP_RATES = tuple(round(0.025 * i, 3) for i in range(15))
LICENSES = {
    "apache-2.0": ("apache license", "version 2.0"),
    "mit": ("mit license",),
    "bsd-3-clause": ("bsd 3-clause",),
    "llama3.2": ("llama 3.2 community license",),
    "llama3.1": ("llama 3.1 community license",),
    "llama3": ("meta llama 3 community license",),
    "llama2": ("llama 2 community license",),
}
"""Hub identifier -> what the beginning of such a license's text says."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Quality = dict[str, dict[float | None, float]]


# ------------------------------------------------------------------------------------------------ measurements


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows that `uniql evaluate --json` wrote. Raises UserError for another file."""
    rows = read_json(path)
    keys = {"prune_rate", "source", "metric", "value"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise UserError(f"{path} is not what uniql evaluate --json writes")
    for row in rows:
        rate = row["prune_rate"]
        if not _is_number(row["value"]) or not (rate is None or _is_number(rate)):
            raise UserError(f"{path} is not what uniql evaluate --json writes: a rate or value is no number")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def perplexities(rows: Sequence[Mapping[str, Any]]) -> Quality:
    """Text -> prune rate (None: the original) -> perplexity."""
    found: Quality = {}
    for row in rows:
        if row["metric"] == "perplexity" and "memory_budget" not in row:  # which may have given up bits at no rate
            rate = row["prune_rate"]
            source = Path(str(row["source"])).name  # where it lay is nobody's business
            found.setdefault(source, {})[None if rate is None else float(rate)] = float(row["value"])
    return found


def read_speed(path: str | Path) -> tuple[dict[float, dict[str, float]], str]:
    """Prune rate -> seconds to the first token and per token, of what `uniql benchmark --json` wrote, and where.

    Raises:
        UserError: another file.
    """
    found = read_json(path)
    try:
        rows = [row for row in found["rows"] if row["prune_rate"] is not None and "memory_budget" not in row]
        speed = {
            float(row["prune_rate"]): {
                short: float(row[key]["median"])
                for short, key in (("ttft", "ttft"), ("tpot", "tpot_loop"))
                if key in row
            }
            for row in rows
        }
        settings, where = found["settings"], found["environment"]
        note = (
            f"Times: {where.get('device', 'an unnamed device')}, batch {settings['batch_size']}, prompts of "
            f"{settings['prompt_len']} tokens, answers of {settings['gen_len']}."
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is not what uniql benchmark --json writes") from None
    return speed, note


# ------------------------------------------------------------------------------------------------ the page


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=lambda name: str(name).endswith(".html"),
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
    )  # fmt: skip
    made.globals |= {"bytes": format_bytes, "seconds": _seconds, "millions": lambda n: f"{n / 1e6:,.1f}"}
    return made


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of how the checkpoint came about, a line each."""
    facts = {"format": found["format"], "groups": found["groups"]} | dict(found["provenance"] or {})
    source = facts.get("source")
    if isinstance(source, str) and not HUB_ID.fullmatch(source):
        facts["source"] = Path(source).name
    if found["options"]:
        facts["settings"] = found["options"]
    if isinstance(found["manifest"], dict) and found["manifest"].get("hash"):
        facts["manifest"] = found["manifest"]["hash"]
    return [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in facts.items()]


def _curves(found: Mapping[str, Any], quality: Quality, speed: Mapping[float, Any]) -> list[dict[str, Any]]:
    rows = found["rates"]
    made = [
        {
            "svg": Markup(charts.lines({"weights": [(r["prune_rate"], r["weight_bytes"]) for r in rows]},
                                       "size over the prune rate", format_bytes)),
            "caption": "Size of the weights over the prune rate",
        }
    ]  # fmt: skip
    curves = {
        source: sorted((rate, value) for rate, value in values.items() if rate is not None)
        for source, values in quality.items()
    }
    if curves := {source: points for source, points in curves.items() if points}:
        svg = charts.lines(curves, "perplexity over the prune rate", lambda v: f"{v:g}")
        made.append({"svg": Markup(svg), "caption": "Perplexity over the prune rate (lower is better)"})
    if points := sorted((rate, times["tpot"]) for rate, times in speed.items() if "tpot" in times):
        svg = charts.lines({"a token": points}, "time of a token over the prune rate", _seconds)
        made.append({"svg": Markup(svg), "caption": "Time of a token over the prune rate"})
    return made


def _maps(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    full, kept = checkpoint.keep(0.0), {rate: checkpoint.keep(rate) for rate in MAP_RATES}
    made = []
    for axis in dict.fromkeys(axis for layer in full for axis in layer):
        places = [i for i, layer in enumerate(full) if axis in layer]
        rows = [
            [
                (
                    kept[rate][i][axis] / full[i][axis],
                    f"layer {i}, rate {rate:g}: {kept[rate][i][axis]} of {full[i][axis]}",
                )
                for i in places
            ]
            for rate in MAP_RATES
        ]
        svg = charts.heat_map(rows, [f"{rate:g}" for rate in MAP_RATES], f"kept entries of {axis} per layer and rate")
        made.append(
            {"svg": Markup(svg), "caption": f"{axis}: {full[places[0]][axis]} entries, layers {_ranges(places)}"}
        )
    return made


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _order(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.plan is None:
        return None
    axes, layers = sorted(checkpoint.plan.sizes), len(checkpoint.config.pattern)
    svg = charts.strip(checkpoint.plan.order, layers, axes, "order in which units are given up")
    colors = ", ".join(f'<span class="c{i % 4}">■</span> {axis}' for i, axis in enumerate(axes))
    return {"svg": Markup(svg), "caption": Markup(f"{len(checkpoint.plan.order)} units: {colors}")}


class Report:
    """A checkpoint's page and card, from its headers and whatever was measured of it."""

    def __init__(
        self,
        folder: str | Path,
        quality: str | Path | None = None,
        speed: str | Path | None = None,
        name: str | None = None,
    ):
        """Read headers and measurements.

        Args:
            folder: the elastic checkpoint.
            quality: what `uniql evaluate --json` wrote.
            speed: what `uniql benchmark --json` wrote.
            name: of the model (default: the folder's).

        Raises:
            UserError: one of them cannot be used.
        """
        self.checkpoint = open_checkpoint(folder)
        self.quality = perplexities(read_rows(quality)) if quality else {}
        self.speed, self.speed_note = read_speed(speed) if speed else ({}, "")
        self.name = name or Path(folder).expanduser().resolve().name
        self.found = describe_checkpoint(folder)

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        shared = {"name": self.name, "found": self.found, "quality": self.quality, "facts": _facts(self.found)}
        return shared | {"speed": self.speed, "speed_note": self.speed_note, "version": __version__}

    def html(self) -> str:
        """The page: one file, nothing is loaded from elsewhere, no scripts."""
        planned = self.checkpoint.plan is not None
        return (
            _environment()
            .get_template("report.html")
            .render(
                **self._shared,
                charts=_curves(self.found, self.quality, self.speed),
                maps=_maps(self.checkpoint) if planned else [],
                order=_order(self.checkpoint),
            )
        )

    def license(self) -> dict[str, str]:
        """The hub's license fields, from the license file that travels with the checkpoint; {} where there is none."""
        files = [path for path in self.checkpoint.side_files if path.name.upper().startswith("LICENSE")]
        if not files:
            return {}
        text = " ".join(files[0].read_text(encoding="utf-8", errors="replace")[:2000].lower().split())
        for name, words in LICENSES.items():
            if all(word in text for word in words):
                return {"license": name}
        return {"license": "other", "license_name": "license-of-the-base-model", "license_link": files[0].name}

    def card(self, base_model: str | None = None, license_id: str | None = None) -> str:
        """README.md with the hub's metadata.

        Args:
            base_model: hub id of the original (default: the source, if it was one).
            license_id: the hub's identifier (default: of the license file next to the weights).

        Raises:
            UserError: a base_model that is no hub id.
        """
        source = (self.found["provenance"] or {}).get("source")
        if base_model is None and isinstance(source, str) and HUB_ID.fullmatch(source) and not Path(source).exists():
            base_model = source
        if base_model is not None and not HUB_ID.fullmatch(base_model):
            raise UserError(f"a base model is a hub id such as owner/name, not {base_model!r}")
        fields: dict[str, Any] = {"license": license_id} if license_id else self.license()
        if base_model is not None:
            fields |= {"base_model": base_model, "base_model_relation": "quantized"}
        tags = ["uniql", "jax", "quantized", "pruned", "elastic", f"{self.found['bits']}-bit", self.found["family"]]
        data = ModelCardData(**fields, library_name="uniql-jax", pipeline_tag="text-generation", tags=tags)
        return (
            _environment().get_template("card.md").render(**self._shared, front=data.to_yaml(), base_model=base_model)
        )
