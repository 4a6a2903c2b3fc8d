"""The settings of a run that begins from weights that are there, and of what of it is trained. No torch here.

Part names are those of the models: Tokenizer.parts and Prior.parts say which modules each has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vqscale.codes.config import TableConfig
from vqscale.codes.heads.config import FlatConfig
from vqscale.config import differences, to_dict
from vqscale.config.load import leaves

TokenizerPart = Literal["encoder", "codes", "decoder"]
PriorPart = Literal["network", "head", "condition"]
TOKENIZER_PARTS: tuple[TokenizerPart, ...] = ("encoder", "codes", "decoder")
PRIOR_PARTS: tuple[PriorPart, ...] = ("network", "head", "condition")


@dataclass(frozen=True)
class _Init:
    """Where first weights come from. They are taken once: a run that goes on has its own."""

    model: ClassVar[Literal["tokenizer", "prior"]]
    """what has the weights: the key of it in a run's config"""
    from_: str
    """the folder of a run (its newest whole checkpoint), one of its checkpoints, or a folder that was saved or
    imported"""
    weights: Literal["average", "parameters"] = "average"
    """of a checkpoint: the moving averages, or the parameters where it has none; or always the parameters"""

    def problems(self) -> Iterable[tuple[str, str]]:
        parts: tuple[str, ...] = getattr(self, "parts")  # noqa: B009  (each kind of model has its own)
        if not self.from_:
            yield "from", "from is empty: give the folder of a run, a checkpoint or a saved model, or init: null"
        if not parts or len(set(parts)) < len(parts):
            yield "parts", f"parts are {list(parts)}: name each part that is taken once, or use init: null"


@dataclass(frozen=True)
class TokenizerInit(_Init):
    """A tokenizer that begins from another one's weights."""

    model: ClassVar[Literal["tokenizer", "prior"]] = "tokenizer"
    parts: tuple[Literal["encoder", "codes", "decoder", "discriminator"], ...] = TOKENIZER_PARTS
    """what is taken: the encoder with its map to codes, the codes, the decoder with its map from them; of a run's
    checkpoint the discriminator too. What is not named begins anew"""


@dataclass(frozen=True)
class PriorInit(_Init):
    """A prior that begins from another one's weights."""

    model: ClassVar[Literal["tokenizer", "prior"]] = "prior"
    parts: tuple[PriorPart, ...] = PRIOR_PARTS
    """what is taken: the network, the head (embedding of ids and logits), the condition (the table of classes, or the
    encoder of contexts). What is not named begins anew"""


Init = TokenizerInit | PriorInit


def trained_problems(
    trained: Sequence[str] | None, every: Sequence[str], init: Init | None
) -> Iterable[tuple[str, str]]:
    """(key, message) where what is not trained would stay what nobody has trained, or nothing is trained."""
    if trained is None:
        return
    if not trained or len(set(trained)) < len(trained):
        yield (
            "trained",
            f"trained is {list(trained)}, so that everything is frozen or a part is named twice: name what learns, of "
            f"{', '.join(every)}, or use null for all",
        )
    taken = () if init is None else init.parts
    drawn = [part for part in every if part not in (*trained, *taken)]
    if drawn:
        yield (
            "trained",
            f"trained is {list(trained)}, so that {' and '.join(drawn)} would stay as first drawn: take "
            f"{'them' if len(drawn) > 1 else 'it'} from weights that are there (init.parts), or train what is not",
        )


# Settings of how a model is trained, which do not change what its weights mean.
_OF_TRAINING = {
    *("commitment_weight", "codebook_weight", "quantization_weight", "quantizer_weight"),
    *("entropy_weight", "entropy_temperature", "diversity_weight", "temperature", "gradient", "decay", "split_below"),
    *("init", "init_scale", "warmup_steps", "landing_steps", "stagger", "window_decay", "whiten_decay"),
    *("revive_every", "revive_from", "revive_below", "revive_after", "revive_patience", "revive_most"),
    *("whiten_gradient", "code_dropout", "scan_mib", "checkpointing", "products"),
    *("class_dropout", "dropout", "dropout_token", "dropout_residual", "dropout_ffn", "dropout_attention"),
    *("label_smoothing", "z_loss", "cluster_weight", "mask_law", "least_masked", "unmasked_weight", "bound_passes"),
    *("coarse_noise", "clusters", "neighbours", "neighbour_temperature", "output_scale", "frame_seed"),
}
# The parts whose weights a key of a model's config says the meaning of; "" is every other key.
_MEANS: dict[str, dict[str, set[str]]] = {
    "tokenizer": {
        "": {"encoder", "codes", "decoder"},
        "net": {"encoder", "decoder"},
        "quantizer": {"codes"},
        "latent_norm": {"encoder", "codes"},
        "no_code": {"decoder"},
    },
    "prior": {
        "": {"network"},
        **{key: {"head"} for key in ("head", "num_codes", "feature_dim")},
        **{key: {"condition"} for key in ("condition", "num_classes")},
    },
}
_SIZES_OF_GRIDS = ("net.image_size", "condition.image_size", "grid")  # positions are resized


def misfits(init: Init, theirs: Any, mine: Any) -> list[str]:
    """`key: theirs -> mine` of all settings in which two models differ so that the parts that are taken would not mean
    the same. They may differ in what is about training alone, in the number of codes of a table, and in the sides of a
    grid."""
    before, now, means = to_dict(theirs), to_dict(mine), _MEANS[init.model]
    aside = [key for key in now if not means.get(key, means[""]) & set(init.parts)]
    training = [key for key, _ in (*leaves(before), *leaves(now)) if key.rpartition(".")[2] in _OF_TRAINING]
    return differences(before, now, [*aside, *training, *_SIZES_OF_GRIDS, *_counts(mine)])


def _counts(model: Any) -> Iterable[str]:
    """The numbers of codes that may be others: of tables with a row per code. Where there are clusters or digits, each
    has its own meaning."""
    if hasattr(model, "quantizer"):
        tables = {"quantizer": model.quantizer, "quantizer.inner": getattr(model.quantizer, "inner", None)}
        return [f"{key}.num_codes" for key, table in tables.items() if isinstance(table, TableConfig)]
    return ["num_codes"] if isinstance(model.head, FlatConfig) and not model.wants_clusters else []
