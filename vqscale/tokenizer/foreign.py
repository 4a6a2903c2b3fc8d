"""A trained model as a folder that another library loads: weights in safetensors, settings in JSON, nothing that runs.

Which model is which class there, and when it cannot be: as_transformers.py and as_diffusers.py beside this, of priors
priors/as_llama.py. Here is what they share: the folder, the refusal, and codes as the table that their quantizers scan.
No other library is imported: what a class computes is for the tests, which load what is written with it. A class of our
own in such a library is as_auto_model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import similarity
from vqscale.disk import files, tensors
from vqscale.nets.config import ConvConfig
from vqscale.tokenizer.model import Tokenizer

SCANNED = ("vq", "ema", "ibq", "simvq")  # quantizers whose ids are the best row of a table


@dataclass(frozen=True)
class Foreign:
    """What a model is to another library."""

    loads_as: str
    """library and class, whose from_pretrained reads the folder"""
    weights: str
    """name of the file of weights"""
    tensors: Mapping[str, Tensor]
    """weights under the names of that class"""
    settings: Mapping[str, Mapping[str, Any]]
    """JSON files by name"""
    remarks: tuple[str, ...] = ()
    """what its user has to know"""

    def write(self, folder: Path | str) -> Path:
        """Write the folder, which must be new or empty; the settings, without which nothing loads, come last."""
        folder = empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors.write(folder / self.weights, {name: x.contiguous() for name, x in self.tensors.items()})
        for name, settings in self.settings.items():
            files.write_json(folder / name, settings)
        return folder


def empty(folder: Path | str) -> Path:
    """The folder, if it is new or empty; ValueError where it is not."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not an empty folder, and an export writes over nothing: give another")
    return folder


def refuse(loads_as: str, whose: str, reasons: Iterable[str]) -> None:
    """ValueError with all reasons for which a model of these settings is not the class; nothing where there are none.

    A reason names the key, its value and what the class has in its place.
    """
    found = "; ".join(reasons)
    if found:
        raise ValueError(
            f"no {loads_as} computes what this {whose} does, and an export that only nearly did would be another "
            f"model: {found} ({whose}, in its config). Train one with the settings of that class, or export to another "
            "library"
        )


def reasons_of_tokenizer(tokenizer: Tokenizer, mid_attention: bool) -> Iterable[str]:
    """For which nothing of the VQGAN family is this tokenizer; `mid_attention`: the class always has it."""
    config, net = tokenizer.config, tokenizer.net
    assert config is not None, "a tokenizer that was loaded has a config"
    if not isinstance(net, ConvConfig):
        yield f"net.name is {net.name}, and it has the net conv"
    else:
        if net.patch != 1:
            yield f"net.patch is {net.patch}, and it has 1"
        if mid_attention and not net.mid_attention:
            yield "net.mid_attention is false, and it always has attention there"
    if config.quantizer.name not in SCANNED:
        yield f"quantizer.name is {config.quantizer.name}, and its ids are rows of a table ({', '.join(SCANNED)})"
    elif config.latent_norm != "none":
        kind = _similarity(tokenizer)
        if config.latent_norm != "rms" or kind == "euclid":
            yield (
                f"latent_norm is {config.latent_norm} with similarity {kind}, and it has no norm of latents (without "
                "one ids are the same only for rms with dot or cosine)"
            )


def _similarity(tokenizer: Tokenizer) -> str:
    """Of a quantizer that scans a table; simvq's is that of its mapped rows."""
    assert tokenizer.config is not None
    return getattr(tokenizer.config.quantizer, "similarity", "euclid")


@torch.no_grad()
def scanned(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows_KD that the decoder is given, keys_KD, bias_K): the id of x is the arg max of x . key + bias; float64.

    One process: all K rows are in memory. Positive factors of x change no id.
    """
    quantizer = tokenizer.quantizer
    rows_KD = quantizer.decode(torch.arange(quantizer.num_codes, device=quantizer.mesh.device)).double()
    kind = similarity.by_name(_similarity(tokenizer))
    return rows_KD, kind.keys(rows_KD), kind.bias(rows_KD)
