"""Our tokenizers as models of `transformers`: to import this file is to tell AutoConfig and AutoModel of them.

    import transformers, vqscale.tokenizer.auto_model
    model = transformers.AutoModel.from_pretrained(FOLDER)          what as_auto_model.py wrote
    ids = model.encode(samples); samples = model.decode(ids)

The only import of transformers in the package, and nothing in the package imports this file. Weights are read and
written as those of every saved tokenizer, checksums, names and shapes checked: the library's own loading casts buffers,
and leaves those that are no weights (the levels of fsq) as fresh memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from vqscale.tokenizer.as_auto_model import MODEL_TYPE, write
from vqscale.tokenizer.export import CARD, WEIGHTS
from vqscale.tokenizer.model import Tokenizer

# What from_pretrained may be asked for: where files are; and what AutoModel passes on of its own.
PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
UNREAD = ("trust_remote_code", "adapter_kwargs", "_from_auto", "_commit_hash")
FLOATS = (None, "auto", "float32", torch.float32)


class TokenizerModelConfig(PretrainedConfig):
    """What AutoModel finds the class by; the config of a tokenizer is in its card, and in `model.tokenizer.config`."""

    model_type = MODEL_TYPE


@dataclass
class TokenizerOutput(ModelOutput):
    """What becomes of samples, and their ids."""

    samples: Tensor | None = None
    ids: Tensor | None = None


class TokenizerModel(PreTrainedModel):
    """A vqscale.Tokenizer, held as `tokenizer`, in float32: half precision is for autocast, or ids would be others."""

    config_class = TokenizerModelConfig
    main_input_name = "samples"

    def __init__(self, config: TokenizerModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config)
        if tokenizer is None:
            raise ValueError(
                "a config.json of a tokenizer names its class and nothing more, and no tokenizer is made of that: "
                "load one with from_pretrained, or train one with vqscale"
            )
        self.tokenizer = tokenizer
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, config: PretrainedConfig | None = None, dtype: Any = None, **asked: Any
    ) -> TokenizerModel:
        """The exported tokenizer, in evaluation mode on the CPU. ValueError for what it is not loaded with."""
        places = {name: asked.pop(name) for name in PLACES if name in asked}
        others = sorted(name for name, value in asked.items() if value is not None and name not in UNREAD)
        if others:
            raise ValueError(
                f"a tokenizer of vqscale is loaded as it was saved, without {', '.join(others)}: leave that out, and "
                "move the model afterwards, with .to(device)"
            )
        config = config or cls.config_class.from_pretrained(path, **places)
        for wanted in (dtype, config.dtype):
            if wanted not in FLOATS:
                raise ValueError(
                    f"the dtype is {wanted}, and a tokenizer of vqscale computes ids in float32, or they would be "
                    "others: leave dtype out, and call the model inside torch.autocast"
                )
        weights, card = (cached_file(path, name, **places) for name in (WEIGHTS, CARD))
        assert Path(weights).parent == Path(card).parent, "files of one folder and revision"
        return cls(config, Tokenizer.load(Path(card).parent)).eval()

    def save_pretrained(self, save_directory: str | Path, **asked: Any) -> None:
        """The folder that it was loaded from, with the weights of now."""
        others = sorted(name for name, value in asked.items() if value)
        if others:
            raise ValueError(
                f"a tokenizer of vqscale is saved as two files, without {', '.join(others)}: leave that out, and send "
                "the folder where it is to go"
            )
        write(save_directory, self.tokenizer)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: what is here was loaded."""

    def forward(self, samples: Tensor, context: Tensor | None = None) -> TokenizerOutput:
        """Of a tokenizer: what the decoder makes of the codes of samples, not clamped, and with gradients."""
        recon, quantized = self.tokenizer(samples, context)
        ids = quantized.ids.view(*self.tokenizer.grid(samples), *quantized.ids.shape[1:])
        return TokenizerOutput(samples=recon, ids=ids)

    def encode(self, samples: Tensor, context: Tensor | None = None) -> Tensor:
        return self.tokenizer.encode(samples, context)

    def decode(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        return self.tokenizer.decode(ids, context)


AutoConfig.register(MODEL_TYPE, TokenizerModelConfig)
AutoModel.register(TokenizerModelConfig, TokenizerModel)
