"""Show what a finished run reached: a table, the pictures, and where everything is.

    vqscale summary [--key KEY] [CONFIG] [dotted.key=value ...]     the run of this config, as for `vqscale train`

--key prints what the config says of a key, run.folder for example, and nothing else; an empty line where it is null.
"""

from __future__ import annotations

import json
from pathlib import Path

from vqscale import config as configuration
from vqscale.disk import files
from vqscale.programs.commands import words
from vqscale.run import checkout, processes
from vqscale.train.config import Run

ROWS = (
    ("psnr", "PSNR on held-out images, dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("usage", "usage: codes that held-out images use", "{:.1%}"),
    ("ceiling", "the most that so many tokens could use", "{:.1%}"),
    ("perplexity", "perplexity of their use", "{:,.0f}"),
    ("num_codes", "codes", "{:,}"),
    ("images_per_s", "images/s in training", "{:.1f}"),
    ("code_axis_share", "share of the step on the code axis", "{:.1%}"),
    ("data_wait", "share of the time waiting for data", "{:.1%}"),
    ("processes", "processes", "{}"),
    ("steps", "steps", "{:,}"),
)


def show(folder: Path) -> str:
    """The text; copies the last reconstructions to FOLDER/reconstructions.png. ValueError if the run is not done."""
    path = folder / "summary.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist, the run in {folder} is not done: start `vqscale train` again")
    summary = json.loads(path.read_text())
    rows = [(label, form.format(summary[key])) for key, label, form in ROWS if key in summary]
    wide, right = max(len(label) for label, _ in rows), max(len(value) for _, value in rows)
    lines = [f"  {label:{wide}}  {value:>{right}}" for label, value in rows]
    pictures = sorted((folder / "samples" / "reconstructions").glob("*.png"))
    if pictures:
        files.write(folder / "reconstructions.png", pictures[-1].read_bytes())
        lines.append(f"originals above reconstructions: {folder / 'reconstructions.png'}")
    lines.append(
        f"everything is in {folder}/: run.yaml, metrics.jsonl, samples/, checkpoints/, summary.json; "
        f"curves: tensorboard --logdir {folder / 'tb'}"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """0, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _summary(argv))


def _summary(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    key = ""
    if "--key" in argv:
        at = argv.index("--key")
        if at + 1 == len(argv):
            raise ValueError("--key takes a key of the config and found none: use --key run.folder, say")
        key, argv = argv[at + 1], [*argv[:at], *argv[at + 2 :]]
    path, changes = words.config_and_changes(argv)
    config: Run = configuration.load(Run, path or checkout.config("quickstart/tokenizer.yaml"), changes)
    print(configuration.text_of(config, key) if key else show(Path(config.run.folder)))
    return 0
