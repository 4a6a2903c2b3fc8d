"""SIMILARITIES: its names are those of the configs and of the definitions, and no other name is taken in silence.

What a similarity must do is tested where it is done, over all names and the two of similarities.py: test_codes.py
(nearest), test_mix.py (mixtures and gradients), test_prefilter.py (bounds and the exact search), test_fused.py.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from similarities import ADDED, added
from whole import normal, put

from vqscale.codes import dense
from vqscale.codes.codebook import Codebook
from vqscale.codes.config import SimilarityName
from vqscale.codes.similarity import SIMILARITIES, Similarity


def test_configs_and_definitions_know_the_same_names():
    assert list(SIMILARITIES) == list(get_args(SimilarityName)) == list(dense.LOGITS)


def test_a_name_that_nobody_has_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match=r"similarity is 'angular', and there are dot, euclid, cosine: choose one"):
        Codebook(4, 2, similarity="angular")
    with added():
        Codebook(4, 2, similarity="angular")
    with pytest.raises(ValueError, match="similarity is 'angular'"):
        Codebook(4, 2, similarity="angular")


@pytest.mark.parametrize("name", ADDED)
@added()
def test_search_and_mixture_agree_on_what_was_added(name):
    codebook, x = put(Codebook(600, 8, similarity=name), normal(600, 8, seed=1)), normal(200, 8, seed=2)
    ids = codebook.nearest(x)[0]
    assert torch.equal(ids, codebook.mix(x).ids_N)
    others = [put(Codebook(600, 8, similarity=other), codebook.rows.data).nearest(x)[0] for other in SIMILARITIES]
    assert sum(torch.equal(ids, other) for other in others) < len(others), "any similarity would pass"


def test_a_bias_without_its_gradient_is_an_error(monkeypatch):
    class Silent(Similarity):
        def bias(self, rows_kD):
            return rows_kD.sum(1)

    monkeypatch.setitem(SIMILARITIES, "silent", Silent())
    mixed = Codebook(4, 2, similarity="silent").mix(torch.ones(3, 2, requires_grad=True))
    with pytest.raises(NotImplementedError, match="Silent has a bias and does not say its gradient"):
        mixed.lse_N.sum().backward()
