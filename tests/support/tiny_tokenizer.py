"""A tokenizer of words for the tiny models of ``saved_modules``."""

from __future__ import annotations

from pathlib import Path


def write_word_tokenizer(folder: Path, words: int = 40) -> Path:
    """``w3`` is token 3, and so on; 0 is padding, 1 unknown, 2 the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder
