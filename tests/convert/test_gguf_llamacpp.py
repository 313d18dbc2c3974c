"""Tokenizers and RoPE of GGUF files against llama.cpp itself, which the package xllamacpp brings (optional)."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request

import pytest

from tests.convert import gguf_files
from uniql_jax.convert import gguf_tokenizer
from uniql_jax.convert.gguf import GgufReader
from uniql_jax.errors import UserError
from uniql_jax.tokenizer import load_tokenizer

pytestmark = pytest.mark.llamacpp
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SERVERS = """
import sys, xllamacpp
context = int(sys.argv[1])
flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which computes in float16
for path in sys.stdin:
    params = xllamacpp.CommonParams()
    params.model.path = path.strip()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = flash
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.fit_params = context, 1, 0, False, False
    server = None  # the one before ends first
    server = xllamacpp.Server(params)
    print("\\nLISTENS", server.listening_address, flush=True)
"""


class LlamaCpp:
    """llama.cpp's server, one file after the other, in a process of its own since it prints much."""

    def __init__(self, context: int = 64) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVERS, str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = ""

    def load(self, path) -> LlamaCpp:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        self.address = next(line.split()[1] for line in self.process.stdout if line.startswith("LISTENS"))
        return self

    def post(self, place: str, **content):
        data = json.dumps(content).encode()
        request = urllib.request.Request(self.address + place, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]


@pytest.fixture(scope="module")
def llama_cpp():
    started = LlamaCpp()
    yield started
    started.process.kill()
    started.process.communicate()


def ours_of(path, folder):
    folder.mkdir()
    reader = GgufReader(path)
    reader.write_side_files(folder)
    # transformers picks a tokenizer's class by the model's type where it can
    (folder / "config.json").write_text(json.dumps(reader.hf_config()))
    return load_tokenizer(folder)


SPECIAL = ("<s>", "</s>", "<|user|>", "<unk>")


def compare(llama_cpp, path, tmp_path, rng, count, special=SPECIAL):
    ours, theirs = ours_of(path, tmp_path / "side"), llama_cpp.load(path)
    texts = [gguf_files.TEXT, "Hello", " Hello", "", *(" ".join(["a", mark, " b"]) for mark in special)]
    texts += [gguf_files.random_text(rng, special) for _ in range(count)]
    for text in sorted(texts, key=len):
        assert ours(text).input_ids == theirs.ids(text), repr(text)


LEADERS = {split: pre for pre, split in reversed(gguf_tokenizer.SPLITS.items())}


@pytest.mark.parametrize("pre", [None, *sorted(LEADERS.values())])
def test_byte_level_splits(llama_cpp, tmp_path, rng, pre):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.byte_level() | {"tokenizer.ggml.pre": pre}, rng)
    compare(llama_cpp, path, tmp_path, rng, 300)


@pytest.mark.slow
@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.SPLITS.keys() - LEADERS.values()))
def test_other_names_of_splits(llama_cpp, tmp_path, rng, pre):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.byte_level() | {"tokenizer.ggml.pre": pre}, rng)
    compare(llama_cpp, path, tmp_path, rng, 50)


@pytest.mark.parametrize(
    "changes", [{"bos": True}, {"bos": False}, {"eos": True}, {"bos": True, "eos": True}, {"bos": False, "eos": True}]
)
@pytest.mark.parametrize("kind", ["llama-bpe", "gpt-2", "spm"])
def test_tokens_around_a_text(llama_cpp, tmp_path, rng, kind, changes):
    fields = gguf_files.sentencepiece() if kind == "spm" else gguf_files.byte_level() | {"tokenizer.ggml.pre": kind}
    fields |= {f"tokenizer.ggml.add_{role}_token": value for role, value in changes.items()}
    compare(llama_cpp, gguf_files.write(tmp_path / "m.gguf", fields, rng), tmp_path, rng, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_space_prefix": False},
        {"remove_extra_whitespaces": True},
        {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None},
        {"token_type": None},
    ],
    ids=str,
)
def test_sentencepiece(llama_cpp, tmp_path, rng, changes):
    fields = gguf_files.sentencepiece() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    # without types llama.cpp takes "<s>" for text; with us what has a role is special
    special = SPECIAL if "token_type" not in changes else ()
    compare(llama_cpp, gguf_files.write(tmp_path / "m.gguf", fields, rng), tmp_path, rng, 300, special)


@pytest.mark.parametrize("pre", ["no-such", "llama", "deepseek-llm"])
def test_unknown_splits_are_refused(tmp_path, rng, pre):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.byte_level() | {"tokenizer.ggml.pre": pre}, rng)
    with pytest.raises(UserError, match="splits text by the rule"):
        GgufReader(path).check_side_files()
