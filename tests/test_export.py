"""Models that leave for other libraries: what those compute there is what is computed here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_runs import images, small, small_config, write_run

import vqscale
from vqscale import priors
from vqscale.nets import NETS
from vqscale.priors import as_llama
from vqscale.priors.base import Prior
from vqscale.programs.commands import export
from vqscale.tokenizer import as_transformers
from vqscale.tokenizer.model import Tokenizer

NEEDS = "the extra export is not installed"
NET = {"name": "conv", "channels": 32, "multipliers": [1, 2, 2], "num_blocks": 2, "z_channels": 8}
NET |= {"attention_levels": [0, 2], "num_groups": 32}
IBQ = {"name": "ibq", "num_codes": 61, "dim": 5, "init": "normal"}
CODES = {
    "ibq": ({**IBQ, "similarity": "dot"}, "none"),
    "ibq-rms": ({**IBQ, "similarity": "dot"}, "rms"),
    "ibq-cosine": ({**IBQ, "similarity": "cosine"}, "none"),
    "vq": ({**IBQ, "name": "vq"}, "none"),
    "ema": ({**IBQ, "name": "ema"}, "none"),
    "simvq": ({**IBQ, "name": "simvq", "init": "normal", "revive_every": 0}, "none"),
}
LLAMA = {"width": 24, "num_layers": 2, "num_heads": 3, "ffn_multiple": 8, "rotary": "sequence", "rotary_base": 50.0}
CLASSES, K, GRID = 4, 19, (2, 3)


def tokenizer_of(codes: str, **net) -> Tokenizer:
    """Every parameter drawn, so that none is where it began, and codes that latents reach."""
    quantizer, norm = CODES[codes]
    tokenizer = Tokenizer.from_config(small_config(quantizer, {**NET, **net}, latent_norm=norm))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in tokenizer.named_parameters():
            p.copy_(
                torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim > 1 else 5) + ("norm" in name and "weight" in name)
            )
        tokenizer.quantizer.codebook.rows.mul_(5**0.5)
    return tokenizer.eval()


def exported(library: str, model, folder, *options: str) -> Path:
    assert export.main(["--to", library, str(model.save(folder / "saved")), str(folder / "out"), *options]) == 0
    return folder / "out"


def disagreeing(tokenizer: Tokenizer, pixels, ids) -> int:
    """How many ids are others than ours, none of them by more than rounding."""
    ours = tokenizer.encode(pixels)
    assert len(ours.unique()) > 8, "the comparison says little where few codes are met"
    other = ours != ids
    if other.any():
        x_ND = tokenizer.latents(pixels)
        rows = tokenizer.quantizer.decode(torch.arange(tokenizer.quantizer.num_codes))
        mine, theirs = ((x_ND - rows[i.flatten()]).norm(dim=1)[other.flatten()] for i in (ours, ids))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    return int(other.sum())


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES)
def test_diffusers_finds_the_same_ids_and_pixels(codes, tmp_path):
    library = pytest.importorskip("diffusers", reason=NEEDS)
    tokenizer = tokenizer_of(codes, mid_attention=codes != "vq")
    folder = exported("diffusers", tokenizer, tmp_path)
    theirs, said = library.VQModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    assert {file.name for file in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    pixels = images(4, 32)
    with torch.no_grad():
        latents = theirs.encode(pixels).latents
        ids = theirs.quantize(latents)[2][2].view(4, 8, 8)
        assert disagreeing(tokenizer, pixels, ids) == 0
        expected = tokenizer.decode(ids)
        assert expected.std() > 0.1
        torch.testing.assert_close(theirs.decode(latents).sample, expected, rtol=1e-5, atol=1e-5)
        shape = (4, 8, 8, theirs.config.vq_embed_dim)
        given = theirs.decode(ids.flatten(), force_not_quantize=True, shape=shape).sample
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES)
def test_transformers_finds_the_same_ids(codes, tmp_path):
    library = pytest.importorskip("transformers", reason=NEEDS)
    if not hasattr(library, "Apertus1p5VisionTokenizerModel"):
        pytest.skip("this version of transformers has no tokenizer with the arithmetic of IBQ")
    tokenizer = tokenizer_of(codes)
    folder = exported("transformers", tokenizer, tmp_path)
    theirs, said = library.Apertus1p5VisionTokenizerModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    pixels = images(4, 32)
    with torch.no_grad():
        ids = theirs.encode(pixels).image_tokens
        assert disagreeing(tokenizer, pixels, ids) == 0
        theirs.save_pretrained(tmp_path / "again")
    was, now = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.equal(x, now[name]) for name, x in was.items())


ANY = {
    "conv": {"net": NET, "quantizer": CODES["vq"][0], "latent_norm": "layer"},
    "magvit": {"net": {"name": "magvit", "channels": 8, "multipliers": [1, 2], "num_groups": 4, "z_channels": 4}},
    "image_vit": {
        "net": {"name": "image_vit", "patch": 4, "width": 16, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2}
    },
}
VIT = {"name": "vit", "labels": [256], "image_size": 16, "patch": 4, "bottleneck": 2, "width": 16, "num_heads": 2}
VIT |= {"mlp_width": 16, "encoder_layers": 1, "decoder_layers": 1}
ANY["vit"] = {"net": VIT, "signal": {"name": "depth"}, "code_dropout": "random", "no_code": "learned"}
ANY["vit"]["quantizer"] = {"name": "fsq", "levels": [7, 5, 5]}
WAVE = {"name": "wave", "channels": 4, "ratios": [2, 4], "width": 8, "hidden": 12, "num_blocks": 1, "num_groups": 4}
WAVE |= {"lstm_layers": 0, "encoder_gain": 1.8}
ANY["wave"] = {"net": WAVE, "signal": {"name": "sounds", "sample_rate": 8000}, "latent_norm": "layer"}
ANY["wave"]["quantizer"] = {"name": "simvq", "num_codes": 41, "dim": 6, "init": "normal", "revive_every": 0}
ANY["magvit"]["quantizer"] = {"name": "lfq", "dim": 4}  # whitened by moving moments, in float64
ANY["image_vit"]["quantizer"] = {"name": "fsq", "levels": [5, 5, 7]}  # constants that are no weights
# Why these are no class of a library; of the others their net is none.
REASONS = dict.fromkeys(("conv", "wave"), "latent_norm is layer")


def any_of(net: str) -> Tokenizer:
    """With noise on every parameter, by which samples get several ids."""
    tokenizer, draw = small(**ANY[net]), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tokenizer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return tokenizer


def given(tokenizer: Tokenizer) -> tuple[torch.Tensor, ...]:
    """Samples of a net, and their context where it takes one."""
    if tokenizer.net.name == "wave":
        return (torch.randn(3, 1, 83, generator=torch.Generator().manual_seed(5)),)
    if tokenizer.net.takes_context:
        classes = torch.randint(256, (3, 1, 16, 16), generator=torch.Generator().manual_seed(5))
        return classes.float(), images(3, 16)
    return (images(3, 16),)


def test_every_net_is_exported_somewhere():
    assert set(ANY) == set(NETS)


@pytest.mark.parametrize("net", ANY)
def test_what_the_library_has_no_class_for_becomes_a_class_of_ours(net, tmp_path, capsys):
    """A saved tokenizer, which we load as every other, and what AutoModel finds the class by."""
    tokenizer = any_of(net)
    folder = exported("transformers", tokenizer, tmp_path)
    said = capsys.readouterr().out
    assert f"vqscale.tokenizer.auto_model.TokenizerModel.from_pretrained('{folder}')" in said
    assert REASONS.get(net, f"net.name is {net}") in said
    assert {file.name for file in folder.iterdir()} == {"card.json", "config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "vqscale_tokenizer"
    assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint
    for library in export.EXPORTS:  # no class of theirs, and none of ours that they would find
        words = ["--to", library, str(tmp_path / "saved"), str(tmp_path / library), "--class-of", "library"]
        assert export.main(words) == 2
        assert REASONS.get(net, f"net.name is {net}") in capsys.readouterr().err
        assert not (tmp_path / library).exists()


@pytest.mark.slow
@pytest.mark.parametrize("net", ANY)
def test_auto_model_computes_what_we_compute_to_the_bit(net, tmp_path):
    library = pytest.importorskip("transformers", reason=NEEDS)
    from vqscale.tokenizer.auto_model import TokenizerModel

    tokenizer = any_of(net)
    folder = exported("transformers", tokenizer, tmp_path)
    theirs = library.AutoModel.from_pretrained(folder)
    assert isinstance(theirs, TokenizerModel)
    assert not theirs.training
    samples, *context = given(tokenizer)
    ids = tokenizer.encode(samples, *context)
    assert len(ids.unique()) > 3
    assert torch.equal(theirs.encode(samples, *context), ids)
    assert torch.equal(theirs.decode(ids, *context), tokenizer.decode(ids, *context))
    made = theirs(samples, *context)
    assert torch.equal(made.ids, ids)
    assert torch.equal(made.samples, tokenizer(samples, *context)[0])

    with torch.no_grad():
        theirs.tokenizer.decoder.get_parameter(tokenizer._last_weight).add_(1.0)
    theirs.save_pretrained(tmp_path / "again")
    again = library.AutoModel.from_pretrained(tmp_path, subfolder="again")
    assert again.tokenizer.fingerprint == theirs.tokenizer.fingerprint != tokenizer.fingerprint


@pytest.mark.slow
def test_auto_model_refuses_what_would_be_another_tokenizer(tmp_path):
    library = pytest.importorskip("transformers", reason=NEEDS)
    import vqscale.tokenizer.auto_model  # noqa: F401 (tells AutoModel of the class)

    folder = exported("transformers", tokenizer_of("ibq"), tmp_path, "--class-of", "vqscale")
    load = library.AutoModel.from_pretrained
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, .* in float32"):
        load(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"without device_map: leave that out"):
        load(folder, device_map="auto")
    with pytest.raises(ValueError, match=r"no tokenizer is made of that: load one with from_pretrained"):
        library.AutoModel.from_config(library.AutoConfig.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"without push_to_hub: leave that out"):
        load(folder).save_pretrained(folder, push_to_hub=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"the file was cut off or exchanged"):
        load(folder)


def test_the_class_of_the_library_is_taken_where_the_installed_version_has_it(tmp_path, capsys):
    tokenizer = tokenizer_of("ibq")
    (tmp_path / "old" / "models").mkdir(parents=True)
    (tmp_path / "new" / "models" / "apertus1p5").mkdir(parents=True)
    assert as_transformers.why_not(tokenizer, tmp_path / "new") == []
    old = as_transformers.why_not(tokenizer, tmp_path / "old")
    assert old == ["the installed transformers has no Apertus1p5VisionTokenizerModel"]
    exported("transformers", tokenizer, tmp_path, "--class-of", "vqscale")
    assert "to load it: --class-of vqscale" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
    words = [str(tmp_path / "saved"), str(tmp_path / "none"), "--class-of", "vqscale"]
    assert export.main(["--to", "diffusers", *words]) == 2
    assert "vqscale has a class for a tokenizer in transformers only: leave --class-of out" in capsys.readouterr().err


SEANET = {"name": "wave", "decoder": "seanet", "channels": 4, "ratios": [2, 5], "lstm_layers": 1}
LEVELS = {"name": "residual", "levels": 2, "inner": {"name": "vq", "num_codes": 8, "dim": 6}}


def test_every_command_of_the_readme_makes_the_class_that_it_names(tmp_path, capsys):
    models = {
        "tokenizers/ibq-16384": tokenizer_of("ibq"),
        "tokenizers/encodec-6kbps": small(
            net=SEANET, quantizer=LEVELS, signal={"name": "sounds", "sample_rate": 8000}, latent_norm="none"
        ),
        "runs/row-prior": prior_of(net={"qk_norm": True}),
    }
    for name, model in models.items():
        model.save(tmp_path / name)
    page = (Path(vqscale.__file__).parent / "tokenizer" / "README.md").read_text()
    lines = re.findall(r"^python tools/export\.py (.+?) +# (\w+)", page, re.MULTILINE)
    assert len(lines) == page.count("python tools/export.py") == 5
    for words, kind in lines:
        *options, model, out = words.split()
        assert export.main([*options, str(tmp_path / model), str(tmp_path / out)]) == 0
        assert kind in capsys.readouterr().out


def test_the_package_is_imported_without_transformers():
    """One file imports it, and no other file imports that one."""
    package = Path(vqscale.__file__).parent
    asks = re.compile(r"^\s*(?:import|from) (?:transformers|diffusers|vqscale\.tokenizer\.auto_model)\b", re.MULTILINE)
    assert [path.name for path in package.rglob("*.py") if asks.search(path.read_text())] == ["auto_model.py"]


def prior_of(prefix: int = 1, **settings) -> Prior:
    net = {**LLAMA, "num_prefix": prefix, **settings.pop("net", {})}
    config = {"name": "autoregressive", "num_codes": K, "grid": GRID, "num_classes": CLASSES, "net": net, **settings}
    prior = priors.build(config)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in prior.parameters():
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 5) + (p.ndim == 1))
    return prior.eval()


HEADS = {"rows": {}, "tied": {"head": {"embedding": "tied"}}}
HEADS["normed"] = {"net": {"qk_norm": True}}
HEADS["codebook"] = {"head": {"embedding": "codebook"}, "feature_dim": 5}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_llama_gives_the_same_logits_and_draws_ids(head, tmp_path):
    library = pytest.importorskip("transformers", reason=NEEDS)
    prefix = 2 if head == "tied" else 1
    prior = prior_of(prefix, **HEADS[head])
    folder = exported("transformers", prior, tmp_path)
    kind = "Qwen3ForCausalLM" if head == "normed" else "LlamaForCausalLM"
    theirs, said = getattr(library, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    labels = torch.tensor([0, 3, -1])
    ids = torch.randint(0, K, (3, *GRID))
    row = K + torch.where(labels < 0, CLASSES, labels)[:, None] * prefix + torch.arange(prefix)
    with torch.no_grad():
        given = torch.cat([row, ids.flatten(1)[:, :-1]], 1)
        logits = theirs(given).logits[:, prefix - 1 :, :K]
        expected = prior.states(ids, prior.prefix(labels)) @ prior.head.rows.T
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        drawn = theirs.generate(row, do_sample=False)[:, prefix:]
    assert drawn.shape == (3, 6)
    ours = prior.sample(labels, {"temperature": 0.0}, numbers_B=torch.arange(3))
    assert torch.equal(drawn, ours.flatten(1))
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_every_version_is_told_by_what_tokens_are_turned():
    """Those before 5 read it beside the other settings, and took a number of their own where it was not."""
    settings = as_llama.export(prior_of()).settings["config.json"]
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == LLAMA["rotary_base"]


def test_a_row_is_turned_as_a_sequence_that_begins_with_the_prefix():
    """Scores of two tokens know how far apart they are in the row, across the prefix too."""
    from vqscale.nets.config.transformer import TransformerConfig
    from vqscale.nets.transformer import rotary

    config = TransformerConfig(width=8, num_heads=1, num_prefix=2, rotary="sequence", rotary_base=100.0)
    turns = rotary(config, (2, 3))
    angles = torch.outer(torch.arange(8.0), 100.0 ** -(torch.arange(4) / 4))
    torch.testing.assert_close(turns, torch.stack([angles.cos(), angles.sin()], -1))
    assert [key for key, _ in TransformerConfig(rotary="sequence", prefix_rotary="zero").problems()] == [
        "prefix_rotary"
    ]
    priors.build({"grid": [2, 3, 5], "num_codes": 4, "net": {"width": 8, "num_heads": 1, "rotary": "sequence"}})


REFUSED = {
    "diffusers": {
        "net.name is magvit": ({}, {"name": "magvit", "z_channels": 4, "channels": 32, "multipliers": [1]}),
        "net.patch is 2": ({}, {**NET, "patch": 2}),
        "net.multipliers begin with 2": ({}, {**NET, "multipliers": [2, 2, 2]}),
        "quantizer.name is fsq": ({"quantizer": {"name": "fsq", "levels": [5, 5]}}, NET),
        "latent_norm is rms with similarity euclid": ({"latent_norm": "rms"}, NET),
        "latent_norm is layer with similarity dot": ({"latent_norm": "layer", "quantizer": CODES["ibq"][0]}, NET),
    },
    "transformers": {
        "net.num_groups is 16": ({}, {**NET, "num_groups": 16}),
        "net.mid_attention is false": ({}, {**NET, "mid_attention": False, "num_groups": 16}),
    },
}


@pytest.mark.parametrize(("library", "reason"), [(x, reason) for x in REFUSED for reason in REFUSED[x]])
def test_what_no_class_computes_is_refused_with_the_reason(library, reason, tmp_path, capsys):
    settings, net = REFUSED[library][reason]
    quantizer = {"name": "vq", "num_codes": 9, "dim": 4}
    model = small(net=net, **{"quantizer": quantizer, "latent_norm": "none", **settings})
    model.save(tmp_path / "saved")
    words = ["--to", library, str(tmp_path / "saved"), str(tmp_path / "out")]
    assert export.main([*words, "--class-of", "library"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert "would be another model" in said
    assert not (tmp_path / "out").exists()
    assert export.main(words) == (2 if library == "diffusers" else 0)  # there it becomes a class of vqscale
    assert reason in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({"name": "masked"}, ["name is masked"]),
        (
            {"net": {"rotary": "grid", "adaln": True}},
            ["net.rotary is grid", "net.adaln is true"],
        ),
        ({"head": {"name": "factorised", "factors": [1, K], "within": None}}, ["head.name is factorised"]),
    ],
)
def test_a_prior_that_is_no_llama_is_refused_with_every_reason(settings, reasons, tmp_path, capsys):
    net = {**LLAMA, "num_heads": 2, **settings.pop("net", {})}
    prior = priors.build({"num_codes": K, "grid": GRID, "num_classes": CLASSES, "net": net, **settings})
    prior.save(tmp_path / "saved")
    assert export.main(["--to", "transformers", str(tmp_path / "saved"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    for reason in reasons:
        assert reason in said
    assert export.main(["--to", "diffusers", str(tmp_path / "saved"), str(tmp_path / "out")]) == 2
    assert "is a prior, and --to diffusers takes a tokenizer: use --to transformers" in capsys.readouterr().err


def test_a_run_is_exported_with_the_weights_that_are_asked_for_and_nothing_is_written_over(tmp_path, capsys):
    tokenizer = small(quantizer=CODES["vq"][0], latent_norm="none")
    run = write_run(tmp_path / "run", tokenizer, average=0.5)
    for weights, above in {"average": 0.5, "parameters": 0.0}.items():
        words = ["--to", "diffusers", str(run), str(tmp_path / weights), "--weights", weights]
        assert export.main(words) == 0
        bias = load_file(tmp_path / weights / "diffusion_pytorch_model.safetensors")["decoder.conv_out.bias"]
        assert torch.equal(bias, tokenizer.decoder.conv_out.bias + above)
        assert json.loads((tmp_path / weights / "config.json").read_text())["sample_size"] == 8
    assert "diffusers.VQModel.from_pretrained(" in capsys.readouterr().out
    assert export.main(words) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert export.main(["--to", "diffusers", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none does not exist" in capsys.readouterr().err
