"""``structlin prepare``: write token files for training, by one of two functions of `structlin_nn.data.prepare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from structlin_nn.cli.common import add, given, positive, show

HELP = "write text files or OpenWebText as token files"
KINDS = ("text", "openwebtext")
TOKENS = ("tokenizer", "vocabulary", "val_fraction", "name", "workers")
OF_DATASETS = ("dataset", "split", "column", "seed")
EXAMPLES = """\
examples:
  structlin prepare text --out data/pydoc
      the documentation that is part of Python, a corpus without a download
  structlin prepare text books/*.txt --out data/books --val-fraction 0.05
      UTF-8 text: tokens of GPT-2 where its vocabulary is available, bytes otherwise
  structlin prepare openwebtext --out data/openwebtext
      from the Hugging Face hub (about 9 billion tokens, 18 GB of files); --dataset for others

The same command resumes an interrupted preparation.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "write text files, each a document, or a data set of Hugging Face, as tokens"
    add(parser, "KIND", about, among=KINDS, what="name")
    add(parser, "FILE", "text: UTF-8 text (without files: Python's documentation)", nargs="*")
    add(parser, "--out DIR", "folder to write", kind=_folder, required=True)
    add(parser, "--pydoc", "text: Python's documentation, the default without files")
    data = parser.add_argument_group("openwebtext")
    add(data, "--dataset NAME", "name on the Hugging Face hub, or a folder (OpenWebText)")
    add(data, "--split NAME", "split of the data set (train)")
    add(data, "--column NAME", "column of the text (text)")
    add(data, "--seed N", "seed of the validation split (2357)", kind=int)
    tokens = parser.add_argument_group("tokens")
    about = "gpt2; auto: bytes where its vocabulary is missing, the default for text"
    add(tokens, "--tokenizer NAME", about, among=("auto", "gpt2", "bytes"))
    add(tokens, "--vocabulary DIR", "folder of encoder.json, vocab.bpe or vocab.json, merges.txt")
    add(tokens, "--val-fraction F", "share for validation (text: 0.1, openwebtext: 0.0005)", kind=float)
    add(tokens, "--name NAME", "name of the corpus in records")
    add(tokens, "--workers N", "number of workers (one for each core)", kind=positive)
    add(parser, "--json", "print the result as JSON")


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, and {text} is a file")
    return Path(text)


def run(arguments: argparse.Namespace) -> None:
    from structlin_nn.data.prepare import prepare_openwebtext, prepare_text

    options = given(arguments, TOKENS)
    if arguments.kind == "openwebtext":
        if arguments.file or arguments.pydoc:
            raise ValueError(f"unrecognized arguments: {' '.join(arguments.file) or '--pydoc'}")
        data = prepare_openwebtext(arguments.out, **options, **given(arguments, OF_DATASETS))
    else:
        if wrong := [*given(arguments, OF_DATASETS)]:
            raise ValueError(f"--{wrong[0]} is an option of openwebtext")
        if arguments.pydoc and arguments.file:
            raise ValueError(f"--pydoc takes no files, got {arguments.file[0]!r}")
        if not (arguments.file or arguments.pydoc):
            print("no file is given: using Python's documentation", file=sys.stderr)
        if arguments.tokenizer in (None, "auto"):
            options["tokenizer"] = _gpt2_or_bytes(arguments.vocabulary)
        data = prepare_text(arguments.file or None, arguments.out, **options)
    record = {name: getattr(data, name) for name in ("name", "tokenizer", "vocab_size")}
    record |= {f"{split}_tokens": len(getattr(data, split)) for split in ("train", "val")}
    record |= {"folder": str(data.folder), "sha256": data.digest}
    show(arguments, record, f"{data!r}, {data.tokenizer} tokens, in {data.folder}")


def _gpt2_or_bytes(vocabulary: str | None) -> str:
    from structlin_nn.data.tokenizers import load_tokenizer

    try:
        load_tokenizer("gpt2", vocabulary)
    except (ImportError, FileNotFoundError) as error:
        if vocabulary is not None:
            raise
        print(f"using bytes as tokens (--tokenizer bytes): {' '.join(str(error).split())}", file=sys.stderr)
        return "bytes"
    return "gpt2"
