"""Of `bench gpu`: a whole training step of the ImageNet tokenizer with 2^18 codes, and its codes on two processes.

The step is that of configs/tokenizer/ibq_imagenet256_262144.yaml in the order of train/tokenizer.py, with the plain
engine and products of bfloat16 over codes; images are drawn, and so are the weights of LPIPS, which change no time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vqscale import config as configuration
from vqscale.codes import dense, noise, products, tally
from vqscale.codes.codebook import Codebook
from vqscale.codes.rows import Rows, draw, set_aside
from vqscale.engine.average import Average
from vqscale.engine.engine import Engine
from vqscale.nets.lpips import LPIPS
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh, connect, disconnect
from vqscale.run.profile import covered
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.adversarial import Discriminator
from vqscale.train.compiled import compile_run
from vqscale.train.config import TokenizerRun

from . import command
from .gpu_checks import NEAR, Row, apart

STEPS = 5  # the first compiles and is not counted
WARM = 4  # steps in which graphs are compiled and captured
TIMEOUT_S = 60.0

# What the step depends on in the config's file, which a Python without a reader of YAML cannot read; a test compares.
SETTINGS: dict[str, Any] = {
    "run": {"folder": "gpu", "steps": 1651650},
    "tokenizer": {
        "latent_norm": "none",
        "net": {"name": "conv"},
        "quantizer": {
            "name": "ibq",
            "num_codes": 262144,
            "dim": 256,
            "similarity": "dot",
            "temperature": 1.0,
            "commitment_weight": 1.0,
            "codebook_weight": 0.25,
            "entropy_weight": 0.05,
            "entropy_temperature": 0.01,
            "init": "normal",
            "init_scale": 1.0,
            "revive_every": 0,
        },
    },
    "loss": {
        "reconstruction": "l1",
        "quantizer_weight": 1.0,
        "adversarial": {
            "generator": "nonsaturating",
            "discriminator": "hinge",
            "weight": 0.1,
            "start_step": 0,
            "lecam_weight": 0.05,
        },
    },
    "average": {"decay": 0.999},
    "optim": {
        "lr": 1.0e-4,
        "betas": [0.5, 0.9],
        "schedule": "steps",
        "drop_steps": [1251250, 1501500],
        "drop_factor": 0.1,
    },
    "engine": {"name": "torch", "precision": "bf16", "matmul": "medium", "clip_norm": 0},
}


def settings(images: int, side: int, channels: int, codes: int, dim: int) -> TokenizerRun:
    """The config with these sizes."""
    data = {"batch": images, "train": {"shards": "drawn", "image_size": side}}
    tokenizer = SETTINGS["tokenizer"]
    quantizer = {**tokenizer["quantizer"], "num_codes": codes, "dim": dim}
    tokenizer = {**tokenizer, "net": {**tokenizer["net"], "channels": channels}, "quantizer": quantizer}
    return configuration.parse(TokenizerRun, {**SETTINGS, "data": data, "tokenizer": tokenizer}, source="bench gpu")


def step(device: str, images: int, side: int, channels: int, codes: int, dim: int) -> Iterator[Row]:
    config, mesh = settings(images, side, channels, codes, dim), Mesh(device=device)
    cuda = mesh.device.type == "cuda"
    with products.precision(config.engine.matmul):
        one, _ = _step(config, mesh, torch.rand(images, 3, side, side, device=mesh.device) * 2 - 1)
        seconds, codes_s = [], []
        for number in range(STEPS if cuda else 2):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            clock.on, began = True, time.perf_counter()
            one(number)
            spans = clock.take()  # waits for the device
            seconds.append(time.perf_counter() - began)
            codes_s.append(spans.get("codes", 0.0))
        clock.on = False
    taken = median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() if cuda else None
    note = f"code axis {median(codes_s[1:]) / taken:.1%} of the step; peak memory is of the whole process"
    case = f"{images} images, {codes} codes"
    yield {"case": case, "form": "ours", "seconds": taken, "peak_bytes": peak, "note": note}
    with products.precision(config.engine.matmul):
        works = _works(lambda: one(number + 1), cuda)
    note = f"the device works in {works / taken:.1%} of the step, and waits for the host in the rest"
    yield {"case": case, "form": "device", "seconds": works, "note": note}


def graphs(device: str, images: int, side: int, channels: int, codes: int, dim: int) -> Iterator[Row]:
    """The same step, of those that log nothing, with encoder and decoder compiled, and with the tokenizer's passes
    replayed as CUDA graphs; on a CPU, which has none, traced alone."""
    config, mesh = settings(images, side, channels, codes, dim), Mesh(device=device)
    cuda, found = mesh.device.type == "cuda", dict[str, tuple[float, float]]()
    case = f"{images} images, {codes} codes"
    samples = torch.rand(images, 3, side, side, device=mesh.device) * 2 - 1
    for form, replayed in {"compiled": False, "graphs": True}.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        run = replace(config.run, compile=True, cuda_graphs=replayed)
        with products.precision(config.engine.matmul), tally.silent():
            one, captured = _step(replace(config, run=run), mesh, samples, "inductor" if cuda else "eager")
            seconds = []
            for number in range(WARM + STEPS if cuda else 2):
                began = time.perf_counter()
                loss = one(number).item()  # waits for the device
                seconds.append(time.perf_counter() - began)
        del one
        found[form] = median(seconds[WARM if cuda else 1 :]), loss
        note = "; ".join([f"the first step took {seconds[0]:.0f} s", *captured])
        yield {"case": case, "form": form, "seconds": found[form][0], "note": note}
    losses = [loss for _, loss in found.values()]
    good = abs(losses[0] - losses[1]) <= 0.01 * abs(losses[0])
    yield {"case": case, "ok": good, "note": "losses of the last step: " + ", ".join(f"{loss:.5g}" for loss in losses)}


def _works(step: Callable[[], Any], cuda: bool) -> float:
    """Seconds of a step in which any operation runs on the device, by torch's profiler: what a step would take if
    nothing had to be launched."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as traced:
        step()
        if cuda:
            torch.cuda.synchronize()
    here = DeviceType.CUDA if cuda else DeviceType.CPU
    ran = [one for one in traced.events() or () if one.device_type == here and not one.is_user_annotation]
    return 1e-6 * covered([(one.time_range.start, one.time_range.end) for one in ran])


def _step(
    config: TokenizerRun, mesh: Mesh, samples: torch.Tensor, backend: str = "inductor"
) -> tuple[Callable[[int], torch.Tensor], list[str]]:
    """(the step of a number from 0, which answers with its loss; what is said of its graphs)."""
    tokenizer = Tokenizer.from_config(config.tokenizer, mesh, 0)
    tables, quantizer = set_aside(tokenizer), tokenizer.quantizer
    quantizer.begin()
    rows = {f"{name}.{key}": x for name, table in tables.items() for key, x in table.named_parameters()}
    engine = Engine(tokenizer, rows, config.engine, config.optim, mesh, config.run.steps)
    captured = compile_run(config, tokenizer, mesh, backend) if config.run.compile else []
    average, perceptual = Average(engine, config.average), LPIPS().to(mesh.device)
    assert config.loss.adversarial is not None
    discriminator = Discriminator(config.loss.adversarial, config, mesh)
    places = torch.arange(len(samples), device=mesh.device)

    def one(number: int) -> torch.Tensor:
        recon, quantized = engine(samples, None, noise.keys(0, number, places))
        discriminator.learn(samples, recon)
        with engine.autocast():
            distance = perceptual(samples, recon).mean()
        loss = (recon - samples).abs().mean() + distance
        theirs, weights, _ = discriminator.distances(samples, recon, loss, tokenizer.last_weight, log=False)
        loss = loss + torch.stack([weights[name] * value for name, value in theirs.items()]).sum()
        engine.backward(loss + config.loss.quantizer_weight * sum(quantized.losses.values()))
        quantizer.update(engine.step().stepped)
        average.update(number + 1)
        return loss.detach()

    return one, captured


def two_ranks(device: str) -> Iterator[Row]:
    """What two processes that share the codes say; where they cannot meet, why."""
    here = Path(__file__).parent
    words = [sys.executable, "-m", "vqscale.parallel.local", "2", str(here), "gpu", "--part", "rank"]
    root = Path(configuration.__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    words += ["--interpret"] if device == "cpu" else []
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    told = list(command.told(done.stdout))
    yield from told
    if not told:
        lines = (done.stdout + done.stderr).splitlines()
        why = [line.strip()[:200] for key in ("Duplicate GPU", "Error") for line in lines if key in line]
        yield {"case": "two processes", "note": f"not possible here: {(why or ['no reason was given'])[0]}"}


def one_rank(device: str, sizes: tuple[int, int], dim: int) -> Iterator[Row]:
    (tokens, codes), number = sizes, int(os.environ["RANK"])
    if device == "cuda":
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())
    place = connect(device, timeout_s=TIMEOUT_S)
    try:
        mesh = Mesh(codes=2, device=place)
        torch.manual_seed(number)
        x_ND = torch.randn(tokens, dim, device=place, requires_grad=True)
        codebook = Codebook(codes, dim, mesh=mesh, init_scale=dim**-0.5)
        with products.precision("medium"):
            out = codebook.mix(x_ND)
            (out.mean_ND.square().mean() + out.code_ND.square().mean()).backward()
        rows_KD = draw(Rows(codes), dim, "normal", dim**-0.5, seed=0).to(place).double()
        same = torch.equal(out.ids_N, dense.nearest(x_ND.detach().double(), rows_KD, "dot")[0])
        error = apart(out.mean_ND.detach(), dense.mix(x_ND.detach().double(), rows_KD, "dot").mean_ND)
        good = ops.min_over(torch.tensor(float(same and error < NEAR), device=place), mesh.world).item()
        if number == 0:
            where = "gloo, on a CPU"
            if device == "cuda":
                where = "NCCL, " + ("on one device" if torch.cuda.device_count() == 1 else "on two devices")
            yield {"case": "two processes", "ok": bool(good), "note": f"{where}: ids and mean rows beside float64"}
    finally:
        disconnect()
