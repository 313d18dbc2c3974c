"""A byte-level BPE tokenizer for models trained from scratch: any text survives it, there is no unknown token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uniql_jax.errors import UserError

END = "<|endoftext|>"
"""Begins every text, and so also ends the one before: the only special token, id 0."""


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Any:
    """A transformers tokenizer of exactly `vocab_size` entries, trained on the documents.

    Texts begin with END; digits stand alone. Raises UserError when the text has too little in it for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # slow to import

    bpe = Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise UserError(
            f"the text gives a tokenizer of {bpe.get_vocab_size()} entries, not {vocab_size}: name more text or --vocab"
        )
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)
