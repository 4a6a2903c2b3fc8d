"""A tokenizer of any signal, net and quantizer as a model of `transformers` whose class is our own (auto_model.py).

The folder is what Tokenizer.save writes, so vqscale.Tokenizer.load reads it too, and a config.json by which AutoModel
finds the class: data, no code. What computes there is what computes here, so nothing has to be refused; but vqscale has
to be installed where it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vqscale.disk import files
from vqscale.tokenizer.foreign import empty
from vqscale.tokenizer.model import Tokenizer

HOME = "vqscale.tokenizer.auto_model"
CLASS = "TokenizerModel"
MODEL_TYPE = "vqscale_tokenizer"
SETTINGS = "config.json"


@dataclass(frozen=True)
class Own:
    """The tokenizer, and what its user has to know: what a Foreign is to the command."""

    tokenizer: Tokenizer
    remarks: tuple[str, ...]
    loads_as: str = f"{HOME}.{CLASS}"

    def write(self, folder: Path | str) -> Path:
        """Write the folder, which must be new or empty."""
        return write(empty(folder), self.tokenizer)


def export(tokenizer: Tokenizer, because: Iterable[str]) -> Own:
    """The whole tokenizer; `because` is why it is no class of `transformers`."""
    return Own(
        tokenizer,
        (
            f"a class of vqscale, which has to be installed to load it: {'; '.join(because)}",
            f"transformers.AutoModel.from_pretrained gives it after import {HOME}; it encodes and decodes",
        ),
    )


def write(folder: Path | str, tokenizer: Tokenizer) -> Path:
    """The saved tokenizer and, last, what AutoModel finds it by."""
    folder = tokenizer.save(folder)
    files.write_json(folder / SETTINGS, {"architectures": [CLASS], "model_type": MODEL_TYPE, "dtype": "float32"})
    return folder
