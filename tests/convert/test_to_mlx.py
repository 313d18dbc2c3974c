"""mlx export: mlx-lm loads it as it is, and computes and continues as we do (where its CPU wheels are installed)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import reference
from tests.convert import exports
from uniql_jax.convert.to_hf import export as dense_export
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader

CASES = [("untied", 4), ("portable", 4), ("portable", 8), ("tied", 4), ("biased", 4), ("qwen2", 4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed):
    return exports.made(tmp_path_factory, seed)


def unpacked(reader: ShardReader, stem: str, section: dict) -> np.ndarray:
    """A matrix as mlx's documentation has it, number by number of a word."""
    own = section.get(stem, section)
    bits, group = own["bits"], own["group_size"]
    words, scales, biases = (reader.read(f"{stem}.{part}") for part in ("weight", "scales", "biases"))
    assert words.dtype == np.uint32
    q = np.stack([(words >> np.uint32(bits * k)) & np.uint32((1 << bits) - 1) for k in range(32 // bits)], -1)
    q = q.reshape(len(words), -1)
    assert scales.shape == biases.shape == (len(words), q.shape[1] // group)
    scales, biases = (np.repeat(part.astype(np.float32), group, 1) for part in (scales, biases))
    return scales * q + biases


@pytest.mark.parametrize("rate", [0.0, 0.35])
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_packed_number_is_that_of_the_dense_export(made, tmp_path, name, bits, rate):
    checkpoint = made.checkpoint(name, bits)
    exports.export(checkpoint, tmp_path / "mlx", rate, "mlx")
    dense_export(checkpoint, tmp_path / "dense", rate, dtype="float32")
    section = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    reader, dense = ShardReader(tmp_path / "mlx"), ShardReader(tmp_path / "dense")
    stems = [tensor.removesuffix(".scales") for tensor in reader.names() if tensor.endswith(".scales")]
    for stem in stems:
        want, got = dense.read(f"{stem}.weight"), unpacked(reader, stem, section)
        if name == "qwen2" and "o_proj" in stem:
            continue  # the dense export may keep the output bias in a free column
        np.testing.assert_array_equal(got, want[: got.shape[0], : got.shape[1]], err_msg=stem)
    groups = {own["group_size"] for own in [section, *(v for v in section.values() if isinstance(v, dict))]}
    assert groups <= {32, 64, 128}
    if name == "portable":  # every matrix but the head, which was tied and rotated
        assert len(stems) == 2 * 7 + 1
    left = [n for n, (dtype, shape) in reader.names().items() if len(shape) == 2 and dtype.itemsize == 2]
    assert all(n.endswith((".scales", ".biases")) or name != "portable" or n == "lm_head.weight" for n in left)


def in_transformers(checkpoint, folder, rate, mlx):
    """The dense export in transformers, float32, with what mlx holds in bfloat16 rounded to that."""
    torch = pytest.importorskip("torch")
    dense_export(checkpoint, folder, rate, dtype="float32")
    model, names = reference.load(folder), set(ShardReader(mlx).names())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.replace(".weight", ".scales") not in names:
                parameter.copy_(parameter.bfloat16().float())
    return model


LATER = [pytest.param(name, 4, rate, marks=pytest.mark.slow) for name in ("mistral", "smollm3") for rate in (0.0, 0.35)]
EXACT = [("untied", 4, 0.0), ("untied", 4, 0.35), ("untied", 8, 0.15), ("portable", 4, 0.35), ("qwen3", 4, 0.35)]


@pytest.mark.parametrize(("name", "bits", "rate"), [*EXACT, ("qwen2", 4, 0.0), ("biased", 4, 0.35), *LATER])
def test_mlx_lm_computes_and_continues_as_we_do(made, tmp_path, rng, name, bits, rate):
    """In float32 on both sides: logits, and where all is packed 64 greedy tokens through mlx-lm's cache."""
    mx = pytest.importorskip("mlx.core")
    utils, caches = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx_lm.models.cache")
    checkpoint = made.checkpoint(name, bits)
    exports.export(checkpoint, tmp_path / "mlx", rate, "mlx")
    model, _ = utils.load_model(tmp_path / "mlx")
    model.set_dtype(mx.float32)
    prompt = rng.integers(3, exports.tiny.VOCAB, 30)
    theirs = np.asarray(model(mx.array(prompt[None])))
    if (name, bits, rate) not in EXACT:  # with an output matrix and biases in bfloat16
        assert reference.relative_error(theirs[0], exports.our_logits(checkpoint, rate, prompt)) < 2**-7
        return
    same = in_transformers(checkpoint, tmp_path / "dense", rate, tmp_path / "mlx")
    assert reference.relative_error(theirs, reference.logits(same, prompt[None])) < 2e-5
    if name != "untied":
        return
    cache, tokens, step = caches.make_prompt_cache(model), list(map(int, prompt)), prompt
    for _ in range(64):
        step = np.asarray(mx.argmax(model(mx.array(step[None]), cache=cache)[0, -1:], axis=-1))
        tokens.append(int(step[0]))
    ours = exports.our_logits(checkpoint, rate, np.asarray(tokens[:-1]))
    assert tokens[len(prompt) :] == ours[len(prompt) - 1 :].argmax(-1).tolist()


def test_other_options_and_families_are_refused(made, tmp_path, hf_folder):
    from uniql_jax.convert.from_hf import convert

    convert(str(hf_folder("mamba2-130m")), str(tmp_path / "ours"))
    with pytest.raises(UserError, match="mamba2 models cannot leave"):
        exports.export(tmp_path / "ours", tmp_path / "out", 0.0, "mlx")
    with pytest.raises(UserError, match="takes no --dense-head"):
        exports.export(made.checkpoint("tied", 4), tmp_path / "out", 0.0, "mlx", dense_head=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
