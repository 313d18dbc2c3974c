"""Small files as Megatron-LM writes them, for tests that read them."""

from __future__ import annotations

import argparse
import collections
import enum
import random
import sys
import types
import zipfile

import numpy as np
import pytest

from uniql_jax.convert import megatron
from uniql_jax.convert.megatron import MegatronReader

torch = pytest.importorskip("torch")

HIDDEN, INNER, HEADS, GROUPS, STATE, KERNEL, LAYERS, VOCAB = 32, 64, 8, 4, 6, 4, 2, 40
WIDTH = INNER + 2 * GROUPS * STATE
LAYER = {
    "mixer.dt_bias": (HEADS,),
    "mixer.A_log": (HEADS,),
    "mixer.D": (HEADS,),
    "mixer.in_proj.weight": (INNER + WIDTH + HEADS, HIDDEN),
    "mixer.conv1d.weight": (WIDTH, 1, KERNEL),
    "mixer.conv1d.bias": (WIDTH,),
    "mixer.norm.weight": (INNER,),
    "mixer.out_proj.weight": (HIDDEN, INNER),
    "norm.weight": (HIDDEN,),
}
SHAPES = {
    "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
    **{f"decoder.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()},
    "decoder.final_norm.weight": (HIDDEN,),
    "output_layer.weight": (VOCAB, HIDDEN),
}
"""As in nvidia/mamba2-8b-3t-4k."""


def hf_name(theirs: str) -> str:
    if theirs.startswith("decoder.layers."):
        return "backbone.layers." + theirs.removeprefix("decoder.layers.")
    return megatron.NAMES[theirs]


def state_dict(rng: np.random.Generator, dtype=torch.bfloat16) -> collections.OrderedDict:
    state = collections.OrderedDict(
        (name, torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype))
        for name, shape in SHAPES.items()
    )
    vars(state)["_metadata"] = collections.OrderedDict({"": {"version": 1}})  # as Module.state_dict() leaves it
    return state


def arguments(**changes):
    known = dict(
        hidden_size=HIDDEN, num_layers=LAYERS, padded_vocab_size=VOCAB, mamba_state_dim=STATE, mamba_num_groups=GROUPS,
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, norm_epsilon=1e-5, normalization="RMSNorm",
        fp32_residual_connection=False, apply_layernorm_1p=False, params_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip
    return argparse.Namespace(**(known | changes))


def write(path, state, args=None, **extra):
    """The file that Megatron-LM writes: the enum is a class of its own, which no reader has."""
    module = types.ModuleType("megatron.core.enums")
    kind = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module="megatron.core.enums", qualname="ModelType")
    vars(module)["ModelType"] = kind
    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "model": state,
        "rng_state": [
            {"random_rng_state": random.getstate(), "np_rng_state": ("MT19937", np.arange(4, dtype=np.uint32), 1)},
            {"torch_rng_state": torch.get_rng_state(), "shape": torch.Size([2, 3]), "set": {1, 2}},
        ],
        "opt_param_scheduler": collections.defaultdict(list, {"lr": [3e-4]}),
    } | extra  # fmt: skip
    if args is None:
        del content["args"]
    else:
        args.model_type = kind.encoder_or_decoder
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("megatron", "megatron.core"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "megatron.core.enums", module)
        torch.save(content, path)
    return path


def replace_entry(path, ending: str, content: bytes | None, method=zipfile.ZIP_STORED):
    """The same archive with another content of one entry, or without it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, old in entries.items():
            new = content if name.endswith(ending) else old
            if new is not None:
                archive.writestr(name, new)
    return path


def assert_equal(reader: MegatronReader, state) -> None:
    assert set(reader.names()) == {hf_name(name) for name in SHAPES}
    for theirs, value in state.items():
        if theirs in SHAPES:
            ours = reader.read(hf_name(theirs))
            assert ours.flags.c_contiguous
            assert reader.names()[hf_name(theirs)] == (ours.dtype, tuple(value.shape))
            np.testing.assert_array_equal(ours.astype(np.float32), value.float().numpy(), err_msg=theirs)
