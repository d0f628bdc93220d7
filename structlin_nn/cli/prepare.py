"""``structlin prepare``: write token files for training. Each kind calls one function of `structlin_nn.data`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import Parser, add_choice, given, positive, print_json

HELP = "write text files or OpenWebText as token files"
TOKENS = ("tokenizer", "vocabulary", "val_fraction", "name", "workers")
EXAMPLES = """\
examples:
  structlin prepare text --out data/pydoc
      the documentation that is part of Python, a corpus without a download
  structlin prepare text books/*.txt --out data/books --val-fraction 0.05
      UTF-8 text: tokens of GPT-2 where its vocabulary is available, bytes otherwise
  structlin prepare openwebtext --out data/openwebtext
      from the Hugging Face hub (about 9 billion tokens, 18 GB of files); --dataset for others

structlin prepare KIND --help lists the options of a kind. The same command resumes an interrupted preparation.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=Parser)

    def kind(name: str, work: Callable[[argparse.Namespace], int], about: str) -> Any:
        made = kinds.add_parser(name, help=about, description=about)
        made.set_defaults(work=work)
        made.add_argument("--out", metavar="DIR", type=_folder, required=True, help="folder to write")
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        return made

    def tokens(made: Any, names: tuple[str, ...], fraction: float) -> None:
        add_choice(made, "--tokenizer", names, names[0])
        made.add_argument(
            "--vocabulary", metavar="DIR", help="folder of encoder.json, vocab.bpe or vocab.json, merges.txt"
        )
        made.add_argument(
            "--val-fraction", type=float, default=fraction, metavar="F", help=f"share for validation ({fraction})"
        )
        made.add_argument("--name", metavar="NAME", help="name of the corpus in records")
        made.add_argument("--workers", type=positive, metavar="N", help="number of workers (one for each core)")

    text = kind("text", _text, "write text files, each a document, as tokens")
    text.add_argument("sources", metavar="FILE", nargs="*", help="UTF-8 text (without files: Python's documentation)")
    text.add_argument("--pydoc", action="store_true", help="Python's documentation, the default without files")
    tokens(text, ("auto", "gpt2", "bytes"), 0.1)
    owt = kind("openwebtext", _openwebtext, "write OpenWebText, or another data set of Hugging Face, as tokens")
    owt.add_argument("--dataset", metavar="NAME", help="name on the Hugging Face hub, or a folder")
    owt.add_argument("--split", metavar="NAME", default="train", help="split of the data set (train)")
    owt.add_argument("--column", metavar="NAME", default="text", help="column of the text (text)")
    owt.add_argument("--seed", type=int, default=2357, metavar="N", help="seed of the validation split (2357)")
    tokens(owt, ("gpt2", "bytes"), 0.0005)


def run(arguments: argparse.Namespace) -> int:
    return arguments.work(arguments)


def _text(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.prepare import prepare_text
    from structlin_nn.data.tokenizers import load_tokenizer

    if arguments.pydoc and arguments.sources:
        raise ValueError(f"--pydoc takes no files, got {arguments.sources[0]!r}")
    if not (arguments.sources or arguments.pydoc):
        print("no file is given: using Python's documentation", file=sys.stderr)
    options = given(arguments, TOKENS)
    if options["tokenizer"] == "auto":
        options["tokenizer"] = "gpt2"
        try:
            load_tokenizer("gpt2", arguments.vocabulary)
        except (ImportError, FileNotFoundError) as error:
            if arguments.vocabulary is not None:
                raise
            print(f"using bytes as tokens (--tokenizer bytes): {' '.join(str(error).split())}", file=sys.stderr)
            options["tokenizer"] = "bytes"
    return _tell(arguments, prepare_text(arguments.sources or None, arguments.out, **options))


def _openwebtext(arguments: argparse.Namespace) -> int:
    from structlin_nn.data.prepare import prepare_openwebtext

    options = given(arguments, ("dataset", "split", "column", "seed", *TOKENS))
    return _tell(arguments, prepare_openwebtext(arguments.out, **options))


def _tell(arguments: argparse.Namespace, data: Any) -> int:
    if arguments.json:
        told = {name: getattr(data, name) for name in ("name", "tokenizer", "vocab_size")}
        sizes = {f"{split}_tokens": len(getattr(data, split)) for split in ("train", "val")}
        print_json({**told, **sizes, "folder": str(data.folder), "sha256": data.digest})
    else:
        print(f"{data!r}, {data.tokenizer} tokens, in {data.folder}")
    return 0


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, and {text} is a file")
    return Path(text)
