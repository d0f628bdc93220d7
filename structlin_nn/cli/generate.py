"""``structlin generate``: text from a trained language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import add, device_of, positive, show

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
    what = "folder of a run of `structlin train gpt2`, file of `structlin compress`, or GPT-2 of transformers"
    add(parser, "MODEL", what)
    add(parser, "--average", "use the average of the weights of a run")
    add(parser, "--prompt TEXT", "text to continue", "")
    add(parser, "--tokens N", "maximum number of new tokens", 100)
    add(parser, "--samples N", "number of continuations", 1, positive)
    add(parser, "--temperature T", "0: the most probable token", 0.8)
    add(parser, "--top-k K", "K most probable tokens; 0: all", 200)
    add(parser, "--top-p P", "nucleus of total probability P", 1.0)
    add(parser, "--endless", "do not stop at the end of the document")
    add(parser, "--seed N", "seed of the draws", 0)
    add(parser, "--device NAME", "cpu, cuda or cuda:N", "cpu")
    add(parser, "--tokenizer NAME", "if not that of the data of the run", among=TOKENIZERS)
    add(parser, "--vocabulary DIR", "folder with the two files of GPT-2's vocabulary")
    add(parser, "--json", "print tokens and texts as JSON")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from structlin_nn.data.tokenizers import load_tokenizer
    from structlin_nn.generate import generate

    device = device_of(arguments.device)
    model, known = _model(arguments)
    name = arguments.tokenizer or known
    if name is None:
        raise ValueError(f"{arguments.model} does not state its tokenizer: give --tokenizer")
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
    samples = [{"text": text, "tokens": row} for text, row in zip(texts, rows, strict=True)]
    record = {"prompt": arguments.prompt, "tokenizer": name, "samples": samples}
    show(arguments, record, f"\n{'-' * 20}\n".join(arguments.prompt + text for text in texts))


def _model(arguments: argparse.Namespace) -> tuple[Any, str | None]:
    """Return the model, and the tokenizer of the data that it was trained on, or None if nothing states it."""
    from structlin_nn.data.tokens import GPT2_VOCABULARY
    from structlin_nn.models import GPT2
    from structlin_nn.records import read_record
    from structlin_nn.trained import open_trained

    trained = open_trained(arguments.model, average=arguments.average)
    if not isinstance(trained.model, GPT2):
        raise ValueError(f"{arguments.model} must hold a GPT-2, got a {type(trained.model).__name__}")
    if trained.config is not None:
        return trained.model, read_record(Path(arguments.model) / "record.jsonl").header["data"].get("tokenizer")
    return trained.model, "gpt2" if trained.model.config.vocabulary >= GPT2_VOCABULARY else None
