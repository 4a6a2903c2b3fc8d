"""A tokenizer of images as the vision tokenizer class of Emu3.5 and Apertus 1.5 in `transformers` (5.24 has it).

That class encodes only: pixels to ids, the arg max of latents times a table. The decoder stays behind. Its table has no
bias, so the nearest row (euclid) takes one number more: a channel of the last convolution that is always one. The class
for sounds is another: as_encodec.py. Where it is another network, or the installed version has no such class, a
tokenizer is a class of ours: as_auto_model.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.nets.config import ConvConfig
from vqscale.nets.waves.config import WaveConfig
from vqscale.tokenizer import as_encodec
from vqscale.tokenizer.foreign import Foreign, reasons_of_tokenizer, refuse, scanned
from vqscale.tokenizer.model import Tokenizer

LOADS_AS = "transformers.Apertus1p5VisionTokenizerModel"
MODULE = "apertus1p5"  # its folder among the models there
COARSEST = 16  # side of the coarsest level for which the class is told where attention is, as published


def export(tokenizer: Tokenizer) -> Foreign:
    """The encoder and the codes; of sounds the decoder too. ValueError with every reason why the class is another
    network."""
    if isinstance(tokenizer.net, WaveConfig):
        return as_encodec.export(tokenizer)
    net = tokenizer.net
    refuse(LOADS_AS, "tokenizer", _reasons(tokenizer))
    assert isinstance(net, ConvConfig)
    tensors, table_KE = _tensors(tokenizer)
    strides = "spatial_scale_factor is the stride: sides are its multiples, pixels lie in [-1, 1]"
    remarks = ("it encodes only: the decoder is not in it (--to diffusers has both)", strides)
    settings = {"config.json": _settings(net, table_KE.shape)}
    return Foreign(LOADS_AS, "model.safetensors", tensors, settings, remarks)


def why_not(tokenizer: Tokenizer, package: Path | None = None) -> list[str]:
    """Every reason why the class is none for this tokenizer, or not to be had where it is exported; none where it is.

    `package` is the folder of the installed `transformers`; where none is installed, one that has the class is meant.
    """
    if isinstance(tokenizer.net, WaveConfig):
        return [*as_encodec.reasons(tokenizer)]
    spec = find_spec("transformers")
    package = package or (Path(spec.origin).parent if spec and spec.origin else None)
    reasons = _reasons(tokenizer)
    if package is not None and not (package / "models" / MODULE).is_dir():
        reasons.append(f"the installed transformers has no {LOADS_AS.split('.')[1]}")
    return reasons


def _reasons(tokenizer: Tokenizer) -> list[str]:
    net = tokenizer.net
    reasons = [*reasons_of_tokenizer(tokenizer, mid_attention=True)]
    if isinstance(net, ConvConfig) and net.num_groups != 32:
        reasons.append(f"net.num_groups is {net.num_groups}, and it has 32")
    return reasons


def _settings(net: ConvConfig, table: torch.Size) -> dict[str, Any]:
    side = COARSEST * net.strides[0]
    return {
        "architectures": [LOADS_AS.split(".")[1]],
        "model_type": "apertus1p5_vision_tokenizer",
        "dtype": "float32",
        "codebook_size": table[0],
        "embed_dim": table[1],
        "latent_channels": net.z_channels,
        "in_channels": net.in_channels,
        "base_channels": net.channels,
        "channel_multiplier": list(net.multipliers),
        "num_res_blocks": net.num_blocks,
        "resolution": side,
        "attn_resolutions": [side // 2**level for level in net.attention_levels],
        "dropout": net.dropout,
    }


def _tensors(tokenizer: Tokenizer) -> tuple[dict[str, Tensor], Tensor]:
    """Weights by their names there, and of these the table."""
    found = {f"encoder.{_name(name)}": x for name, x in tokenizer.encoder.state_dict().items()}
    conv = tokenizer.quant_conv.state_dict()
    _, table_KE, bias_K = scanned(tokenizer)
    if bias_K is not None:
        table_KE = torch.cat([table_KE, bias_K[:, None]], 1)
        conv = {"weight": F.pad(conv["weight"], (0, 0, 0, 0, 0, 0, 0, 1)), "bias": F.pad(conv["bias"], (0, 1), value=1)}
    table_KE = table_KE.to(tokenizer.dtype)
    found |= {f"quant_conv.{name}": x for name, x in conv.items()}
    return found | {"quantize.embedding.weight": table_KE}, table_KE


def _name(ours: str) -> str:
    """A name in the encoder: down.LEVEL.block.J.* and down.LEVEL.attn.J.* are one layer of a stage there."""
    if not ours.startswith("down."):
        return ours
    _, level, kind, *rest = ours.split(".")
    if kind == "downsample":
        return ".".join(["stages", level, kind, *rest])
    return ".".join(["stages", level, "layers", rest[0], {"block": "resnet", "attn": "attention"}[kind], *rest[1:]])
