"""The arguments of `vqscale evaluate`, and what is wrong with them before anything is opened."""

from __future__ import annotations

import argparse

from vqscale.data.config import INTERPOLATIONS
from vqscale.programs.commands import words

LEARNT = "(default: as the tokenizer was trained; not known, or for statistics"
GUIDANCE = "of what the prior draws: 1 is none (default), 0 what it knows without the image"
CONSTANT = "of the training set, for the constant that codes are compared with; 0 is none (default: %(default)s)"
OWN_SIZE = "measure at the size of the files, as published, in place of that of the samples"
KEYS = "measure the samples whose keys this file lists, one a line (a file's name does too), and no others"
REFERENCE = "statistics that the predictions of each row are compared with, as FID-5k does (with --inception, --keys)"
PREDICTIONS = "segments: write those with all codes, of the prior and without as COCO's PNG and JSON; with --own-size"
MOST = "of a longer recording the beginning alone is looked at: Vocos takes memory by its square (default: %(default)s)"
KEPT = "so many images, drawn from all, keep their features for precision and recall: 8 kB each (default: %(default)s)"
SWAPS = (
    "PSNR, and distances with --classifier or --inception, where such shares of the ids are swapped, for one of the "
    "--neighbours nearest codes and for any other"
)
OF_SOUNDS = (
    "a folder of `vqscale classifier --medium sounds`: how often it names drawn sounds, reconstructions, noise right"
)
CLASSIFIER = "a folder of `vqscale classifier`: distance of its features from those of the images, drawn shapes"
AGREEMENT = "which share of the ids bfloat16 moves, and an image that stands a pixel or a token further"
REACH = "which share of the codes one backward pass of the first batch gives a gradient"
TRAINING = "training shards: nats of held-out ids under a small prior that has learnt theirs, beside unigram and log K"
SAVE = "write the tokenizer, its card with these numbers (measured), into this folder"
BUCKETS = "measure images in the nearest of these heights and widths, such as 256x256 224x288, in place of squares"
ANY = 'how its sha256 begins; "any" takes every file, and numbers have other names (default: %(default)s)'


def parser(about: str | None) -> argparse.ArgumentParser:
    out = words.parser(about)
    commands = out.add_subparsers(dest="command", required=True)
    tokenizer = commands.add_parser("tokenizer", help="reconstructions and use of codes of a trained tokenizer")
    tokenizer.add_argument("path", metavar="PATH", help="run folder, checkpoint folder or exported folder")
    words.add_weights(tokenizer)
    words.add_codes(tokenizer)
    tokenizer.add_argument("--vgg", help="vgg16-397923af.pth, for LPIPS")
    tokenizer.add_argument("--heads", help="linear heads of LPIPS 0.1 for VGG, for LPIPS")
    tokenizer.add_argument("--vgg-sha256", default="397923af", help=ANY)
    tokenizer.add_argument("--reference", help="statistics that rFID compares with (default: those of the originals)")
    tokenizer.add_argument("--swaps", metavar="SHARE", type=float, nargs="+", default=[], help=SWAPS)
    tokenizer.add_argument("--neighbours", type=int, default=8, help="of a code, for --swaps (default: %(default)s)")
    tokenizer.add_argument("--classifier", help=CLASSIFIER)
    tokenizer.add_argument("--agreement", action="store_true", help=AGREEMENT)
    tokenizer.add_argument("--reach", action="store_true", help=REACH)
    tokenizer.add_argument("--training", metavar="SHARDS", help=TRAINING)
    tokenizer.add_argument("--training-images", type=int, default=4096, help="the first of --training (%(default)s)")
    tokenizer.add_argument("--prior-steps", type=int, default=400, help="of the small prior (default: %(default)s)")
    tokenizer.add_argument("--save", metavar="FOLDER", help=SAVE)
    tokenizer.add_argument("--save-stats", help="npz for the statistics of the originals, a later --reference")
    statistics = commands.add_parser("statistics", help="statistics of a data set, for --reference")
    tokenizer.add_argument("--buckets", metavar="HEIGHTxWIDTH", type=_sides, nargs="+", help=BUCKETS)
    statistics.add_argument("out", metavar="OUT.npz")
    statistics.add_argument("--images", type=int, default=10_000, help=KEPT)
    samples = commands.add_parser("samples", help="generated images against a reference")
    samples.add_argument("path", metavar="SAMPLES.npz", help="uint8 N x height x width x 3 under arr_0")
    samples.add_argument("--reference", help="npz of `statistics`, or with mu, sigma, mu_s, sigma_s, arr_0, or some")
    samples.add_argument("--classifier", help="a folder of `vqscale classifier`, for samples of drawn shapes")
    prior = commands.add_parser("prior", help="how likely held-out ids are to a trained prior")
    prior.add_argument("path", metavar="PRIOR", help="run folder, checkpoint folder or exported folder")
    prior.add_argument("--cache", required=True, help="token cache of held-out images, by the prior's tokenizer")
    prior.add_argument("--training", help="token cache that the prior was trained on, for unigram")
    words.add_weights(prior)
    words.add_codes(prior, "vocabulary")
    prior.add_argument("--images", type=int, default=0, help="the first so many, in whole batches; 0 is all (default)")
    dense = commands.add_parser("dense", help="what the codes of labels tell beside the image that a decoder sees")
    dense.add_argument("path", metavar="PATH", help="run folder, checkpoint folder or exported folder of a tokenizer")
    dense.add_argument("--config", help="YAML that has data.val and data.train (default: run.yaml of the run)")
    dense.add_argument("--prior", metavar="PRIOR", help="a prior of its ids that sees the image: rows of what it draws")
    dense.add_argument("--guidance", type=float, help=GUIDANCE)
    dense.add_argument("--shards", help="held-out shards in place of those of data.val")
    dense.add_argument("--training-images", type=int, default=1000, help=CONSTANT)
    words.add_weights(dense)
    words.add_codes(dense)
    dense.add_argument("--own-size", action="store_true", help=OWN_SIZE)
    dense.add_argument("--keys", metavar="FILE", help=KEYS)
    dense.add_argument("--reference", help=f"colors: {REFERENCE}")
    dense.add_argument("--predictions", metavar="FOLDER", help=PREDICTIONS)
    dense.add_argument("--json", action="store_true", help="print everything as JSON in place of the table")
    sounds = commands.add_parser("sounds", help="whole recordings through a tokenizer of sounds, and a page of them")
    sounds.add_argument("path", metavar="PATH", help="run folder, checkpoint folder or exported folder of a tokenizer")
    sounds.add_argument("--shards", required=True, help="WebDataset shards of recordings: paths, braces, URLs")
    sounds.add_argument("--samples", help="folder of `vqscale sample`, whose sounds the page has too")
    sounds.add_argument("--classifier", metavar="FOLDER", help=OF_SOUNDS)
    sounds.add_argument("--most-seconds", type=float, default=60.0, help=MOST)
    sounds.add_argument(
        "--speech", action=argparse.BooleanOptionalAction, default=True, help="PESQ, STOI, F1 of voicing"
    )
    words.add_weights(sounds)
    words.add_codes(sounds)
    sounds.add_argument("--json", action="store_true", help="print everything as JSON in place of the lines")
    sounds.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for images in (tokenizer, statistics):
        images.add_argument("--shards", required=True, help="WebDataset shards: paths, braces, *, URLs, pipe:")
        images.add_argument("--image-size", type=int, help=f"pixels of a side {LEARNT}, 256)")
        images.add_argument("--interpolation", choices=INTERPOLATIONS, help=f"of the resize {LEARNT}, bicubic)")
        images.add_argument("--workers", type=int, default=2, help="reading processes per rank (default: %(default)s)")
    statistics.add_argument("--keys", metavar="FILE", help=KEYS)
    for command in (tokenizer, statistics, samples, dense):
        command.add_argument("--inception", required=command is statistics, help="weights of FID's Inception, a path")
        command.add_argument("--inception-sha256", default="6726825d", help=ANY)
    for command in (tokenizer, statistics, samples, prior, dense):
        command.add_argument("--batch", type=int, default=64, help="images of a step and process (default: 64)")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for command in (tokenizer, samples, prior, dense, sounds):
        command.add_argument("--out", help="folder for result.json and a page")
    return out


def _sides(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def check(args: argparse.Namespace) -> None:
    """ValueError for options that do not go together, all at once, before anything is opened."""
    wrong = []
    if args.command == "tokenizer":
        if bool(args.vgg) != bool(args.heads):
            wrong.append("LPIPS takes two files, and one was given: give --vgg and --heads, or neither")
        wrong += [
            f"--{name} is about features of Inception, and there is no --inception: give its weights"
            for name, value in (("reference", args.reference), ("save-stats", args.save_stats))
            if value and not args.inception
        ]
        if not all(0 < share <= 1 for share in args.swaps) or args.neighbours < 1:
            wrong.append(
                f"--swaps takes shares of ids, above 0 and at most 1, and --neighbours at least 1, and these are "
                f"{args.swaps} and {args.neighbours}: give 0.1 0.3 and 8, say"
            )
        if args.buckets and args.image_size:
            wrong.append("--image-size is the side of squares, and --buckets has the sides of others: give one of them")
        if args.training_images < 1 or args.prior_steps < 2:
            wrong.append(
                f"the small prior of --training takes --training-images of at least 1 and --prior-steps of at least 2, "
                f"and these are {args.training_images} and {args.prior_steps}: give 4096 and 400, say"
            )
        if args.reference and args.save_stats:
            wrong.append("with --reference the originals are not looked at, so --save-stats has nothing: give one")
    elif args.command == "samples":
        if bool(args.inception) != bool(args.reference):
            wrong.append("FID takes a reference and Inception, and one was given: give --reference and --inception")
        if not args.inception and not args.reference and not args.classifier:
            wrong.append(
                "samples are measured by something, and nothing was given: give --reference and --inception, or "
                "--classifier for samples of drawn shapes"
            )
    elif args.command == "statistics" and args.images and args.images < 4:
        wrong.append(f"--images is {args.images}, and a third neighbour takes 4: give at least 4, or 0 to keep none")
    elif args.command == "dense":
        if args.training_images < 0:
            wrong.append(f"--training-images is {args.training_images}: give 0 (no constant) or more")
        if bool(args.inception) != bool(args.reference):
            wrong.append("FID takes a reference and Inception, and one was given: give --reference and --inception")
        if args.predictions and not args.own_size:
            wrong.append("--predictions writes maps of the size of their files, for evaluators: give --own-size too")
        if args.guidance is not None and (not args.prior or not args.guidance >= 0):
            wrong.append(
                f"--guidance is of what a prior draws and 0 or more; it is {args.guidance:g} and --prior {args.prior}: "
                "give 2 and a prior, say"
            )
    elif args.command == "prior" and args.images < 0:
        wrong.append(f"--images is {args.images}: give 0 (all) or more")
    elif args.command == "sounds" and not args.most_seconds > 0:
        wrong.append(f"--most-seconds is {args.most_seconds}: give more than 0")
    if args.command != "sounds" and args.batch < 1:
        wrong.append(f"--batch is {args.batch}: give at least 1")
    if wrong:
        raise ValueError("; ".join(wrong))
