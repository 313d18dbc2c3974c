"""The work folder: every input of a run is in its manifest, and a disk that says no is one line."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import cases
from uniql_jax.errors import UserError
from uniql_jax.train import lora
from uniql_jax.train.examples import from_windows
from uniql_jax.train.settings import RecoverySettings
from uniql_jax.train.work import FREE_SETTINGS, check_work_folder, disk_errors, manifest

CHANGED = {float: 0.25, int: 3, str: "other", tuple: (0.1,)}
UNSET = {"lr": 0.5, "steps": 3}


def test_every_input_of_a_run_is_in_its_manifest(rng: np.random.Generator) -> None:
    model = cases.model("qwen2", rng, num_hidden_layers=3)
    top = {name: value for name, value in model.params.items() if name != "layers"}
    layers, examples = model.params["layers"], [from_windows(cases.tokens(rng, count)) for count in (4, 2)]
    base: dict[str, Any] = {"config": model.config, "layers": layers, "top": top, "plan": model.plan}
    base |= {"training": examples[0], "validation": examples[1], "options": RecoverySettings()}
    first = manifest(**base)

    def differs(**changes: Any) -> list[str]:
        return first.differences(manifest(**base | changes))

    assert differs() == []
    last = jnp.asarray(layers[1]["mlp"]["down"]).at[-1, -1].add(1e-3)  # the last entry of a matrix in the middle
    middle = [layers[0], layers[1] | {"mlp": layers[1]["mlp"] | {"down": last}}, layers[2]]
    assert differs(layers=middle) == ["layer 1 mlp.down"]
    assert differs(top=top | {"norm": top["norm"] + 1}) == ["norm"]
    assert differs(teacher=([], {"norm": top["norm"]})) == ["teacher norm (new)"]
    for use, part in (("training", examples[0]), ("validation", examples[1])):
        mask = part.learn.copy()
        mask[-1, -1] = False
        assert differs(**{use: dataclasses.replace(part, learn=mask)}) == [f"{use} learn"]
    for field in dataclasses.fields(RecoverySettings):
        value = getattr(base["options"], field.name)
        other = dataclasses.replace(base["options"], **{field.name: UNSET.get(field.name) or CHANGED[type(value)]})
        named = differs(options=other)
        if field.name in FREE_SETTINGS:
            assert named == []
        else:
            assert [name.split(" ")[0] for name in named] == [field.name]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [OS error 28]"), "no space left"),
    ],
)
def test_a_disk_that_says_no(error: Exception, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{says}.*--resume"), disk_errors(tmp_path):
        raise error
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError


def test_what_is_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    check_work_folder(folder, resume=False)
    folder.mkdir()
    check_work_folder(folder, resume=True)  # a run that could not even begin
    (folder / "thesis.txt").touch()
    with pytest.raises(UserError, match="something else"):
        check_work_folder(folder, resume=True)
    (folder / "run.json").touch()
    check_work_folder(folder, resume=True)
    with pytest.raises(UserError, match="add --resume"):
        check_work_folder(folder, resume=False)


def test_merged_weights_that_are_not_finite_are_named(rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    factors = cases.factors(model.config, rng)
    factors["0.mlp.down"]["left"] = factors["0.mlp.down"]["left"].at[0, 0].set(jnp.inf)
    with pytest.raises(UserError, match=r"0\.mlp\.down is not finite"):
        lora.merge_layer(0, model.params["layers"][0], factors, 16.0)
