"""Megatron-LM files: what torch.save wrote is read back without torch, and nothing that a file says is ever run."""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.convert.megatron_files import (
    GROUPS,
    HEADS,
    HIDDEN,
    INNER,
    KERNEL,
    LAYERS,
    SHAPES,
    STATE,
    VOCAB,
    arguments,
    assert_equal,
    hf_name,
    state_dict,
    write,
)
from uniql_jax.convert.megatron import MegatronReader
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_comes_back(tmp_path, rng, dtype):
    state = state_dict(rng, dtype)
    reader = MegatronReader(write(tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt", state, arguments()))
    assert reader.bytes_read == 0
    assert_equal(reader, state)
    assert reader.bytes_read == sum(value.nbytes for value in state.values())
    assert reader.names()["lm_head.weight"][0].name == str(dtype).removeprefix("torch.")
    with pytest.raises(KeyError):
        reader.read("decoder.final_norm.weight")


def test_the_source_hands_out_our_leaves(tmp_path, rng):
    """z, x, B, C, dt as the rows of in_proj lie in the file, in our layout."""
    state = state_dict(rng)
    source = open_source(write(tmp_path / "mamba2.pt", state, arguments()))
    ssm, block = source.config.ssm, source.layer(1)["mamba2"]
    rows = state["decoder.layers.1.mixer.in_proj.weight"].float().numpy()
    wide, shared = ssm.heads * ssm.head_dim, ssm.groups * ssm.state
    ends = np.cumsum([wide, wide, shared, shared, ssm.heads])
    assert ends[-1] == len(rows)
    z, x, b, c, dt = np.split(rows, ends[:-1])
    for name, value in (("z", z), ("x", x)):
        np.testing.assert_array_equal(block[name], value.reshape(ssm.heads, ssm.head_dim, -1).transpose(1, 0, 2))
    for name, value in (("b", b), ("c", c)):
        np.testing.assert_array_equal(block[name], value.reshape(ssm.groups, ssm.state, -1).transpose(1, 0, 2))
    np.testing.assert_array_equal(block["dt"], dt)
    assert set(source.top()) == {"embed", "norm", "head"}


def test_a_file_that_is_cut_while_it_is_open(tmp_path, rng):
    path = write(tmp_path / "m.pt", state_dict(rng), arguments())
    reader = MegatronReader(path)
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=r"m\.pt is truncated .*'lm_head\.weight'"):
        reader.read("lm_head.weight")
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        reader.read("lm_head.weight")


def test_views_strides_and_parameters(tmp_path, rng):
    state = state_dict(rng, torch.float32)
    pool = torch.from_numpy(rng.standard_normal((3, HEADS)).astype(np.float32))
    state["decoder.layers.0.mixer.A_log"] = pool[1]  # one storage for several tensors
    state["decoder.layers.0.mixer.D"] = pool[:, 2:].reshape(-1)[:HEADS]
    state["decoder.layers.1.mixer.D"] = pool.T.contiguous()[:, 2]  # every third element
    name = "decoder.layers.1.mixer.out_proj.weight"
    state[name] = state[name].T.contiguous().T
    state["decoder.final_norm.weight"] = torch.nn.Parameter(state["decoder.final_norm.weight"])
    state["output_layer.weight"] = state["output_layer.weight"].double()
    reader = MegatronReader(write(tmp_path / "m.pt", state, arguments()))
    assert_equal(reader, {key: value.detach() for key, value in state.items()})


def test_other_entries_are_dropped_and_fused_norms_found(tmp_path, rng):
    state = state_dict(rng)
    for i in range(LAYERS):  # as Transformer Engine names the norm before a projection
        state[f"decoder.layers.{i}.mixer.in_proj.layer_norm_weight"] = state.pop(f"decoder.layers.{i}.norm.weight")
        state[f"decoder.layers.{i}.mixer.in_proj._extra_state"] = None
        state[f"decoder.layers.{i}.mixer.out_proj._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    state["rotary_pos_emb.inv_freq"] = torch.ones(4)
    reader = MegatronReader(write(tmp_path / "m.pt", state, arguments()))
    assert set(reader.names()) == {hf_name(name) for name in SHAPES}
    both = state_dict(rng)
    both["decoder.layers.0.mixer.in_proj.layer_norm_weight"] = both["decoder.layers.0.norm.weight"]
    with pytest.raises(UserError, match=r"'backbone\.layers\.0\.norm\.weight' is stored twice"):
        MegatronReader(write(tmp_path / "twice.pt", both, arguments()))
    odd = state_dict(rng) | {"embedding.position_embeddings.weight": torch.ones(3)}
    assert (
        "embedding.position_embeddings.weight" in MegatronReader(write(tmp_path / "odd.pt", odd, arguments())).names()
    )


def test_no_torch_is_needed_to_read(tmp_path, rng):
    path = write(tmp_path / "m.pt", state_dict(rng), arguments())
    code = (
        "import sys; sys.modules['torch'] = None; from convert.megatron import MegatronReader; "
        f"print(MegatronReader({str(path)!r}).read('lm_head.weight').shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"({VOCAB}, {HIDDEN})", done.stderr


# The config


def test_config_builds_the_model_in_transformers(tmp_path, rng):
    transformers = pytest.importorskip("transformers")
    state = state_dict(rng, torch.float32)
    reader = MegatronReader(write(tmp_path / "m.pt", state, arguments()))
    config = reader.hf_config()
    assert json.loads(json.dumps(config)) == config
    model = transformers.AutoModelForCausalLM.from_config(transformers.Mamba2Config(**config)).eval()
    model.load_state_dict({name: torch.from_numpy(reader.read(name)) for name in reader.names()}, strict=True)
    assert model.backbone.layers[0].mixer.norm.group_size == INNER // GROUPS
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(VOCAB)[None]).logits).all()


def test_config_from_arguments_and_from_shapes(tmp_path, rng):
    state = state_dict(rng)
    full = MegatronReader(write(tmp_path / "a.pt", state, arguments())).hf_config()
    sizes = dict(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_heads=HEADS, head_dim=INNER // HEADS, n_groups=GROUPS,
        expand=2, state_size=STATE, conv_kernel=KERNEL, vocab_size=VOCAB, chunk_size=128, layer_norm_epsilon=1e-5,
        torch_dtype="bfloat16", tie_word_embeddings=False, residual_in_fp32=False, use_bias=False, use_conv_bias=True,
        eos_token_id=None,
    )  # fmt: skip
    assert {name: full[name] for name in sizes} == sizes
    # the state's size gives the number of groups
    some = MegatronReader(write(tmp_path / "b.pt", state, argparse.Namespace(mamba_state_dim=STATE))).hf_config()
    assert {name: some[name] for name in sizes if name != "residual_in_fp32"} == {
        name: value for name, value in sizes.items() if name != "residual_in_fp32"
    }
    # without any arguments there are Megatron's eight groups
    none = MegatronReader(write(tmp_path / "c.pt", state, None)).hf_config()
    assert (none["n_groups"], none["state_size"]) == (8, GROUPS * STATE // 8)
    tied = collections.OrderedDict((name, value) for name, value in state.items() if name != "output_layer.weight")
    assert MegatronReader(write(tmp_path / "d.pt", tied, arguments())).hf_config()["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tensor_model_parallel_size=2), "split with tensor_model_parallel_size 2; merge it"),
        (dict(pipeline_model_parallel_size=4), "split with pipeline_model_parallel_size 4; merge it"),
        (dict(norm_epsilon=1e-6), "norm_epsilon 1e-06"),
        (dict(normalization="LayerNorm"), "other norms"),
        (dict(apply_layernorm_1p=True), "other norms"),
        (dict(mamba_num_groups=3), "no Mamba2 layer"),
        (dict(mamba_state_dim=500, mamba_num_groups=None), "no Mamba2 layer"),
    ],
    ids=str,
)
def test_models_that_are_not_served(tmp_path, rng, changes, message):
    path = write(tmp_path / "m.pt", state_dict(rng), arguments(**changes))
    with pytest.raises(UserError, match=message) as error:
        MegatronReader(path)
    assert "\n" not in str(error.value)


def test_pieces_and_hybrids_are_refused(tmp_path, rng):
    state = state_dict(rng)
    path = write(tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt", state, None)
    (tmp_path / "release" / "mp_rank_01").mkdir()
    with pytest.raises(UserError, match=r"one of 2 pieces \(mp_rank_\*\)"):
        MegatronReader(path)
    for name in ("decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        with pytest.raises(UserError, match="pure Mamba2 models only"):
            MegatronReader(write(tmp_path / "hybrid.pt", state | {name: torch.ones(2)}, arguments()))
    for gone in ("embedding.word_embeddings.weight", "decoder.layers.0.mixer.A_log"):
        left = collections.OrderedDict((name, value) for name, value in state.items() if name != gone)
        with pytest.raises(UserError, match="lacks the tensor"):
            MegatronReader(write(tmp_path / "less.pt", left, arguments()))
    with pytest.raises(UserError, match="holds no Megatron-LM model"):
        MegatronReader(write(tmp_path / "none.pt", None, arguments()))
