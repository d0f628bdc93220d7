"""``structlin generate``: text from a trained language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import add_choice, device_of, print_json

TOKENIZERS = ("gpt2", "bytes")
HELP = "continue a text with a trained GPT-2"
EXAMPLES = """\
examples:
  structlin generate runs/gpt2 --prompt Generators
      with a run of `structlin train gpt2`
  structlin generate runs/gpt2 --samples 3 --tokens 200 --temperature 1 --top-k 0 --top-p 0.95
  structlin generate path/to/gpt2 --vocabulary path/to/gpt2 --prompt Once --temperature 0
      with published weights: a folder with config.json and model.safetensors
  structlin generate small.safetensors --prompt Once
      with a file of `structlin compress`

An empty prompt starts a new document. The same seed gives the same text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="MODEL",
        help="folder of a run of `structlin train gpt2`, file of `structlin compress`, or GPT-2 of transformers",
    )  # fmt: skip
    parser.add_argument("--average", action="store_true", help="use the average of the weights of a run")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="maximum number of new tokens (100)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="number of continuations (1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the most probable token (0.8)")
    parser.add_argument("--top-k", type=int, default=200, metavar="K", help="K most probable tokens; 0: all (200)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus of total probability P (1)")
    parser.add_argument("--endless", action="store_true", help="do not stop at the end of the document")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (0)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N (cpu)")
    add_choice(parser, "--tokenizer", TOKENIZERS, about="if not that of the data of the run")
    parser.add_argument("--vocabulary", metavar="DIR", help="folder with the two files of GPT-2's vocabulary")
    parser.add_argument("--json", action="store_true", help="print tokens and texts as JSON")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from structlin_nn.data.tokenizers import load_tokenizer
    from structlin_nn.generate import generate

    if arguments.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {arguments.samples}")
    device = device_of(arguments.device)
    model, known = _model(arguments)
    name = arguments.tokenizer or known
    if name is None:
        raise ValueError(f"{arguments.source} does not state its tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(name, arguments.vocabulary)
    if model.config.vocabulary < tokenizer.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocabulary} tokens, but the tokenizer {name} has {tokenizer.vocab_size}; "
            "pass the tokenizer of its training"
        )
    prompt = tokenizer.encode(arguments.prompt) or [tokenizer.end_of_text]
    found = generate(
        model.to(device), torch.tensor([prompt] * arguments.samples, device=device), arguments.tokens,
        temperature=arguments.temperature, top_k=arguments.top_k or None, top_p=arguments.top_p,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        eos=None if arguments.endless else tokenizer.end_of_text, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    rows = [row[len(prompt) :] for row in found.tolist()]
    if not arguments.endless:
        rows = [row[: row.index(tokenizer.end_of_text)] if tokenizer.end_of_text in row else row for row in rows]
    texts = [tokenizer.decode(row) for row in rows]
    if arguments.json:
        samples = [{"text": text, "tokens": row} for text, row in zip(texts, rows, strict=True)]
        print_json({"prompt": arguments.prompt, "tokenizer": name, "samples": samples})
    else:
        print(f"\n{'-' * 20}\n".join(arguments.prompt + text for text in texts))
    return 0


def _model(arguments: argparse.Namespace) -> tuple[Any, str | None]:
    """Return the model, and the tokenizer of the data that it was trained on, or None if nothing states it."""
    from structlin_nn.data.tokens import GPT2_VOCABULARY
    from structlin_nn.models import GPT2
    from structlin_nn.records import read_record
    from structlin_nn.trained import open_trained

    trained = open_trained(arguments.source, average=arguments.average)
    if not isinstance(trained.model, GPT2):
        raise ValueError(f"{arguments.source} must hold a GPT-2, got a {type(trained.model).__name__}")
    if trained.config is not None:
        return trained.model, read_record(Path(arguments.source) / "record.jsonl").header["data"].get("tokenizer")
    return trained.model, "gpt2" if trained.model.config.vocabulary >= GPT2_VOCABULARY else None
