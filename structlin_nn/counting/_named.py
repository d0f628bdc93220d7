"""Counts of the named models, as a record and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from structlin_nn.models import MODELS, StructureConfig, base_model, build_model
from structlin_nn.torch import StructuredLinear, parameter_groups
from structlin_nn.torch.counting import CallCount, count


def count_model(
    name: str,
    *,
    width: int,
    base_width: int | None = None,
    structure: str = "dense",
    rank: int | Sequence[int] | None = None,
    rank_fraction: float | None = None,
    blocks: int | None = None,
    factorization: str | None = None,
    options: Mapping[str, Any] | None = None,
    rms_cap: bool = False,
    rule: str = "paper",
    layers: str | None = None,
    optimizer: str = "adam",
    num_classes: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Count one of :data:`structlin_nn.models.MODELS`, for one sample (GPT-2: one sequence of full length).

    Args:
        name: ``cifar-mlp``, ``cifar-vit``, ``imagenet-vit`` or ``gpt2``.
        width: features of the residual stream.
        base_width: width at which the learning rate was tuned; default: the paper's.
        structure: a registered name.
        rank, rank_fraction, blocks, factorization: options of the structure; None: its default.
        options: further options of the structure, by name.
        rms_cap, rule, layers: as in :class:`structlin_nn.models.StructureConfig`.
        optimizer: whose learning-rate multipliers to list (:func:`structlin.lr_multipliers`).
        num_classes, heads, head_dim: sizes of the model; None: the named model's.
        **sizes: further sizes (``MODELS[name].options``).

    Returns:
        A record that ``json.dumps`` takes. ``forward_macs`` and ``training_macs`` (forward and backward) are MACs;
        ``attention_macs`` (scores and values) and ``head_macs`` are parts of ``forward_macs``, ``embedding_params``
        is a part of ``trainable_params``. ``layers`` lists every linear layer, in order, with its factors in the
        order in which they are applied; ``params`` includes bias and gains. ``other_params`` lists the rest, so
        that the ``params`` of the layers and the sizes of ``other_params`` add up to ``trainable_params``.
        ``uncounted_ops`` names operations that are no products, and how often they run.

    Raises:
        ValueError: unknown model, structure, preset or size; an option that the structure or model does not have;
            sizes that do not fit.

    >>> record = count_model("cifar-mlp", width=128, structure="block_tensor_train", rank=1, factorization="greedy")
    >>> record["trainable_params"], record["forward_macs"], len(record["layers"])
    (96266, 93440, 8)
    >>> record["layers"][0]["factors"][1]["lr_multiplier"]
    1.6
    """
    given = {"rank": rank, "rank_fraction": rank_fraction, "blocks": blocks, "factorization": factorization}
    chosen = {key: value for key, value in given.items() if value is not None}
    if twice := chosen.keys() & (options or {}):
        raise ValueError(f"options {', '.join(sorted(twice))} are given twice")
    config = StructureConfig(structure, {**chosen, **(options or {})}, layers=layers, rms_cap=rms_cap, rule=rule)
    named = {"num_classes": num_classes, "heads": heads, "head_dim": head_dim}
    sizes |= {key: value for key, value in named.items() if value is not None}

    model = build_model(name, width=width, structure=config, device="meta", **sizes)
    base = base_model(name, base_width, **sizes)
    spec = MODELS[name]
    groups = parameter_groups(model, base, lr=1.0, optimizer=optimizer, extra_multipliers=spec.extra_multipliers)
    multipliers = {n: group["multiplier"] for group in groups for n in group["names"]}
    counted = count(model, model.example_input(device="meta"))
    calls = {call.name: call for call in counted.calls if call.kind == "linear"}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    owned = {id(p) for m in linear.values() for p in m.parameters()}
    rows = [_layer(calls[n], m, multipliers) for n, m in linear.items()]
    return {
        "model": name,
        "structure": structure,
        "options": dict(config.options),
        "layers_preset": layers or spec.layers,
        "rms_cap": rms_cap,
        "rule": rule,
        "optimizer": optimizer,
        "width": width,
        "base_width": base.config.width,
        "sizes": {key: getattr(model.config, key) for key in spec.options},
        "trainable_params": counted.trainable_params,
        "embedding_params": counted.embedding_params,
        "head_params": rows[-1]["params"],
        "forward_macs": counted.macs(),
        "attention_macs": counted.macs("attention"),
        "head_macs": rows[-1]["macs"],
        "training_macs": counted.training_macs,
        "other_flops": counted.other_flops,
        "tokens": max(row["rows"] for row in rows),
        "layers": rows,
        "attention": [{"name": c.name, "macs": c.macs} for c in counted.calls if c.kind == "attention"],
        "other_params": [
            {"name": n, "shape": list(p.shape), "lr_multiplier": multipliers[n]}
            for n, p in model.named_parameters()
            if id(p) not in owned
        ],
        "uncounted_ops": counted.uncounted_ops,
    }


def _layer(call: CallCount, layer: StructuredLinear, multipliers: Mapping[str, float]) -> dict[str, Any]:
    factors = [(f, std) for f, std in zip(layer.structure.factors, layer.init_std, strict=True) if f.trainable]
    return {
        "name": call.name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "params": call.params,
        "macs": call.macs,
        "rows": call.rows,
        "bias": layer.bias is not None,
        "gains": 0 if layer.gains is None else len(layer.gains),
        "factors": [
            {
                "numel": f.numel,
                "fan_in": f.fan_in,
                "fan_out": f.fan_out,
                "blocks": f.blocks,
                "init_std": std,
                "lr_multiplier": multipliers[f"{call.name}.factors.{number}"],
            }
            for number, (f, std) in enumerate(factors)
        ],
    }


def format_count(record: Mapping[str, Any]) -> str:
    """A record of :func:`count_model` as a table to read.

    >>> print(format_count(count_model("cifar-mlp", width=64, depth=1)))  # doctest: +ELLIPSIS
    cifar-mlp, width 64 (base 64), dense
    ...
    """
    options = "".join(f" {key}={value}" for key, value in record["options"].items())
    cap = ", RMS-capped" if record["rms_cap"] else ""
    lines = [
        f"{record['model']}, width {record['width']} (base {record['base_width']}), {record['structure']}{options}"
        f"{cap}",
        "",
    ]
    table = [("layer", "in", "out", "params", "MACs", "factor", "numel", "fan in", "fan out", "blocks", "init std",
              f"lr ({record['optimizer']})")]  # fmt: skip
    for layer in record["layers"]:
        head = (layer["name"], *(f"{layer[key]:,}" for key in ("in_features", "out_features", "params", "macs")))
        for number, f in enumerate(layer["factors"]):
            cells = (str(number), *(f"{f[key]:,}" for key in ("numel", "fan_in", "fan_out", "blocks")))
            scale = (f"{f['init_std']:.4g}", f"{f['lr_multiplier']:.4g}")
            table.append((*(head if number == 0 else ("",) * 5), *cells, *scale))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines += [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    totals = (
        ("trainable parameters", "trainable_params"),
        ("  of them embeddings", "embedding_params"),
        ("  of them head", "head_params"),
        ("forward MACs, one sample", "forward_macs"),
        ("  of them attention", "attention_macs"),
        ("  of them head", "head_macs"),
        ("training MACs, one sample", "training_macs"),
        ("other FLOPs of structures", "other_flops"),
    )
    lines += ["", *(f"{label:<28}{record[key]:>18,}" for label, key in totals)]
    uncounted = ", ".join(f"{name} x{number}" for name, number in record["uncounted_ops"].items())
    return "\n".join([*lines, f"not counted (no products): {uncounted}"])
