"""Text from a language model: sampling with temperature, top-k and nucleus, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn._text import check_integer

__all__ = ["generate", "sample"]


@torch.no_grad()
def generate(
    model: nn.Module | Callable[[Tensor], Any], tokens: Tensor, max_new_tokens: int, *, eos: int | None = None,
    vocab_size: int | None = None, **sampling: Any,
) -> Tensor:  # fmt: skip
    """Continue sequences by one drawn token after the other.

    As in nanoGPT, each token costs a forward pass over the last ``model.config.context`` tokens.

    Parameters
    ----------
    model
        Tokens (batch, length) -> logits (batch, length, vocabulary). It runs in evaluation mode, and keeps the mode
        that it had.
    tokens
        Integers of shape (batch, length), with a length of at least 1: the beginning of each sequence.
    max_new_tokens
        Number of tokens to add.
    eos
        Token that ends a sequence, which is then padded with it. Generation ends when all sequences have ended.
    vocab_size
        Draw only from the tokens below this number, for models whose vocabulary is padded.
    **sampling
        Arguments of :func:`sample`.

    Returns
    -------
    Tensor
        (batch, length + new tokens), int64 on the device of ``tokens``; fewer new tokens if all sequences have ended.

    Examples
    --------
    >>> def counts(tokens: Tensor) -> Tensor:
    ...     return 10.0 * torch.nn.functional.one_hot((tokens + 1) % 7, 7)
    >>> generate(counts, torch.tensor([[4], [1]]), 4, temperature=0)
    tensor([[4, 5, 6, 0, 1],
            [1, 2, 3, 4, 5]])
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be an integer tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must have shape (batch, length), neither 0, got {tuple(tokens.shape)}")
    check_integer("max_new_tokens", max_new_tokens, 0)
    context = getattr(getattr(model, "config", None), "context", None)
    tokens, training = tokens.to(torch.int64), getattr(model, "training", False)
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    if isinstance(model, nn.Module):
        model.eval()
    for _ in range(max_new_tokens):
        logits = model(tokens if context is None else tokens[:, -context:])[:, -1, :vocab_size]
        new = sample(logits, **sampling).to(tokens.device)
        if eos is not None:
            new = torch.where(finished, eos, new)
            finished |= new == eos
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        if bool(finished.all()):
            break
    if isinstance(model, nn.Module):
        model.train(training)
    return tokens


def sample(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Draw one token from each row of logits (..., vocabulary): int64 of shape (...,).

    Parameters
    ----------
    logits
        Unnormalised log-probabilities.
    temperature
        Divides the logits; 0 takes the most probable token (of equal ones, the first).
    top_k
        Draw from this number of most probable tokens.
    top_p
        Draw from the smallest set of most probable tokens whose probability is at least this (nucleus sampling), after
        ``top_k``; above 0, at most 1.
    generator
        Source of the draws, on the device of the logits; None: torch's global one.

    Notes
    -----
    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020 (nucleus sampling).

    Examples
    --------
    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
    tensor([1])
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    logits = logits.float()
    if not bool(torch.isfinite(logits).any(-1).all()) or bool(logits.isnan().any()):
        raise ValueError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, places = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, places, values)
    if top_p is not None and top_p < 1:
        values, places = logits.sort(dim=-1, descending=True, stable=True)
        probability = values.softmax(-1)
        # The probability before a token decides, so the most probable token always stays.
        outside = probability.cumsum(-1) - probability >= top_p
        logits = logits.scatter(-1, places, values.masked_fill(outside, -math.inf))
    rows = logits.softmax(-1).flatten(0, -2)
    return torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1])
