"""Megatron-LM checkpoints of Mamba2 (NVIDIA's mamba2-8b) as a transformers mamba2: names, config and tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from uniql_jax.convert.sentencepiece_model import Vocabulary, vocabulary
from uniql_jax.convert.torch_file import Record, Tensor, TorchFile
from uniql_jax.errors import UserError

NAMES = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Megatron's tensors outside the layers, by transformers' names for a mamba2 model; inside they differ in a prefix."""

GROUPS, NORM_EPS, CHUNK = 8, 1e-5, 128
"""What Megatron's Mamba layer takes unless the arguments say otherwise; its gated norm always has this epsilon."""

_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_OUR_LAYER = re.compile(r"backbone\.layers\.(\d{1,6})\.")
_RANK = re.compile(r"mp_rank_\d+(_\d+)*")


class MegatronReader:
    """The tensors of one Megatron-LM Mamba2 file by transformers' names, each read when it is asked for.

    `bytes_read` counts the tensor bytes handed out so far. Raises UserError for a file that is no torch checkpoint, is
    truncated or damaged, is one piece of a split model, or holds another kind of model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._refuse_pieces_beside()
        self._file = TorchFile(self.path)
        content = self._file.content()
        self._args = _arguments(content)
        self._refuse_pieces_and_options()
        self._tensors = self._weights(content)
        self._sizes = self._mamba_sizes()
        self._tokenizer = self._find_tokenizer()

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor in the file's number format, contiguous; only its bytes are read. KeyError if unknown."""
        tensor = self._tensors[name]
        value = self._file.read(name, tensor)
        self.bytes_read += value.nbytes
        return value

    def hf_config(self) -> dict[str, Any]:
        """The config.json of this model as a transformers mamba2; UserError for a tokenizer that cannot be read."""
        embed = self._tensors[NAMES["embedding.word_embeddings.weight"]]
        known = self._vocabulary()
        ids = known.ids if known else {}
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ids.get("eos"),
            "pad_token_id": ids.get("pad"),
            "chunk_size": CHUNK,
            "hidden_act": "silu",
            "layer_norm_epsilon": NORM_EPS,
            "residual_in_fp32": bool(self._args.get("fp32_residual_connection", True)),
            "tie_word_embeddings": NAMES["output_layer.weight"] not in self._tensors,
            "torch_dtype": embed.dtype.name,
            "use_bias": "backbone.layers.0.mixer.in_proj.bias" in self._tensors,
            "use_conv_bias": "backbone.layers.0.mixer.conv1d.bias" in self._tensors,
            "vocab_size": embed.shape[0],
            **self._sizes,
        }

    def check_side_files(self) -> None:
        """Raise UserError now, not after hours of work, if transformers will not read the tokenizer as it is meant."""
        known = self._vocabulary()
        if known is None:
            return
        if not known.bpe:
            raise UserError(
                f"{self._tokenizer} is a unigram tokenizer, which is not supported; without that file the model is "
                "converted without a tokenizer"
            )
        if importlib.util.find_spec("sentencepiece") is None:
            raise UserError(f"transformers needs sentencepiece to read {self._tokenizer}: pip install sentencepiece")

    def write_side_files(self, folder: str | os.PathLike[str]) -> None:
        """Copy the sentencepiece tokenizer, byte for byte, as tokenizer.model, and say in JSON files how it is used."""
        known = self._vocabulary()
        if known is None or self._tokenizer is None:
            return
        shutil.copyfile(self._tokenizer, Path(folder) / "tokenizer.model")
        # transformers would take another class for this model_type, one that loses spaces; Megatron adds no bos or eos
        tokenizer: dict[str, Any] = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
        }
        tokenizer |= {"add_prefix_space": known.dummy_prefix, "clean_up_tokenization_spaces": False}
        tokenizer |= {f"{role}_token": known.texts.get(role) for role in ("bos", "eos", "pad", "unk")}
        _write_json(Path(folder) / "tokenizer_config.json", tokenizer)
        ids = {f"{role}_token_id": known.ids[role] for role in ("bos", "eos", "pad") if role in known.ids}
        _write_json(Path(folder) / "generation_config.json", ids)

    def _weights(self, content: Any) -> dict[str, Tensor]:
        """The tensors of the state dict, renamed; UserError for what is no weight of a Mamba2 model."""
        state = content.get("model") if isinstance(content, dict) else None
        if not isinstance(state, dict):
            raise UserError(f"{self.path} holds no Megatron-LM model (an entry 'model' with its tensors)")
        tensors: dict[str, Tensor] = {}
        for theirs, value in state.items():
            if not isinstance(theirs, str):
                self._file.damaged("a tensor's name is no text")
            if "_extra_state" in theirs or "rotary" in theirs:
                continue  # what Transformer Engine keeps for float8, and tables that follow from the config
            if ".self_attention." in theirs or ".mlp." in theirs or ".cross_attention." in theirs:
                raise UserError(f"{self.path} holds {theirs!r}: Megatron-LM files are read for pure Mamba2 models only")
            ours = _name(theirs)
            if ours in tensors:
                raise UserError(f"tensor {ours!r} is stored twice in {self.path}")
            tensors[ours] = self._file.tensor(theirs, value)
        for needed in ("embedding.word_embeddings.weight", "decoder.layers.0.mixer.in_proj.weight"):
            if _name(needed) not in tensors:
                raise UserError(f"{self.path} lacks the tensor {needed!r}")
        return tensors

    # The model

    def _refuse_pieces_beside(self) -> None:
        folder = self.path.absolute().parent
        if not _RANK.fullmatch(folder.name):
            return
        pieces = [place for place in folder.parent.glob("mp_rank_*") if _RANK.fullmatch(place.name)]
        if len(pieces) > 1:
            raise UserError(f"{self.path} is one of {len(pieces)} pieces (mp_rank_*); {_MERGE}")

    def _refuse_pieces_and_options(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if (self._args.get(name) or 1) != 1:
                raise UserError(f"{self.path} is a piece of a model split with {name} {self._args[name]}; {_MERGE}")
        epsilon = self._args.get("norm_epsilon", self._args.get("layernorm_epsilon"))
        if epsilon not in (None, NORM_EPS):
            raise UserError(
                f"{self.path} has norm_epsilon {epsilon}; transformers' mamba2 has {NORM_EPS:g} for all norms"
            )
        if self._args.get("normalization") not in (None, "RMSNorm") or self._args.get("apply_layernorm_1p"):
            raise UserError(f"{self.path} has other norms (normalization, apply_layernorm_1p) than RMSNorm")

    def _mamba_sizes(self) -> dict[str, int]:
        """The sizes in transformers' words: from the shapes, and from the arguments how B and C split into groups."""
        hidden = self._shape("backbone.embeddings.weight", 2)[1]
        heads = self._shape("backbone.layers.0.mixer.A_log", 1)[0]
        width, _, kernel = self._shape("backbone.layers.0.mixer.conv1d.weight", 3)
        inner = self._shape("backbone.layers.0.mixer.out_proj.weight", 2)[1]
        numbers = [int(found[1]) for name in self._tensors if (found := _OUR_LAYER.match(name))]
        both = (width - inner) // 2  # B and C are equally wide
        state = self._size("mamba_state_dim")
        groups = self._size("mamba_num_groups") or (both // state if state else GROUPS)
        state = state or both // groups
        sizes = {
            "conv_kernel": kernel,
            "expand": inner // max(hidden, 1),
            "head_dim": inner // max(heads, 1),
            "hidden_size": hidden,
            "n_groups": groups,
            "num_heads": heads,
            "num_hidden_layers": self._size("num_layers") or 1 + max(numbers),
            "state_size": state,
        }
        fits = (
            sizes["expand"] * hidden == inner == sizes["head_dim"] * heads
            and min(sizes.values()) > 0
            and 2 * groups * state == width - inner
            and heads % groups == 0
        )
        if not fits:
            raise UserError(
                f"{self.path}: {inner} channels in {heads} heads with {width} convolution channels in {groups} groups "
                f"of {state} states, on a stream of {hidden}, are no Mamba2 layer of transformers"
            )
        return sizes

    def _shape(self, name: str, ndim: int) -> tuple[int, ...]:
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor.shape) != ndim:
            raise UserError(f"{self.path} lacks the tensor {name!r} of {ndim} dimensions that a Mamba2 model has")
        return tensor.shape

    def _size(self, name: str) -> int | None:
        value = self._args.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    # The tokenizer

    def _find_tokenizer(self) -> Path | None:
        """The one *.model file next to the checkpoint, or in the folders above that Megatron puts around it."""
        folder = self.path.absolute().parent
        places = [folder, *(folder.parents[:2] if _RANK.fullmatch(folder.name) else ())]
        for place in places:
            found = sorted(file for file in place.glob("*.model") if file.is_file())
            if len(found) > 1:
                raise UserError(f"{place} has several tokenizers ({found[0].name}, {found[1].name}); leave one there")
            if found:
                return found[0]
        return None

    def _vocabulary(self) -> Vocabulary | None:
        if self._tokenizer is None:
            return None
        try:
            return vocabulary(self._tokenizer.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {self._tokenizer}: {error.strerror or error}") from None
        except (ValueError, IndexError):
            raise UserError(f"{self._tokenizer} is truncated or no sentencepiece tokenizer") from None


_MERGE = "merge it into one with Megatron-LM first"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _name(theirs: str) -> str:
    """A tensor's name in transformers' mamba2; one that we do not know stays as it is."""
    layer = _LAYER.fullmatch(theirs)
    if layer is None:
        return NAMES.get(theirs, theirs)
    # Transformer Engine keeps the norm inside of the projection that follows it
    rest = "norm.weight" if layer[2] == "mixer.in_proj.layer_norm_weight" else layer[2]
    return f"backbone.layers.{int(layer[1])}.{rest}"


def _arguments(content: Any) -> dict[str, Any]:
    """The training arguments, where the file has them: an argparse.Namespace or a dict."""
    args = content.get("args") if isinstance(content, dict) else None
    args = args.state if isinstance(args, Record) else args
    return {str(name): value for name, value in args.items()} if isinstance(args, dict) else {}
