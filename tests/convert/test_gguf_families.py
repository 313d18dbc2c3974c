"""GGUF sources of every family: the model of the folder that was converted, and what llama.cpp computes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import published
from tests.convert import common, gguf_models, test_gguf
from uniql_jax.convert.source import open_source

pytest.importorskip("gguf")

PIECES = test_gguf.PIECES
SMALL = {"vocab_size": len(PIECES), "bos_token_id": None, "eos_token_id": 0, "num_hidden_layers": 2}
FAMILIES = {
    "mistral": published.shrink(published.MISTRAL_7B, **SMALL),
    "qwen3": published.shrink(published.QWEN3_06B, **SMALL),
    "smollm3": published.shrink(
        published.SMOLLM3_3B, no_rope_layers=[1, 1, 1, 0], tie_word_embeddings=True, **SMALL | {"num_hidden_layers": 4}
    ),
    "granite": published.shrink(published.GRANITE_4_1_3B, attention_bias=True, **SMALL),
    "phi3": published.shrink(published.PHI_4_MINI, **SMALL),
    "mamba2": published.shrink_ssm(published.MAMBA2_8B, **SMALL),
    "mamba2-tied": published.shrink_ssm(published.MAMBA2_130M, **SMALL),
    "bamba": published.shrink_ssm(published.BAMBA_9B_V2, attn_layer_indices=[1], **SMALL),
    "granitemoehybrid": published.shrink_ssm(
        published.GRANITE_4_0_H_MICRO, layer_types=["mamba", "attention"], mamba_n_groups=2, **SMALL
    ),
    "nemotron_h": published.shrink_ssm(
        published.NEMOTRON_NANO_9B_V2, hybrid_override_pattern="M-*-", **SMALL | {"num_hidden_layers": 4}
    ),
}


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp")
    from tests.convert.test_gguf_llamacpp import LlamaCpp

    started = LlamaCpp(context=256)
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_folder_that_was_converted(tmp_path, rng, name):
    hf = FAMILIES[name]
    tensors = common.state_dict(hf, rng)
    folder = open_source(common.write(tmp_path / "m", hf, tensors))
    opened = open_source(gguf_models.write(tmp_path / "m.gguf", hf, tensors, PIECES))
    ours, theirs = test_gguf.leaves_of(folder), test_gguf.leaves_of(opened)
    assert set(ours) == set(theirs)
    for leaf in ours:
        np.testing.assert_allclose(theirs[leaf], ours[leaf], rtol=1e-6, atol=1e-6, err_msg=leaf)
    model_type = "llama" if name == "mistral" else hf["model_type"]
    assert (opened.config.model_type, opened.config.pattern) == (model_type, folder.config.pattern)
    if folder.config.heads:
        assert opened.config.softmax_scale == pytest.approx(folder.config.softmax_scale, rel=1e-6)
    assert opened.config.norm_eps == pytest.approx(folder.config.norm_eps, rel=1e-6)


SHOWN = ("granite", "phi3", "nemotron_h")


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHOWN else pytest.mark.slow) for name in FAMILIES]
)
def test_what_we_read_is_what_llama_cpp_computes(llama_cpp, tmp_path, rng, name):
    from tests.convert.test_to_gguf_llamacpp import FLOATS, difference

    hf = FAMILIES[name]
    tensors = {key: value * (1 if value.ndim == 1 else 0.3) for key, value in common.state_dict(hf, rng).items()}
    path = gguf_models.write(tmp_path / "m.gguf", hf, tensors, PIECES)
    prompt = rng.integers(1, len(PIECES), 40)
    ours = np.asarray(uniql_jax.load_source(str(path), jnp.float32)(jnp.asarray(prompt[None], jnp.int32)))[0]
    while ours[len(prompt) - 1].argmax() in (0, PIECES.index("Ġ")):  # an end or a space has no answer
        prompt = prompt[:-1]
    llama_cpp.load(path)
    assert difference(llama_cpp, prompt.tolist(), ours[len(prompt) - 1]) < FLOATS
