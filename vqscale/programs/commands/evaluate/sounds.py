"""`vqscale evaluate sounds`: whole recordings through a tokenizer of sounds, their numbers, and a page to listen to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale.data.config_sounds import SoundsConfig
from vqscale.programs.commands import words
from vqscale.run import processes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Drawn = tuple[NDArray[np.int16], NDArray[np.int64]]

MOST_DRAWN = 40  # sounds on the page
RECOGNISED = (
    "share of the recordings whose class it names right, of their reconstructions (recognised), of themselves (_real), "
    "of noise of their own mean spectrum (_noise); _samples: of all of --samples, the class they were drawn as"
)
PROTOCOL = {
    "recordings": "whole, one at a time, at the tokenizer's rate, by way of their ids; reconstructions within [-1, 1]",
    "mel": "mean |difference| of natural logarithms of mel bands, not below 1e-7: the distance that is trained",
    "stft": "mean |difference| of log10 magnitudes, not below 1e-5; windows of 2048, 1024, 512 samples, means of them",
    "si_sdr": "dB, means taken off, projection; of recordings that are not constant",
    "pesq": "wide band, at 16 kHz; pesq_without are recordings that it has no value for, which are in no mean",
    "stoi": "not extended; stoi_without as above",
    "voicing_f1": "by autocorrelation, 50 to 550 Hz, hop 10 ms; published numbers are by CREPE, and do not compare",
    "usage": "share of the codes that these recordings hit at least once",
    "ceiling": "usage of as many tokens if every code were as likely, 1 - exp(-tokens / codes)",
    "kbps": "tokens_per_s times log2 of the codes; kbps_entropy: times id_bits, the entropy of the ids of a token",
    "left out": "UTMOS, whose networks are not part of this package",
}


def told(args: argparse.Namespace) -> str:
    """The lines for a terminal, on rank 0 alone; writes the folder of --out. Collective."""
    from vqscale.data import samples
    from vqscale.data.recordings import Recordings
    from vqscale.metrics import sounds_classifier
    from vqscale.metrics.sound import SpeechMeasures
    from vqscale.programs import judge, recordings
    from vqscale.show import pictures, report, spectrograms
    from vqscale.show.progress import Progress
    from vqscale.signals.sounds import Sounds, bands
    from vqscale.tokenizer.model import Tokenizer
    from vqscale.train.classifiers import SOUNDS

    samples.prepare(SoundsConfig(args.shards))
    with processes.joined(args.device, processes.divide(args.codes), agreed=()) as mesh:
        tokenizer = Tokenizer.load(args.path, mesh=mesh, weights=args.weights)
        if not isinstance(tokenizer.signal, Sounds):
            raise ValueError(
                f"{args.path} is a tokenizer of {tokenizer.signal.config.name}: give one of sounds, or measure it with "
                "`vqscale evaluate tokenizer`"
            )
        mel = bands(tokenizer.signal.config)
        how = SoundsConfig.encoded({**tokenizer.card, "sample_rate": mel.rate}, {}, "center")
        classifier, about = None, {}
        if args.classifier:
            classifier, card = SOUNDS.load(args.classifier, mesh)
            about = judge.about(args.classifier, classifier, card, RECOGNISED)
        source = Recordings(SoundsConfig(args.shards, **how), args.most_seconds)
        speech = SpeechMeasures.installed() if args.speech else SpeechMeasures({}, ())
        progress = Progress(-(-len(source) // mesh.world.size), rank=mesh.world.rank, stream=sys.stderr)
        found = recordings.score(tokenizer, source, mesh, speech, progress.advance, classifier)
        progress.close()
        fingerprint = tokenizer.fingerprint  # collective
    if mesh.world.rank:
        return ""
    drawn = _samples(args.samples)
    numbers = found.numbers
    if classifier is not None and drawn is not None:
        numbers |= sounds_classifier.of_samples(*drawn, classifier, f"the samples {args.samples}")
    result = {
        "numbers": numbers,
        "tokenizer": {"path": args.path, "weights": args.weights, "sha256": fingerprint, "card": tokenizer.card},
        "data": {"shards": list(source.config.patterns), "fingerprint": source.index.fingerprint()},
        "protocol": PROTOCOL | about | {"most seconds of a recording": args.most_seconds},
        "recognised by class": found.by_class,
        "notes": [*speech.left_out, *_notes(numbers, found.broken, args.most_seconds)],
        **words.made_by("evaluate"),
        "processes": mesh.world.size,
    }
    players = "".join(spectrograms.heard(one.key, one.wave, one.recon, mel) for one in found.heard)
    shown = {"usage of codes": pictures.usage(found.per_code, num_codes=found.num_codes)}
    parts = [("Listen", players), *_drawn(args.samples, drawn, mel.rate)]
    lines = report.tell(result, args.out, f"Tokenizer {args.path}", shown, parts)
    return report.text(result) if args.json else lines


def _samples(folder: str | None) -> Drawn | None:
    """The sounds of a folder of samples (N, T) and their classes (N,). ValueError where it has none."""
    if folder is None:
        return None
    import numpy as np

    from vqscale.programs.sampling import folder as sample_folder

    file = Path(folder) / sample_folder.FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {file.name}: give a finished folder of `vqscale sample`")
    with np.load(file, allow_pickle=False) as arrays:
        kept, labels = arrays["arr_0"], arrays["arr_1"]
    if kept.dtype != np.int16 or kept.ndim != 2:
        raise ValueError(f"{file} has {kept.dtype} of shape {kept.shape}, which are no sounds: give samples of sounds")
    return kept, labels


def _drawn(folder: str | None, drawn: Drawn | None, rate: int) -> list[tuple[str, str]]:
    """The sounds of a folder of samples, as a part of the page."""
    if folder is None or drawn is None:
        return []
    from vqscale.programs.sampling import folder as sample_folder
    from vqscale.show import page, spectrograms

    kept, labels = drawn
    named = [f"class {label}" if label >= 0 else f"number {number}" for number, label in enumerate(labels.tolist())]
    players = [spectrograms.player(wave, rate, name) for wave, name in zip(kept[:MOST_DRAWN], named, strict=False)]
    picture = page.picture(Path(folder) / sample_folder.GRID, "mel spectra, a row for each class")
    return [("Drawn from the prior", picture + "".join(players))]


def _notes(numbers: dict[str, Any], broken: list[str], most: float) -> list[str]:
    """What a reader must know before comparing the numbers with others'."""
    found = []
    if numbers["broken"]:
        found.append(f"{numbers['broken']:.0f} recordings could not be read and are in no number: {'; '.join(broken)}")
    if numbers["cut"]:
        found.append(
            f"{numbers['cut']:.0f} recordings were longer than {most:g} s, of which the rest was not looked at"
        )
    return found
