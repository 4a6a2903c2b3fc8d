"""What a prior of contexts predicts: the ids that it draws for the context of a sample, which the tokenizer decodes
with that context. As rows of the table of programs/dense.py, one for each way of drawing.

    greedy     the likeliest id at every step: UViM's stage 2
    sampled    ids as likely as the prior says, of keys by sample number
    one pass   the likeliest of every id from one pass over all of them, each on its own; of priors that draw in steps

An id depends on the seed, the number of the sample and its context, not on ranks or batch. Not here: what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqscale.priors.base import Prior
from vqscale.programs.dense import Draw
from vqscale.programs.sampling.draw import misfits
from vqscale.tokenizer.model import Tokenizer

GREEDY, SAMPLED, ONE_PASS = "greedy", "sampled", "one pass"
LIKELIEST = {"temperature": 0.0, "fine_temperature": 0.0, "order_noise": 0.0}


def ways(prior: Prior) -> dict[str, dict[str, Any]]:
    """The settings of each way in which a prior can draw, by its name."""
    dials = prior.config.sampling.dials()
    greedy = {dial: value for dial, value in LIKELIEST.items() if dial in dials}
    if "steps" not in dials:
        return {GREEDY: greedy, SAMPLED: {}}
    steps = {"steps": min(prior.config.sampling().steps, prior.config.num_tokens)}
    return {GREEDY: greedy | steps, SAMPLED: steps, ONE_PASS: greedy | {"steps": 1}}


def check(prior: Prior, tokenizer: Tokenizer) -> None:
    """ValueError with all that does not go together; the same on every rank. Collective."""
    faults, condition = misfits(prior, tokenizer), prior.config.condition
    if not condition.wants_context:
        faults.append(
            f"the prior's condition is {condition.name}, and what is to be predicted follows from a context: give a "
            "prior that was trained with prior.condition context"
        )
    if faults:
        raise ValueError("; ".join(faults))


def draws(prior: Prior, tokenizer: Tokenizer, seed: int = 0, more: Mapping[str, Any] | None = None) -> dict[str, Draw]:
    """Each way of drawing as a function of contexts and numbers of samples; collective, as drawing is. `more` settings,
    guidance say, are of every way. ValueError where prior and tokenizer do not go together, or for settings.
    """
    check(prior, tokenizer)
    return {way: _draw(prior, settings | dict(more or {}), seed) for way, settings in ways(prior).items()}


def _draw(prior: Prior, settings: Mapping[str, Any], seed: int) -> Draw:
    chosen = prior.sample_config(settings)

    def draw(contexts: Tensor, numbers: Tensor) -> Tensor:
        return prior.sample(contexts, chosen, numbers_B=numbers, seed=seed)

    return draw
