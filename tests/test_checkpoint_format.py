"""Format 1 is validated when a checkpoint is opened: whatever does not fit is refused in one line that names it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import uniql_jax
from uniql_jax import config as model_config
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.checkpoint_format import SCHEMA, check_groups, check_plan, check_section, check_tensors, expected_tensors
from uniql_jax.errors import UserError
from uniql_jax.plan import grouping, make_plan

GOLDEN = Path(__file__).parent / "golden"
LARGE = Path(uniql_jax.__file__).parent / "configs" / "llama-3.1-8b.json"
Section = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint, to break."""
    return Path(shutil.copytree(GOLDEN / "bamba", tmp_path / "ck"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(folder))
    return message


def rewritten(folder: Path, change: Callable[[Section], Any]) -> None:
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    result = change(whole["uniql"])
    if result is not None:
        whole["uniql"] = result[0]
    path.write_text(json.dumps(whole))


def put(*keys: Any, value: Any) -> Callable[[Section], Any]:
    def change(section: Section) -> None:
        place: Any = section
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Section], Any]:
    def change(section: Section) -> None:
        place: Any = section
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


@pytest.mark.parametrize("value", [[], None, "1", 7, [{"format": 1}]])
def test_a_section_that_is_no_object(folder: Path, value: Any) -> None:
    rewritten(folder, lambda section: (value,))
    assert "uniql" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("bits"), "'bits'"),
        (drop("groups"), "'groups'"),
        (drop("groups", "embed"), "groups lacks 'embed'"),
        (drop("groups", "ffn"), "groups lacks 'ffn'"),
        *[(drop("plan", key), f"uniql.plan lacks '{key}'") for key in ("sizes", "units", "costs", "order")],
        *[(put("bits", value=value), "uniql.bits must be one of") for value in (3, 0, -4, "4", None, 4.5, [4])],
        (put("groups", value=[64]), "uniql.groups must be object, not a list"),
        (put("groups", "embed", value=12), "uniql.groups.embed must be a multiple of 8"),
        (put("groups", "embed", value=0), "uniql.groups.embed must be at least 8"),
        (put("groups", "embed", value="64"), "uniql.groups.embed must be integer"),
        (put("groups", "embed", value=10**400), "uniql.groups.embed is too large"),
        (put("plan", value=[]), "uniql.plan must be an object or null"),
        (put("plan", value="loss"), "uniql.plan must be an object or null"),
        (put("plan", "sizes", "ffn", value=152), "uniql.plan.sizes.ffn is 152, but the model has 160"),
        (put("plan", "sizes", "ffn", value=10**4000), "uniql.plan.sizes.ffn is too large"),
        (put("plan", "sizes", "heads", value=4), "'heads'"),
        (drop("plan", "sizes", "vo"), "uniql.plan.sizes lacks the axis 'vo'"),
        (drop("plan", "units", "vo"), "uniql.plan.units lacks the axis 'vo'"),
        (put("plan", "units", "ffn", value=0), "uniql.plan.units.ffn must be at least 1"),
        (put("plan", "units", "ffn", value=-16), "uniql.plan.units.ffn must be at least 1"),
        (put("plan", "units", "ffn", value=1.5), "uniql.plan.units.ffn must be integer"),
        (put("plan", "units", "ffn", value=320), "uniql.plan.units.ffn is 320, more than the 160"),
        (put("plan", "units", "ffn", value=8), "uniql.plan.units.ffn is 8, which splits quantization groups of 16"),
        (put("plan", "costs", value=[]), "uniql.plan.costs has 0 layers, but the model has 2"),
        (put("plan", "costs", 1, "ffn", value=7), "uniql.plan.costs.1 is"),
        (put("plan", "costs", 0, value=None), "uniql.plan.costs.0 must be object"),
        (put("plan", "order", 0, value=[2, "ffn"]), "uniql.plan.order.0 names layer 2"),
        (put("plan", "order", 0, value=[-1, "ffn"]), "uniql.plan.order.0 names layer -1"),
        (put("plan", "order", 0, value=[10**40, "ffn"]), "uniql.plan.order.0 names layer"),
        (put("plan", "order", 1, value=[0, "vo"]), "which layer 0 does not have"),
        (put("plan", "order", 1, value=[0, "embed"]), "which layer 0 does not have"),
        (put("plan", "order", 1, value=[0]), "uniql.plan.order.1 is not a pair"),
        (put("plan", "order", 1, value=["0", "ffn"]), "uniql.plan.order.1 is not a pair"),
        (put("plan", "order", 1, value=[True, "ffn"]), "uniql.plan.order.1 is not a pair"),
        (put("plan", "order", 1, value={"layer": 0}), "uniql.plan.order.1 is not a pair"),
        (put("plan", "order", value=[[0, "ffn"]] * 10), "'ffn' of layer 0 10 times, but there are 9 cuts"),
        (put("plan", "order", value={}), "uniql.plan.order must be array"),
        (put("influence", value=[float("nan"), 0.1]), "uniql.influence holds a number that is not finite"),
        (put("influence", value=[float("inf"), 0.1]), "uniql.influence holds a number that is not finite"),
        (put("influence", value=["a"]), "uniql.influence.0 must be number"),
        (put("plan", "units", "ffn", value=float("nan")), "uniql.plan.units.ffn"),
        (put("provenance", value=3), "uniql.provenance must be object"),
        (put("manifest", value={"hash": 3}), "uniql.manifest.hash must be string"),
        (put("format", value=4), "upgrade"),
        (put("runs", value={"ssm_head": 8}), "uniql.runs is of format 2, but the format is 1"),
        *[(put("format", value=value), "checkpoint format") for value in (0, None, "1", True, 1.5, [1])],
    ],
)
def test_a_key_that_does_not_fit_is_named(folder: Path, change: Callable[[Section], Any], said: str) -> None:
    rewritten(folder, change)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"uniql": ' + "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"]
)
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json is not" in refusal(folder)


def test_format_1_may_grow_by_optional_keys(folder: Path) -> None:
    before = open_checkpoint(folder)

    def grow(section: Section) -> None:
        section["later"] = {"anything": [1, None]}
        section["plan"]["later"] = "also here"
        section["manifest"] = {"hash": "0123", "inputs": {"tokens": "4567"}, "later": 1}

    rewritten(folder, grow)
    after = open_checkpoint(folder)
    assert after.keep(0.25) == before.keep(0.25)
    assert after.meta["manifest"]["hash"] == "0123"


DATA = "layers.1.attention.o.data"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("norm"), "lacks the tensor 'norm'"),
        (lambda t: t.pop(DATA), f"lacks the tensor '{DATA}'"),
        (lambda t: t.pop("layers.1.attention.o.scale"), "lacks the tensor 'layers.1.attention.o.scale'"),
        (lambda t: t.pop("layers.0.mamba2.a_log"), "lacks the tensor 'layers.0.mamba2.a_log'"),
        (lambda t: t.update(other=np.zeros(3, np.float32)), "unknown tensor 'other'"),
        (lambda t: t.update({"layers.2.mlp.norm": t["norm"]}), "unknown tensor 'layers.2.mlp.norm'"),
        (lambda t: t.update({DATA: t[DATA][:-1]}), f"tensor '{DATA}' has the shape"),
        (lambda t: t.update({DATA: t[DATA].T}), f"tensor '{DATA}' has the shape"),
        (
            lambda t: t.update({DATA: t[DATA].view(np.float32)}),
            f"tensor '{DATA}' is float32, but its config says int32",
        ),
        (lambda t: t.update(norm=t["norm"].astype(np.float16)), "tensor 'norm' is float16"),
        (
            lambda t: t.update({"layers.0.mlp.up.scale": t["layers.0.mlp.up.scale"].astype(np.float32)}),
            "tensor 'layers.0.mlp.up.scale' is float32, but its config says bfloat16",
        ),
        (lambda t: t.update({"head_in": np.zeros((3, 3), ml_dtypes.bfloat16)}), "tensor 'head_in' has the shape"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: Callable[[Any], Any], said: str) -> None:
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [put("bits", value=8), put("bits", value=16), put("bits", value=32), put("groups", "embed", value=32)],
)
def test_bits_and_groups_must_be_those_of_the_tensors(folder: Path, change: Callable[[Section], Any]) -> None:
    rewritten(folder, change)
    assert "tensor" in refusal(folder)


def test_the_config_must_be_that_of_the_tensors(folder: Path) -> None:
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"vocab_size": whole["vocab_size"] + 1}))
    assert "tensor 'embed.data' has the shape" in refusal(folder)


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    assert not whole["tie_word_embeddings"]
    tensors = dict(load_file(folder / "model.safetensors"))
    del tensors["head.scale"]
    save_file(tensors, folder / "model.safetensors")
    assert "lacks the tensor 'head.scale'" in refusal(folder)
    path.write_text(json.dumps(whole | {"tie_word_embeddings": True}))
    assert "lacks the tensor 'head.scale'" in refusal(folder)  # half of a head is none


def test_the_schema_is_one_and_knows_what_we_write() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in GOLDEN.glob("*/config.json"):  # the plan's order, which loading checks by itself, included
        jsonschema.Draft202012Validator(schema).validate(json.loads(path.read_text())["uniql"])


def test_validating_an_8b_model_is_fast() -> None:
    config = model_config.from_hf(
        json.loads((Path(uniql_jax.__file__).parent / "configs" / "llama-3.1-8b.json").read_text())
    )
    section = json.loads(
        json.dumps(
            {
                "format": 1,
                "bits": 4,
                "groups": dict(grouping(config)["groups"]),
                "plan": make_plan(config, None).to_json(),
            }
        )
    )
    wanted, _ = expected_tensors(section, config)
    headers = {name: (dtypes[0], shape) for name, (dtypes, shape) in wanted.items()}
    check_section(section, Path("config.json"))  # the first call reads the schema
    start = time.process_time()
    check_section(section, Path("config.json"))
    check_groups(section, config, Path("config.json"))
    check_plan(section, config, Path("config.json"))
    check_tensors(section, config, headers, Path("folder"))
    assert time.process_time() - start < 0.25
