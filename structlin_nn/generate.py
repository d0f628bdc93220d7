"""Text from a language model: sampling with temperature, top-k and nucleus, in batches, with a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["generate", "sample"]


def generate(
    model: nn.Module | Callable[[Tensor], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue sequences, one token after the other, each drawn from the model's distribution of the next.

    A `structlin_nn.models.GPT2` keeps the keys and values of the tokens seen, so that a new token costs one forward
    pass of length 1; beyond the model's context (or for another model) each token costs a whole pass, over the last
    ``context`` tokens. The results are the same up to rounding.

    Args:
        model: tokens (batch, length) -> logits (batch, length, vocabulary). It is evaluated in evaluation mode,
            without gradients, and left in the mode it had. Longest input: ``model.config.context``, where that is.
        tokens: (batch, length) of an integer dtype, length at least 1: what is continued.
        max_new_tokens: how many tokens to add.
        temperature: divides the logits; 0 takes the most probable token (of equal ones, the first).
        top_k: draw from so many most probable tokens only.
        top_p: draw from the smallest set of most probable tokens whose probability is at least this (nucleus
            sampling), after ``top_k``; above 0, at most 1.
        generator: source of the draws, on the device of the logits; None: torch's global one.
        eos: a sequence that has drawn this token is finished, and filled up with it; when all are, generation ends.
        vocab_size: draw from the tokens below this only, where a model has more for the sake of its speed.
        use_cache: keep keys and values, where the model can.

    Returns:
        (batch, length + new tokens), int64 on the device of ``tokens``; fewer new tokens than asked for only where
        all sequences ended.

    Raises:
        TypeError, ValueError: arguments of another type or out of range.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020 (nucleus sampling).

    Example:
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
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("vocab_size", vocab_size)):
        least = 0 if name == "max_new_tokens" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    _check_sampling(temperature, top_p)
    context = getattr(getattr(model, "config", None), "context", None)
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    make_cache = getattr(model, "make_cache", None) if use_cache else None
    try:
        with torch.inference_mode():
            found = _continue(
                model, tokens.to(torch.int64), max_new_tokens, context, make_cache, eos, vocab_size,
                {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator},
            )  # fmt: skip
    finally:
        if was_training:
            model.train()  # type: ignore[union-attr]
    return found.clone()


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token from each row of logits (..., vocabulary): int64 (...,). Arguments as in `generate`.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
    tensor([1])
    """
    _check_sampling(temperature, top_p)
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
        # What comes before a token decides: the most probable one always stays.
        outside = probability.cumsum(-1) - probability >= top_p
        logits = logits.scatter(-1, places, values.masked_fill(outside, -math.inf))
    rows = logits.softmax(-1).flatten(0, -2)
    return torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1])


def _continue(
    model: Any,
    tokens: Tensor,
    count: int,
    context: int | None,
    make_cache: Callable[[], Any] | None,
    eos: int | None,
    vocab_size: int | None,
    sampling: dict[str, Any],
) -> Tensor:
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    cache, seen = None, 0
    if make_cache is not None and context is not None and tokens.shape[1] <= context:
        cache = make_cache()
    for _ in range(count):
        if cache is not None and tokens.shape[1] <= context:
            logits = model(tokens[:, seen:], cache=cache)
            seen = tokens.shape[1]
        else:
            # Positions move with the window, so nothing that was kept fits any more.
            cache = None
            logits = model(tokens if context is None else tokens[:, -context:])
        logits = logits[:, -1]
        if vocab_size is not None:
            logits = logits[:, :vocab_size]
        new = sample(logits, **sampling).to(tokens.device)
        if eos is not None:
            new = torch.where(finished, eos, new)
            finished = finished | (new == eos)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        if eos is not None and bool(finished.all()):
            break
    return tokens


def _check_sampling(temperature: float, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
