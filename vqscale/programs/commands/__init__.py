"""The command lines of the programs: options, what is wrong with them, and what is printed. `vqscale NAME` starts one.

Each file has `main(argv) -> status`; tools/NAME.py in a checkout and launch/train.py are the same programs. Those whose
words are checked before any file is opened have `arguments(argv)` too.
"""

from __future__ import annotations

COMMANDS = {  # name: (file, what it does)
    "train": ("train", "train a tokenizer or a prior, what a config describes"),
    "encode": ("encode", "encode the images of shards into a cache of ids"),
    "evaluate": ("evaluate", "measure a tokenizer, a prior or generated images"),
    "classifier": ("classifier", "train a judge of drawn pictures or sounds"),
    "cluster": ("cluster", "cluster the codes of a tokenizer, for priors that predict clusters"),
    "sample": ("sample", "draw images from a trained prior"),
    "sweep": ("sweep", "measure a prior under several sampling settings"),
    "study": ("study", "run every combination of a study's dials"),
    "claims": ("claims", "judge what papers claim, by small studies and rules"),
    "plan": ("plan", "predict a training step on 1 to 1024 GPUs"),
    "shards": ("shards", "make WebDataset shards of images or drawn shapes"),
    "convert": ("convert", "make WebDataset shards of NYU Depth v2, COCO panoptic, images with labels"),
    "import": ("import_checkpoint", "make a published tokenizer a saved one"),
    "export": ("export", "make a trained tokenizer or prior one of transformers or diffusers"),
    "page": ("page", "tell a run from images to samples on one page"),
    "plot": ("plot", "draw curves of one or several runs"),
    "summary": ("summary", "show what a finished run reached"),
    "soak": ("soak", "train under kills, stops, damage and full disks, and compare the end"),
    "bench": ("bench", "measure this machine: ours beside other forms"),
}
