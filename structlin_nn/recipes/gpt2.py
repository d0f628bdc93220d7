"""GPT-2 on token files, dense or structured: the loop of nanoGPT (Karpathy, https://github.com/karpathy/nanoGPT).

    structlin train gpt2 --data DIR --structure block_tensor_train --width 1024 --heads 16

The model has normalised queries and keys, and by default no biases and an untied head (Qiu et al., *Compute Better
Spent*, ICML 2024, section 5). To change the loss, the data or the model, copy this file; `train` also takes a model and
tokens of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data import TokenData, evaluation_batches, open_tokens, token_batch
from structlin_nn.data.tokens import GPT2_VOCABULARY, IGNORE, token_vocabulary
from structlin_nn.models import StructureConfig, build_model
from structlin_nn.models.named import build_named
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.recipes._processes import ALONE, processes
from structlin_nn.recipes._run import Options, Result
from structlin_nn.recipes._torch import TorchRun, count_run, on_device

__all__ = ["Config", "Options", "build", "plan", "train"]

PROBE_SEED = 2**31 - 1
"""Seed of the four pieces of training tokens on which features and gains are measured."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The configuration of a run of GPT-2, which with the tokens determines its result.

    The defaults are the paper's: 600,000 steps of 480 sequences of 512 tokens. What the paper does not state is as in
    nanoGPT: learning rate and its schedule, betas, clipping, and a weight decay of 0.1 of all matrices, embeddings
    too.

    Examples
    --------
    >>> Config(width=128, heads=2, context=64, steps=100, warmup_steps=10).batch_size
    480
    """

    task: ClassVar[str] = "gpt2"
    named: ClassVar[tuple[str, ...]] = ("gpt2",)
    sizes: ClassVar[tuple[str, ...]] = (
        "depth", "heads", "head_dim", "expansion", "base_expansion", "qk_norm", "attention_scale", "bias", "tied",
        "gelu",
    )  # fmt: skip
    unit: ClassVar[str] = "seq"
    capped: ClassVar[bool] = True
    paper_options: ClassVar[Mapping[str, Any]] = {
        "gpt2": {"block_tensor_train": {"rank": 4, "factorization": "greedy"}}
    }

    model: str = "gpt2"  # gpt2, hf:CONFIG, or package.module:function of a width
    width: int = 768  # width of the model
    base_width: int = 768  # width at which the learning rate was tuned
    base_expansion: int = 0  # expansion of that model, 0: this one's; the paper's is 1 and quarters the rate of `down`
    depth: int = 12  # number of blocks
    heads: int = 12  # heads of the attention
    head_dim: int = 0  # size of a head, 0: width // heads
    context: int = 512  # tokens in a sequence
    vocabulary: int = 0  # number of tokens of the model; 0 for that of the data, rounded up to a multiple of 64
    expansion: int = 4  # width of the feed-forward layers, as a multiple of the width
    qk_norm: bool = True  # normalise queries and keys
    attention_scale: float = 0.0  # factor on the attention logits, 0: 8 / head_dim
    bias: bool = False  # biases in all linear layers but the head, and in the norms
    tied: bool = False  # the token embedding is the head, which then is not structured
    gelu: Literal["none", "tanh"] = "none"  # GELU, exact or in the tanh approximation
    layers: Literal["all", "all_but_last"] = "all"  # which linear layers are structured
    batch_size: int = 480  # sequences of a step, of all processes and parts together
    steps: int = 600_000  # steps of the run
    warmup_steps: int = 2000  # steps of linear warm-up
    lr: float = 6e-4  # learning rate of the dense model at base width
    final_lr: float = 0.1  # where the cosine ends, as a share of the learning rate
    optimizer: Literal["adam", "adamw", "muon"] = "adamw"  # muon: Muon for matrices, AdamW at adam_lr for the rest
    weight_decay: float = 0.1  # decoupled decay of factors and weights
    decay_embeddings: bool = True  # decay embeddings too, as nanoGPT does
    betas: tuple[float, float] = (0.9, 0.95)  # decay rates of Adam's two moments
    clip: float = 1.0  # largest norm of all gradients together, 0 for no clipping
    eval_every: int = 1000  # steps from one evaluation to the next
    eval_sequences: int = 2048  # sequences of the training and of the validation tokens that are evaluated
    whole_validation: bool = False  # evaluate on all validation tokens instead

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "depth", "heads", "context", "expansion", "steps", "eval_every", "eval_sequences")
        self._at_least(0, "head_dim", "vocabulary", "warmup_steps", "attention_scale", "base_expansion")
        require(self.warmup_steps < self.steps, f"warmup_steps must be less than steps, got {self.warmup_steps}")
        require(not self.model.startswith("timm:"), "timm has no language models")
        fits = self.head_dim > 0 or self.heads <= self.width or not self.is_named
        require(fits, f"width {self.width} is smaller than the number of heads {self.heads}; pass head_dim")


def build(config: Config, vocabulary: int) -> nn.Module:
    """Return the model of a configuration: tokens (batch, length) to logits (batch, length, vocabulary)."""
    structure = StructureConfig(config.structure, config.options, config.layers, bool(config.rms_cap), config.rule)
    if not config.is_named:
        model = build_named(
            config.model, vocabulary, structure, width=config.width, size_of_outputs="vocab_size",
            **config.model_options,
        )  # fmt: skip
        longest = getattr(getattr(getattr(model, "model", None), "config", None), "max_position_embeddings", None)
        require(longest is None or config.context <= longest, f"{config.model} takes {longest} tokens at most")
        return model
    names = ("depth", "heads", "context", "expansion", "qk_norm", "bias", "tied", "gelu")
    sizes = {name: getattr(config, name) for name in names}
    sizes |= {name: getattr(config, name) or None for name in ("head_dim", "attention_scale")}
    return build_model("gpt2", width=config.width, structure=structure, vocabulary=vocabulary, **sizes)


def plan(config: Config, options: Options) -> tuple[int, int, dict[str, int]]:
    """Return (vocabulary, steps, counts) of a run before it starts (`structlin_nn.recipes._torch.count_run`)."""
    vocabulary = vocabulary_of(config, GPT2_VOCABULARY if options.data is None else token_vocabulary(options.data))
    sample = torch.zeros(1, config.context, dtype=torch.int64)
    return vocabulary, config.steps, count_run(build, config, vocabulary, config.steps, sample)


def decayed(config: Config) -> tuple[str, ...]:
    return ("factor", "weight", "embedding") if config.decay_embeddings else ("factor", "weight")


def vocabulary_of(config: Config, size: int) -> int:
    known = config.vocabulary or -(-size // 64) * 64
    require(known >= size, f"vocabulary {known} is smaller than that of the data, {size}")
    return known


def train(
    config: Config, options: Options, *, build: Callable[[Config, int], nn.Module] = build,
    data: TokenData | None = None, watch: Any = None,
) -> Result:  # fmt: skip
    """Train a model, or resume a run from its last checkpoint.

    Parameters
    ----------
    config, watch
        As `structlin_nn.recipes.cifar.train`, whose results and errors are those of this function too.
    options
        Files and output; `options.data` is a folder with ``train.bin`` and ``val.bin``, as ``structlin
        prepare`` and nanoGPT write them.
    build
        (configuration, vocabulary) to a model of your own, in place of GPT-2.
    data
        Tokens of your own, in place of `options.data`.
    """
    with processes(config.device, options.parallel) as group, TorchRun(config, options, group, watch) as run:
        size = group.part_size(config)

        # Tokens: a batch is a function of them, the seed and the number of the step. The first process verifies them.
        if data is None:
            folder = options.needs("a folder with train.bin and val.bin")
            digest = group.first(lambda: open_tokens(folder).digest)
            data = open_tokens(folder, digest=digest)
        vocabulary = vocabulary_of(config, data.vocab_size)

        def tokens(step: int) -> tuple[Tensor, Tensor]:
            x, y = token_batch(data.train, block_size=config.context, batch_size=config.batch_size, seed=config.seed,
                               step=step, rank=group.rank, world_size=group.size)  # fmt: skip
            return on_device(x, run.device), on_device(y, run.device)

        def evaluated(tokens: Any, sequences: int | None) -> Iterable[tuple[Tensor, Tensor]]:
            for x, y in evaluation_batches(tokens, block_size=config.context, batch_size=size * group.size,
                                           sequences=sequences, rank=group.rank, world_size=group.size):  # fmt: skip
                yield on_device(x, run.device), on_device(y, run.device)

        # Model and optimiser: learning rates relative to the dense model at base width.
        run.make_model(build, vocabulary)
        x, _ = token_batch(data.train, block_size=config.context, batch_size=4, seed=PROBE_SEED, step=0)
        optimizer = run.start(
            build, vocabulary, steps=config.steps, warmup=config.warmup_steps, sums=2, sample=torch.from_numpy(x[:1]),
            probe=on_device(x, run.device), data=described(data), decay=decayed(config),
        )  # fmt: skip

        def evaluate() -> None:
            with run.evaluation():
                train_loss, _ = token_loss(run.call, evaluated(data.train, config.eval_sequences), run.device, group)
                sequences = None if config.whole_validation else config.eval_sequences
                val_loss, val_tokens = token_loss(run.call, evaluated(data.val, sequences), run.device, group)
                found, told = evaluation(config, run.step, train_loss, val_loss, val_tokens, run.sums.tolist())
            run.evaluated(found, told, metric="val_loss")

        # One step: the parts of this process's share of the batch, then the optimiser.
        for _ in run.training(evaluate, config.eval_every):
            run.set_rates()
            optimizer.zero_grad(set_to_none=True)
            losses = list[Tensor]()
            inputs, targets = tokens(run.step)
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                with run.sync(last=len(losses) == config.accumulate - 1):
                    with run.autocast():
                        loss = F.cross_entropy(run.forward(x).flatten(0, 1), y.flatten())
                    run.scaler.scale(loss / config.accumulate).backward()
                losses.append(loss)
            norm = run.gradient_norm()
            run.update()
            loss, _ = run.mean_and_sum(losses)
            run.stepped(loss, norm, torch.stack([loss, torch.ones_like(loss)]))
        return run.result()


@torch.no_grad()
def token_loss(
    call: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], device: Any = "cpu", group: Any = ALONE
) -> tuple[float, int]:
    """Return the mean cross-entropy in nats over all targets of all processes, and the number of these targets.

    All targets have the same weight, but those of `IGNORE`, which do not count.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for x, y in batches:
        logits = call(x).flatten(0, 1).float()
        total[0] += F.cross_entropy(logits, y.flatten(), reduction="sum", ignore_index=IGNORE).double()
        total[1] += (y != IGNORE).sum()
    loss, number = group.sum(total).tolist()
    require(number > 0, "there are no tokens to evaluate")
    return loss / number, int(number)


def evaluation(
    config: Config, step: int, train_loss: float, val_loss: float, val_tokens: int, sums: Sequence[float]
) -> tuple[dict[str, Any], str]:
    """Return an evaluation as the record has it, and in a line."""
    found = {
        "tokens": step * config.batch_size * config.context, "train_loss": train_loss, "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss), "val_tokens": val_tokens,
        "batch_loss": sums[0] / sums[1] if sums[1] else None,
    }  # fmt: skip
    return found, f"step {step:>6} of {config.steps}  loss: train {train_loss:.4f}, validation {val_loss:.4f}"


def perplexity(loss: float) -> float | None:
    """``exp`` of a mean loss in nats; None where float64 cannot hold it, from 709 nats on."""
    return math.exp(loss) if loss < 709 else None


def described(data: TokenData) -> dict[str, Any]:
    return {
        "name": data.name, "train_tokens": len(data.train), "val_tokens": len(data.val), "vocabulary": data.vocab_size,
        "tokenizer": data.tokenizer, "sha256": data.digest,
    }  # fmt: skip
