"""``structlin prepare``: data sets in the form that training reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import UsageError, choice, print_json, print_table

KINDS = ("text", "openwebtext", "imagenet", "cifar10", "cifar100")
HELP = "make data sets ready: text and OpenWebText as tokens, ImageNet checked and resized, CIFAR downloaded"
EXAMPLES = """\
examples:
  structlin prepare text --pydoc --out data/pydoc
      the documentation that every Python ships, as tokens: a corpus without a download
  structlin prepare text books/*.txt --out data/books --val-fraction 0.05
      any UTF-8 text: GPT-2's tokens where its vocabulary is at hand, bytes otherwise
  structlin prepare openwebtext --out data/openwebtext
      streamed from the Hugging Face hub (about 9 billion tokens, 18 GB of files); --dataset for others
  structlin prepare imagenet path/to/imagenet
      reads and decodes every image, counts the classes, names what is broken
  structlin prepare imagenet path/to/shards --resize 256 --out data/imagenet256
      an image tree whose images have a shortest side of 256 pixels
  structlin prepare cifar10 --out data
      downloads the official archive, about 160 MB, and verifies it

Files to read come before the options. All cores work unless --workers says otherwise. Interrupted, the same command
goes on where it was. Tokens are train.bin and val.bin of 16 bits, as nanoGPT reads them, beside a meta.json.
"""
_ONLY = {
    "text": ("pydoc", "tokenizer", "vocabulary", "val_fraction", "name"),
    "openwebtext": ("dataset", "split", "column", "seed", "tokenizer", "vocabulary", "val_fraction", "name"),
    "imagenet": ("resize", "quality", "format", "image_column", "label_column", "num_classes", "remove_broken"),
    "cifar10": ("url",),
    "cifar100": ("url",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="KIND", type=choice("kind", KINDS), help=", ".join(KINDS))
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="text files; a folder or data set of images")
    parser.add_argument("--out", metavar="DIR", help="folder to write")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one for each core)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    tokens = parser.add_argument_group("text and openwebtext")
    tokens.add_argument("--tokenizer", type=choice("tokenizer", ("auto", "gpt2", "bytes")), metavar="NAME", help=(
        "gpt2, bytes, or (text) auto: gpt2 where its vocabulary is at hand, bytes otherwise"
    ))  # fmt: skip
    tokens.add_argument(
        "--vocabulary", metavar="DIR", help="holds encoder.json and vocab.bpe, or vocab.json, merges.txt"
    )
    tokens.add_argument(
        "--val-fraction", type=float, metavar="F", help="share of the text that is held out (0.1; 0.0005)"
    )
    tokens.add_argument("--name", metavar="NAME", help="of the corpus, for records")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--pydoc", action="store_true", default=None, help="the text that Python ships: the default without files"
    )
    owt = parser.add_argument_group("openwebtext")
    owt.add_argument("--dataset", metavar="NAME", help="name on the Hugging Face hub, or a folder")
    owt.add_argument("--split", metavar="NAME", help="split of the data set (train)")
    owt.add_argument("--column", metavar="NAME", help="column of the text (text)")
    owt.add_argument("--seed", type=int, metavar="N", help="of the choice of held-out documents (2357)")
    images = parser.add_argument_group("imagenet")
    images.add_argument(
        "--resize", type=int, metavar="N", help="write images with a shortest side of N pixels to --out"
    )
    images.add_argument("--quality", type=int, metavar="Q", help="of the JPEG files that are written, 1 to 95 (90)")
    images.add_argument("--remove-broken", action="store_true", default=None, help="leave broken images out of --out")
    images.add_argument("--format", type=choice("format", ("folder", "shards", "datasets")), metavar="NAME", help=(
        "folder, shards or datasets; what is found, unless given"
    ))  # fmt: skip
    images.add_argument("--image-column", metavar="NAME", help="of a Hugging Face data set (image)")
    images.add_argument("--label-column", metavar="NAME", help="of a Hugging Face data set (label)")
    cifar = parser.add_argument_group("cifar10 and cifar100")
    cifar.add_argument("--url", metavar="URL", help="where the archive is, if not at its official place")
    images.add_argument("--num-classes", type=int, metavar="K", help="classes there should be")


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.shards import Interrupted

    for name in sorted({name for names in _ONLY.values() for name in names} - set(_ONLY[arguments.kind])):
        if getattr(arguments, name) is not None:
            kinds = " and ".join(kind for kind in KINDS if name in _ONLY[kind])
            raise UsageError(f"--{name.replace('_', '-')} is an option of {kinds}, not of {arguments.kind}")
    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {arguments.workers}")
    work = {"text": _text, "openwebtext": _openwebtext, "imagenet": _imagenet}.get(arguments.kind, _cifar)
    try:
        return work(arguments)
    except Interrupted as stop:
        print(f"structlin prepare: {stop}; what is done is kept, the same command goes on", file=sys.stderr)
        return 128 + stop.signal
    except ConnectionError as error:
        print(f"structlin prepare: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (FileNotFoundError, FileExistsError, ImportError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    except OSError as error:
        print(f"structlin prepare: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _text(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.text import prepare_text

    if arguments.pydoc and arguments.sources:
        raise UsageError(f"--pydoc takes no files, got {arguments.sources[0]!r}")
    out = _out(arguments)
    if not (arguments.pydoc or arguments.sources):
        print("no file is named: taking the text that Python ships (--pydoc)", file=sys.stderr)
    options = _given(arguments, "vocabulary", "val_fraction", "name")
    options["tokenizer"] = _tokenizer(arguments.tokenizer or "auto", arguments.vocabulary)
    with _Bar(arguments.quiet, "shard") as bar:
        data = prepare_text(arguments.sources or None, out, workers=arguments.workers, advance=bar.tokens, **options)
    return _told(arguments, data)


def _tokenizer(asked: str, vocabulary: str | None) -> str:
    """The tokeniser to use; where the choice is ours, say what was chosen and why."""
    if asked != "auto":
        return asked
    from structlin_nn.data.bpe import load_tokenizer

    try:
        load_tokenizer("gpt2", vocabulary)
    except (ImportError, FileNotFoundError) as error:
        if vocabulary is not None:
            raise
        print(f"tokens are bytes (--tokenizer bytes), because: {' '.join(str(error).split())}", file=sys.stderr)
        return "bytes"
    return "gpt2"


def _openwebtext(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.openwebtext import prepare_documents

    if arguments.sources:
        raise UsageError(f"openwebtext takes no files, got {arguments.sources[0]!r}; --dataset names other data")
    if arguments.tokenizer == "auto":
        raise UsageError("--tokenizer auto is for text; openwebtext has gpt2 (the default) or bytes")
    options = _given(arguments, "dataset", "split", "column", "seed", "tokenizer", "vocabulary", "val_fraction", "name")
    with _Bar(arguments.quiet, "shard") as bar:
        data = prepare_documents(_out(arguments), workers=arguments.workers, advance=bar.tokens, **options)
    return _told(arguments, data)


def _cifar(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.cifar_hub import download_cifar

    if arguments.sources:
        raise UsageError(f"{arguments.kind} takes no files, got {arguments.sources[0]!r}")
    with _Bar(arguments.quiet, "B") as bar:
        path = download_cifar(arguments.kind, _out(arguments), advance=bar.count, **_given(arguments, "url"))
    if arguments.json:
        print_json({"archive": str(path)})
    else:
        print(f"{path}: the official archive, md5 sum verified; train with --data {path.parent}")
    return 0


def _told(arguments: argparse.Namespace, data: Any) -> int:
    result = {
        "name": data.name,
        "folder": str(data.folder),
        "tokenizer": data.tokenizer,
        "vocab_size": data.vocab_size,
        "train_tokens": len(data.train),
        "val_tokens": len(data.val),
        "sha256": data.digest,
    }
    if arguments.json:
        print_json(result)
    else:
        print(
            f"{data.name}: {len(data.train):,} training and {len(data.val):,} validation tokens "
            f"({data.tokenizer}, vocabulary {data.vocab_size:,}) in {data.folder}"
        )
    return 0


def _imagenet(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.imagenet import open_imagenet
    from structlin_nn.data.resize import check_images, resize_images

    if len(arguments.sources) != 1:
        raise UsageError(f"imagenet takes one folder or data set, got {len(arguments.sources)}")
    if (arguments.resize is None) != (arguments.out is None):
        raise UsageError("--resize and --out belong together: without both, images are only checked")
    if arguments.resize is None and (arguments.quality is not None or arguments.remove_broken):
        raise UsageError("--quality and --remove-broken are for --resize")
    data = open_imagenet(
        arguments.sources[0],
        format=arguments.format,
        image=arguments.image_column or "image",
        label=arguments.label_column or "label",
        num_classes=arguments.num_classes,
    )
    with _Bar(arguments.quiet, "img") as bar:
        if arguments.resize is None:
            report = check_images(data, workers=arguments.workers, advance=bar.count)
        else:
            report = resize_images(
                data,
                arguments.out,
                size=arguments.resize,
                remove_broken=bool(arguments.remove_broken),
                workers=arguments.workers,
                advance=bar.count,
                **_given(arguments, "quality"),
            )
    for name, message in sorted(report.broken.items()):
        print(f"broken: {message if name in message else f'{name}: {message}'}", file=sys.stderr)
    for path in data.ignored:
        print(f"no image by its name, left out: {path}", file=sys.stderr)
    if arguments.json:
        print_json({"source": data.source, "format": data.format, "sha256": data.digest, **report.to_dict()})
    else:
        _print_images(data, report, arguments.out)
    return 1 if report.broken and not arguments.remove_broken else 0


def _print_images(data: Any, report: Any, out: str | None) -> None:
    rows = [
        (
            split,
            f"{n['images']:,}",
            str(n["classes"]),
            f"{n['smallest_class']} to {n['largest_class']}",
            str(n["broken"]),
        )
        for split, n in report.splits.items()
    ]
    print_table(("split", "images", "classes", "images of a class", "broken"), rows)
    where = f"written to {out}" if out else "checked, nothing written"
    print(f"\n{data.num_classes} classes, from {data.format} {data.source}; {where}")


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out is None:
        raise UsageError("--out DIR is needed: where to write")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, --out needs a folder")
    return out


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


class _Bar:
    """A progress bar on stderr, made when its length is known."""

    def __init__(self, quiet: bool, unit: str) -> None:
        self._quiet, self._unit, self._bar = quiet, unit, None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def count(self, done: int, total: int) -> None:
        if self._quiet:
            return
        if self._bar is None:
            from tqdm import tqdm

            # Where stderr is a file, each refresh is a line: a few will do.
            interval = 0.2 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(
                total=total or None,
                initial=done,
                unit=self._unit,
                unit_scale=self._unit == "B",
                dynamic_ncols=True,
                mininterval=interval,
            )
        self._bar.update(done - self._bar.n)

    def tokens(self, done: int, total: int, tokens: int) -> None:
        self.count(done, total)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
