"""Exported GGUF files in llama.cpp itself, which the package xllamacpp brings (optional): logits, tokens, ids."""

from __future__ import annotations

import importlib.util
import unicodedata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import published, reference
from tests.convert import common, exports, gguf_files, test_gguf
from tests.convert.test_gguf_llamacpp import LlamaCpp
from uniql_jax.commands import compress as compress_command
from uniql_jax.convert.from_hf import convert
from uniql_jax.convert.gguf_tokenizer import GgufTokenizer
from uniql_jax.convert.gguf_vocabulary import Vocabulary, read_vocabulary
from uniql_jax.convert.locate import DEMO_PACKAGE
from uniql_jax.tokenizer import load_tokenizer

pytestmark = pytest.mark.llamacpp
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ROOT = Path(__file__).resolve().parents[2]
FLOATS, INTEGERS = 2e-5, 0.05
"""Bounds of the mean difference of log probabilities over their spread. With float32 weights llama.cpp computes in
float32, as we do; products of 4-bit weights round activations to 8 bits, 32 at a time."""


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed):
    return exports.made(tmp_path_factory, seed)


@pytest.fixture(scope="module")
def llama_cpp():
    started = LlamaCpp(context=512)
    yield started
    started.process.kill()
    started.process.communicate()


def continued(checkpoint: Path, rate: float, rng: np.random.Generator, length: int) -> tuple[list[int], np.ndarray]:
    """A prompt of random tokens, as long as can be, after which a whole character follows, and our logits there.

    The end of a text or a part of a character has no log probabilities in the server's answer.
    """
    tokenizer = load_tokenizer(checkpoint)
    for _ in range(20):
        tokens = rng.integers(3, exports.tiny.VOCAB, length)
        logits = exports.our_logits(checkpoint, rate, tokens)
        whole = [tokenizer.decode([token], skip_special_tokens=True) for token in logits.argmax(-1)]
        if ends := [i for i, text in enumerate(whole) if text and text.isascii()]:
            return tokens[: ends[-1] + 1].tolist(), logits[ends[-1]]
    raise AssertionError("no prompt is followed by a whole character")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def difference(llama_cpp, prompt: list[int], ours: np.ndarray) -> float:
    """Mean difference of the log probabilities after a prompt, over the spread of ours."""
    answer = llama_cpp.post(
        "/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=len(ours), cache_prompt=False
    )
    found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    ids = sorted(found)
    assert len(ids) > 0.9 * len(ours)
    want = log_softmax(ours)[ids]
    return float(np.abs(np.array([found[i] for i in ids]) - want).mean() / want.std())


@pytest.mark.parametrize("rate", [0.0, 0.35])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("tied", 4),
        ("biased", 4),
        ("biased", 8),
        ("qwen2", 4),
        ("qwen3", 4),
        ("portable", 4),
        pytest.param("mistral", 4, marks=pytest.mark.slow),
        pytest.param("portable-ssm", 4, marks=pytest.mark.slow),
        pytest.param("granitehybrid", 4, marks=pytest.mark.slow),
        pytest.param("phi3", 4, marks=pytest.mark.slow),
    ],
)
def test_log_probabilities_are_ours(llama_cpp, made, tmp_path, rng, name, bits, rate):
    checkpoint = made.checkpoint(name, bits)
    prompt, ours = continued(checkpoint, rate, rng, 90)
    for dtype, bound in (("float32", FLOATS), (None, INTEGERS)):
        exports.export(checkpoint, tmp_path / f"{dtype}.gguf", rate, "gguf", dtype=dtype)
        llama_cpp.load(tmp_path / f"{dtype}.gguf")
        assert difference(llama_cpp, prompt, ours) < bound


@pytest.mark.parametrize(
    "name",
    [
        "phi3",
        "bamba",
        "nemotron_h",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("granite", "smollm3-four", "mamba2", "granitehybrid")
        ),
    ],
)
def test_every_family_computes_ours(llama_cpp, tmp_path, rng, name):
    """Random integers, since nothing here depends on how they came about."""
    checkpoint = exports.tiny.packed(tmp_path / name, exports.MODELS[name], 4, rng)
    exports.tiny.tokenizer().save_pretrained(checkpoint)
    prompt, ours = continued(checkpoint, 0.35, rng, 90)
    for dtype, bound in (("float32", FLOATS), (None, INTEGERS)):
        exports.export(checkpoint, tmp_path / f"{dtype}.gguf", 0.35, "gguf", dtype=dtype)
        llama_cpp.load(tmp_path / f"{dtype}.gguf")
        assert difference(llama_cpp, prompt, ours) < bound


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_frequencies(llama_cpp, tmp_path, rng, seed, scaling):
    hf = published.shrink(published.QWEN2_5_05B, **exports.SMALL) | {"rope_scaling": scaling}
    reference.save(reference.build(hf, seed), tmp_path / "hub", hf)
    exports.tiny.tokenizer().save_pretrained(tmp_path / "hub")
    hf |= {"vocab_size": len(load_tokenizer(tmp_path / "hub"))}  # a token of Qwen2's own comes in
    reference.save(reference.build(hf, seed), tmp_path / "hub", hf)
    convert(str(tmp_path / "hub"), str(tmp_path / "ours"))
    exports.export(tmp_path / "ours", tmp_path / "m.gguf", 0.0, "gguf")
    prompt, ours = continued(tmp_path / "ours", 0.0, rng, 200)
    llama_cpp.load(tmp_path / "m.gguf")
    assert difference(llama_cpp, prompt, ours) < FLOATS


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "qwen2-tied"])
def test_what_we_read_is_what_llama_cpp_computes(llama_cpp, tmp_path, rng, name):
    """A file as llama.cpp's own converter lays it out, opened as a source."""
    hf = common.hf_config(name, hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=len(test_gguf.PIECES))
    tensors = {key: 0.3 * value for key, value in common.state_dict(hf, rng).items()}
    path = test_gguf.write(tmp_path / "m.gguf", hf, tensors, vocabulary=True)
    prompt = rng.integers(1, len(test_gguf.PIECES), 40)
    ours = np.asarray(uniql_jax.load_source(str(path), jnp.float32)(jnp.asarray(prompt[None], jnp.int32)))[0]
    while ours[len(prompt) - 1].argmax() in (0, test_gguf.PIECES.index("Ġ")):  # an end or a space has no answer
        prompt = prompt[:-1]
    llama_cpp.load(path)
    assert difference(llama_cpp, prompt.tolist(), ours[len(prompt) - 1]) < FLOATS


def sentencepiece(form: str):
    """A sentencepiece vocabulary as files for transformers have it: the spaces as a normalizer or as Metaspace."""
    import tokenizers

    fields = gguf_files.sentencepiece()
    file = Vocabulary({key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}).as_file(Path("x"))
    tokenizer = GgufTokenizer(file).build()
    if form == "metaspace":
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "always", split=False)
    return tokenizer


def byte_level(form: str):
    """A byte-level vocabulary with a rule of splitting of its own; "ignore merges" as in Llama 3."""
    fields = gguf_files.byte_level() | {"tokenizer.ggml.pre": {"whole": "llama-bpe"}.get(form, form)}
    file = Vocabulary({key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}).as_file(Path("x"))
    return GgufTokenizer(file).build()


@pytest.mark.parametrize("form", ["normalizer", "metaspace", "whole", "gpt-2", "qwen2", "smollm", "tekken", "default"])
def test_written_tokenizers_give_the_ids_of_the_original(llama_cpp, tmp_path, rng, form):
    tokenizer = sentencepiece(form) if form in ("normalizer", "metaspace") else byte_level(form)
    config = exports.tiny.config(vocab_size=len(tokenizer) + 3)
    fields = read_vocabulary(tmp_path, tokenizer, config).fields
    path = gguf_files.write(tmp_path / "m.gguf", {f"tokenizer.ggml.{key}": fields[key] for key in fields}, rng)
    llama_cpp.load(path)
    special = () if form == "metaspace" else tuple(tokenizer.get_added_vocab())
    for text in (gguf_files.TEXT, "Hello", " Hello", "", *(gguf_files.random_text(rng, special) for _ in range(100))):
        if form == "metaspace":  # adds a space to texts that begin with none only; llama.cpp always does
            text = text.lstrip(" ")
        assert llama_cpp.ids(text) == tokenizer(text).input_ids, repr(text)


def check_model(llama_cpp, checkpoint: Path, folder: Path, rng: np.random.Generator, rate: float) -> int:
    """Assert that 256 greedy tokens and the tokenizer of an export are ours; returns the bytes of its file."""
    path = folder / f"{rate}.gguf"
    exports.export(checkpoint, path, rate, "gguf")
    llama_cpp.load(path)
    tokenizer = load_tokenizer(checkpoint)
    special = tuple(tokenizer.get_added_vocab())[:3]
    for text in (gguf_files.TEXT, "", " a", *(gguf_files.random_text(rng, special) for _ in range(40))):
        text = unicodedata.normalize("NFC", text)  # which some tokenizers do and llama.cpp does not
        assert llama_cpp.ids(text) == tokenizer(text).input_ids, repr(text)
    prompt = tokenizer("The history of the city begins in the year 1204, when a small group of traders").input_ids
    answer = llama_cpp.post(
        "/completion", prompt=prompt, n_predict=256, temperature=0, ignore_eos=True, return_tokens=True
    )
    tokens = np.array([*prompt, *answer["tokens"]])
    assert len(answer["tokens"]) == 256
    logits = exports.our_logits(checkpoint, rate, tokens[:-1])[len(prompt) - 1 :]
    assert difference(llama_cpp, prompt, logits[0]) < INTEGERS
    # ours next to the same words: the same token, but where rounding decides between two that are as good
    chosen = logits[np.arange(256), answer["tokens"]]
    assert (logits.argmax(-1) == answer["tokens"]).mean() > 0.95
    assert ((logits.max(-1) - chosen) / logits.std(-1)).max() < 4 * INTEGERS
    return path.stat().st_size


def compressed(source: str, folder: Path, tokens: tuple[int, int]) -> Path:
    """A compressed model, calibrated on this repository's documentation."""
    windows, length = (str(count) for count in tokens)
    texts = [str(ROOT / "README.md"), str(ROOT / "docs" / "concepts.md"), str(ROOT / "docs" / "faq.md")]
    arguments = ["--ckpt", source, "--out", str(folder), "--calib", *texts]
    compress_command.main([*arguments, "--calib-windows", windows, "--calib-length", length, "--rounding", "nearest"])
    return folder


def test_a_trained_model_continues_as_ours(llama_cpp, tmp_path, rng):
    checkpoint = compressed(str(ROOT / "examples" / "tiny" / "qwen2"), tmp_path / "ours", (4, 64))
    sizes = [check_model(llama_cpp, checkpoint, tmp_path, rng, rate) for rate in (0.0, 0.15, 0.35)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
def test_smollm2_continues_as_ours(llama_cpp, tmp_path, rng):
    if importlib.util.find_spec(DEMO_PACKAGE) is None:
        pytest.skip("the demo model is not installed")
    checkpoint = compressed("demo", tmp_path / "ours", (4, 256))
    sizes = [check_model(llama_cpp, checkpoint, tmp_path, rng, rate) for rate in (0.0, 0.15, 0.35)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 0.85 * sizes[0]
