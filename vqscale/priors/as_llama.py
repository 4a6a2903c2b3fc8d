"""A prior as `LlamaForCausalLM` of `transformers`, or `Qwen3ForCausalLM`, which is that with norms of queries and keys
(net.qk_norm): the same logits for the ids, from its plain call and in generation.

The vocabulary there is the K ids, then what the prefix is made of, one row for each of its P tokens of each class, the
unknown class last:

    K + class * P + place        the input rows of the classes; their output rows are zero

so a sequence is [K + class * P, ..., K + class * P + P - 1, id, id, ...]. The settings of generation suppress the rows
of classes, which have the logit zero and are no ids.

It is the same network where every token is turned by its place in one row, prefix included (net.rotary: sequence): the
rotary embedding over the sides of a grid, LlamaGen's own, has no counterpart there, and neither has adaln.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vqscale.codes.heads.flat import Head
from vqscale.priors.autoregressive import Autoregressive
from vqscale.priors.base import Prior
from vqscale.priors.conditions import Classes
from vqscale.tokenizer.foreign import Foreign, refuse

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def export(prior: Prior) -> Foreign:
    """The whole prior. ValueError with every reason why the class is another network."""
    refuse(f"transformers.{CLASSES['llama']}", "prior", _reasons(prior))
    assert isinstance(prior, Autoregressive)
    rows = 1 + prior.num_classes
    where = f"K {prior.num_codes}, {prior.config.net.num_prefix} rows for each of {rows} classes, the last one unknown"
    settings = {"config.json": _settings(prior), "generation_config.json": _generation(prior)}
    remarks = (f"ids are 0 to K - 1, then come the classes: {where}",)
    return Foreign(
        f"transformers.{CLASSES[_kind(prior)]}", "model.safetensors", dict(_tensors(prior)), settings, remarks
    )


def _reasons(prior: Prior) -> Iterator[str]:
    config: Any = prior.config
    if not isinstance(prior, Autoregressive):
        yield f"name is {config.name}, and it is autoregressive"
        return
    net = config.net
    if net.rotary != "sequence":
        yield "net.rotary is grid, and it turns a token by its place in one row (sequence), prefix included"
    if net.adaln:
        yield "net.adaln is true, and its norms know no class"
    if not isinstance(prior.head, Head):
        yield f"head.name is {config.head.name}, and its head is flat"
    if not isinstance(prior.condition, Classes):
        yield f"condition.name is {config.condition.name}, and it is given rows of a table (classes)"


def _kind(prior: Autoregressive) -> str:
    return "qwen3" if prior.config.net.qk_norm else "llama"


def _settings(prior: Autoregressive) -> dict[str, Any]:
    net = prior.config.net
    return {
        "architectures": [CLASSES[_kind(prior)]],
        "model_type": _kind(prior),
        "dtype": "float32",
        "vocab_size": _vocabulary(prior),
        "hidden_size": net.width,
        "intermediate_size": net.ffn_width,
        "num_hidden_layers": net.num_layers,
        "num_attention_heads": net.num_heads,
        "num_key_value_heads": net.num_heads,
        "head_dim": net.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": net.num_prefix + prior.config.num_tokens,
        "rms_norm_eps": net.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": net.rotary_base},
        "rope_theta": net.rotary_base,  # where versions before 5 read it
        "attention_bias": False,
        **({} if net.qk_norm else {"mlp_bias": False}),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _generation(prior: Autoregressive) -> dict[str, Any]:
    """Whole images, of ids alone."""
    classes = range(prior.num_codes, _vocabulary(prior))
    return {"do_sample": True, "max_new_tokens": prior.config.num_tokens, "suppress_tokens": list(classes)}


def _vocabulary(prior: Autoregressive) -> int:
    return prior.num_codes + (1 + prior.num_classes) * prior.config.net.num_prefix


@torch.no_grad()
def _tensors(prior: Autoregressive) -> Iterator[tuple[str, Tensor]]:
    head, net = prior.head, prior.net
    assert isinstance(head, Head)
    assert isinstance(prior.condition, Classes)
    ids_KD = head.embed(torch.arange(prior.num_codes, device=prior.mesh.device))
    classes_CD = prior.condition.table.weight.unflatten(1, (prior.config.net.num_prefix, -1)).flatten(0, 1)
    yield "model.embed_tokens.weight", torch.cat([ids_KD.to(classes_CD), classes_CD])
    yield "lm_head.weight", torch.cat([head.rows.detach(), torch.zeros_like(classes_CD)])
    yield "model.norm.weight", net.norm.weight.detach()
    for layer, block in enumerate(net.blocks):
        for name, x in _block(block.state_dict(), prior.config.net.num_heads):
            yield f"model.layers.{layer}.{name}", x


def _block(own: dict[str, Tensor], num_heads: int) -> Iterator[tuple[str, Tensor]]:
    q, k, v = own["attention.qkv.weight"].chunk(3)
    yield "self_attn.q_proj.weight", _halved(q, num_heads)
    yield "self_attn.k_proj.weight", _halved(k, num_heads)
    yield "self_attn.v_proj.weight", v
    yield "self_attn.o_proj.weight", own["attention.out.weight"]
    for name, norm in (("q_norm", "attention.norms.0.weight"), ("k_norm", "attention.norms.1.weight")):
        if norm in own:
            yield f"self_attn.{name}.weight", _halved(own[norm], 1)
    for part in ("gate", "up", "down"):
        yield f"mlp.{part}_proj.weight", own[f"ffn.{part}.weight"]
    yield "input_layernorm.weight", own["norm_attention.weight"]
    yield "post_attention_layernorm.weight", own["norm_ffn.weight"]


def _halved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows so that the numbers which are turned together, neighbours here, lie half a head apart."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
