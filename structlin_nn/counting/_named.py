"""Counts of named models, as a record and as a table, with the predicted cost of their layers on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import structlin
from structlin.execution.choice import Problem
from structlin.execution.devices import Device
from structlin.structure import Structure
from structlin_nn._text import check_integer, occurrences, table
from structlin_nn.counting._costs import count_loss, roofline, training_bytes
from structlin_nn.counting._costs import device as find_device
from structlin_nn.models import GPT2, MLP, MODELS, StructureConfig, ViT, base_model, build_model
from structlin_nn.torch import StructuredLinear, parameter_groups
from structlin_nn.torch.counting import CallCount, ModelCount, count
from structlin_nn.torch.counting._result import format_unknown

SIZES = ("num_classes", "heads", "head_dim")  # None is that of the named model
_TOTALS = (
    "trainable_params", "embedding_params", "training_macs", "recomputed_macs", "other_flops", "training_other_flops",
)  # fmt: skip


def count_model(
    name: str,
    *,
    width: int,
    base_width: int | None = None,
    structure: str = "dense",
    options: Mapping[str, Any] | None = None,
    rms_cap: bool = False,
    rule: str = "paper",
    layers: str | None = None,
    optimizer: str = "adam",
    batch_size: int | None = None,
    steps: int | None = None,
    dtype: str = "float32",
    activation_dtype: str | None = None,
    device: str | Device | None = None,
    causal_discount: bool = False,
    flash_backward: bool = False,
    strict: bool = False,
    zero_stage: int = 0,
    devices: int = 1,
    **sizes: Any,
) -> dict[str, Any]:
    """Count a model of :data:`structlin_nn.models.MODELS` for one sample (GPT-2: one sequence of full length).

    Parameters
    ----------
    name, width
        As in :func:`structlin_nn.models.build_model`.
    base_width
        Width at which the learning rate was tuned; default: that of the paper.
    structure, options
        Registered name of a structure, and its options by name.
    rms_cap, rule, layers
        As in :class:`structlin_nn.models.StructureConfig`.
    optimizer
        Optimizer of the learning-rate multipliers (:func:`structlin.lr_multipliers`).
    batch_size, steps
        Samples in a step (default 1 for bytes and times), and steps of a training run, for its total.
    dtype, activation_dtype
        Dtype of weights, gradients and states, and of activations and products (mixed precision; default ``dtype``).
    device
        Add the least time on a device of :data:`DEVICES`, or on ``cpu``, which is measured.
    causal_discount, flash_backward, strict
        As in :func:`count`.
    zero_stage, devices
        As in :func:`training_bytes`; the batch is that of one device.
    **sizes
        Sizes of the model (``MODELS[name].options``), such as ``num_classes``; None: the named model's.

    Returns
    -------
    dict[str, Any]
        A record that ``json.dumps`` accepts, with these entries among others:

        - ``forward_macs`` and ``training_macs`` (forward and backward). ``attention_macs`` (scores and values) and
          ``head_macs`` are parts of ``forward_macs``.
        - ``other_flops`` (forward) and ``training_other_flops``: FLOPs that are not MACs.
        - ``layers``: every linear layer with its factors in the order of application. ``params`` includes bias and
          gains, and ``intensity`` is in FLOPs per byte.
        - ``other_params``: all other parameters. Their sizes and the ``params`` of the layers sum to
          ``trainable_params``, of which ``embedding_params`` is a part.
        - ``per_token``: forward MACs and training FLOPs of a sample over its ``tokens``.
        - ``bytes``: those of a training step (:func:`training_bytes`).
        - ``run``: training FLOPs of a step and, with ``steps``, of the run.
        - ``roofline``: least seconds (:class:`Roofline`).
        - ``traffic``: on a GPU, the predicted fastest way of each structured layer, with its kernels, bytes and seconds
          (:mod:`structlin.execution.traffic`).
        - ``uncounted_ops`` and ``unknown_ops``: as in :class:`ModelCount`.

    Raises
    ------
    ValueError
        For an unknown model, structure, preset, size, option, dtype or device; if sizes do not match; for ``steps``
        without ``batch_size``; with ``strict``, for unknown operations.

    Examples
    --------
    >>> options = {"rank": 1, "factorization": "greedy"}
    >>> record = count_model("cifar-mlp", width=128, structure="block_tensor_train", options=options)
    >>> record["trainable_params"], record["forward_macs"], len(record["layers"])
    (96266, 93440, 8)
    >>> record["layers"][0]["factors"][1]["lr_multiplier"]
    1.6
    """
    config = StructureConfig(structure, options or {}, layers=layers, rms_cap=rms_cap, rule=rule)
    sizes = {key: value for key, value in sizes.items() if value is not None or key not in SIZES}
    for key, value in (("batch_size", batch_size), ("steps", steps)):
        if value is not None:
            check_integer(key, value)
    if steps is not None and batch_size is None:
        raise ValueError("steps need a batch size")
    batch = batch_size or 1
    model = build_model(name, width=width, structure=config, device="meta", **sizes)
    base = base_model(name, base_width, **sizes)
    spec = MODELS[name]
    groups = parameter_groups(model, base, lr=1.0, optimizer=optimizer, extra_multipliers=spec.extra_multipliers)
    multipliers = {n: group["multiplier"] for group in groups for n in group["names"]}
    how: dict[str, Any] = {"causal_discount": causal_discount, "flash_backward": flash_backward, "strict": strict}
    setting: dict[str, Any] = {"optimizer": optimizer, "dtype": dtype, "zero_stage": zero_stage, "devices": devices}
    products = activation_dtype or dtype
    counted = count(model, model.example_input(device="meta"), **how)
    step = counted if batch == 1 else count(model, model.example_input(batch, device="meta"), **how)
    calls = {call.name: call for call in counted.calls if call.kind == "linear"}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    owned = {id(p) for m in linear.values() for p in m.parameters()}
    rows = [_layer(calls[n], m, multipliers, batch, products) for n, m in linear.items()]
    tokens = max(row["rows"] for row in rows)
    record = {
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
        **{key: getattr(counted, key) for key in _TOTALS},
        "head_params": rows[-1]["params"],
        "forward_macs": counted.macs(),
        "attention_macs": counted.macs("attention"),
        "head_macs": rows[-1]["macs"],
        "tokens": tokens,
        "per_token": {"forward_macs": counted.macs() / tokens, "training_flops": counted.training_flops / tokens},
        "bytes": {
            "batch_size": batch,
            "dtype": dtype,
            "activation_dtype": products,
            **training_bytes(step, loss=loss_of(model, batch), activation_dtype=activation_dtype, **setting),
            "zero_stage": zero_stage,
            "devices": devices,
        },
        "layers": rows,
        "attention": [{"name": c.name, "macs": c.macs} for c in counted.calls if c.kind == "attention"],
        "other_params": [
            {"name": n, "shape": list(p.shape), "lr_multiplier": multipliers[n]}
            for n, p in model.named_parameters()
            if id(p) not in owned
        ],
        "uncounted_ops": counted.uncounted_ops,
        "unknown_ops": counted.unknown_ops,
    }
    if batch_size is not None:
        record["run"] = {"batch_size": batch, "training_flops_per_step": step.training_flops}
        if steps is not None:
            record["run"] |= {
                "steps": steps, "samples": steps * batch, "tokens": steps * batch * tokens,
                "training_flops": step.training_flops * steps,
            }  # fmt: skip
    if device is not None:
        on = find_device(device, products) if isinstance(device, str) else device
        shares = devices if zero_stage else 1
        found = roofline(step, on, products, optimizer=optimizer, weight_dtype=dtype, shares=shares)
        about = {"step": found.step, "batch_size": batch, "source": on.source, "memory": on.memory}
        record["roofline"] = asdict(found) | about
        if steps is not None:
            record["roofline"]["run"] = found.step * steps
        if on.capability is not None:
            rows_of = {call.name: call.rows for call in step.calls if call.kind == "linear"}
            known = [(n, m.structure, rows_of[n]) for n, m in linear.items()]
            record["traffic"] = layer_traffic(known, on, products)
    return record


def loss_of(model: MLP | ViT | GPT2, batch: int) -> ModelCount:
    """Return the count of a named model's loss: cross-entropy of tokens, or of mixed images with soft labels."""
    if isinstance(model, GPT2):
        return count_loss((batch, model.config.context, model.config.vocabulary))
    return count_loss((batch, model.config.num_classes), soft=True)


def _layer(
    call: CallCount, layer: StructuredLinear, multipliers: Mapping[str, float], batch: int, dtype: str
) -> dict[str, Any]:
    factors = [(f, std) for f, std in zip(layer.structure.factors, layer.init_std, strict=True) if f.trainable]
    return {
        "name": call.name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "params": call.params,
        "macs": call.macs,
        "rows": call.rows,
        "intensity": structlin.intensity(layer.structure, call.rows * batch, dtype),
        "bias": layer.bias is not None,
        "gains": 0 if layer.gains is None else len(layer.gains),
        "factors": [
            {
                **{key: getattr(f, key) for key in ("numel", "fan_in", "fan_out", "blocks")},
                "init_std": std,
                "lr_multiplier": multipliers[f"{call.name}.factors.{number}"],
            }
            for number, (f, std) in enumerate(factors)
        ],
    }


def format_count(record: Mapping[str, Any]) -> str:
    """Return a record of :func:`count_model` as a table.

    Examples
    --------
    >>> print(format_count(count_model("cifar-mlp", width=64, depth=1)))  # doctest: +ELLIPSIS
    cifar-mlp, width 64 (base 64), dense
    ...
    """
    options = "".join(f" {key}={value}" for key, value in record["options"].items())
    cap = ", RMS-capped" if record["rms_cap"] else ""
    sizes = f"width {record['width']} (base {record['base_width']})"
    lines = [f"{record['model']}, {sizes}, {record['structure']}{options}{cap}", ""]
    columns = ("layer", "in", "out", "params", "MACs", "factor", "numel", "fan in", "fan out", "blocks", "init std")
    rows = []
    for layer in record["layers"]:
        head = (layer["name"], *(f"{layer[key]:,}" for key in ("in_features", "out_features", "params", "macs")))
        for number, f in enumerate(layer["factors"]):
            cells = (str(number), *(f"{f[key]:,}" for key in ("numel", "fan_in", "fan_out", "blocks")))
            scale = (f"{f['init_std']:.4g}", f"{f['lr_multiplier']:.4g}")
            rows.append((*(head if number == 0 else ("",) * 5), *cells, *scale))
    lines.append(table((*columns, f"lr ({record['optimizer']})"), rows, rule=False))
    totals = (
        ("trainable parameters", "trainable_params"),
        ("  of them embeddings", "embedding_params"),
        ("  of them head", "head_params"),
        ("forward MACs, one sample", "forward_macs"),
        ("  of them attention", "attention_macs"),
        ("  of them head", "head_macs"),
        ("training MACs, one sample", "training_macs"),
        ("  computed again", "recomputed_macs"),
        ("other FLOPs, forward", "other_flops"),
        ("other FLOPs, training", "training_other_flops"),
    )
    missing = format_unknown(record["unknown_ops"])
    lines += ["", *(f"{label:<28}{record[key]:>28,}{f'  without {missing}' if missing and 'MACs' in label else ''}"
                    for label, key in totals if record[key] or key != "recomputed_macs")]  # fmt: skip
    per_token = record["per_token"]
    lines += [f"{'forward MACs, one token':<28}{per_token['forward_macs']:>28,.0f}"] if record["tokens"] > 1 else []
    lines += _run_lines(record)
    lines = [f"{missing}\n", *lines] if missing else lines
    return "\n".join([*lines, f"not counted (no products): {occurrences(record['uncounted_ops'])}"])


def _run_lines(record: Mapping[str, Any]) -> list[str]:
    held = record["bytes"]
    batch = f"batch of {held['batch_size']:,}"
    if held["zero_stage"]:
        batch += f" on each of {held['devices']:,} devices, ZeRO stage {held['zero_stage']}"
    other = f", activations {held['activation_dtype']}" if held["activation_dtype"] != held["dtype"] else ""
    lines = ["", f"bytes of a training step, {batch}, {held['dtype']}{other}"]
    for key in ("weights", "buffers", "gradients", "optimizer_states", "activations", "loss", "total"):
        lines.append(f"  {key.replace('_', ' '):<26}{held[key]:>28,}")
    if run := record.get("run"):
        lines += ["", f"{'training FLOPs, one step':<28}{run['training_flops_per_step']:>28,}"]
        if "steps" in run:
            lines.append(f"{'training FLOPs, ' + format(run['steps'], ',') + ' steps':<28}{run['training_flops']:>28,}")
    if found := record.get("roofline"):
        lines += ["", f"at least, on {found['device']}, {found['dtype']}, {batch} ({found['source']})"]
        ms = {key: 1e3 * found[key] for key in ("forward", "backward", "update", "step", "other")}
        rows = [("products, forward", ms["forward"], "ms"), ("products, backward", ms["backward"], "ms")]
        rows += [("update", ms["update"], "ms"), ("step", ms["step"], "ms")]
        if found["memory"] is not None:
            share = 100 * held["total"] / found["memory"]
            rows.append(("bytes of its memory", share, "%, more than it has" if share > 100 else "%"))
        if "run" in found:
            rows.append(("run", found["run"] / 3600, "h"))
        rows.append(("other operations, forward", ms["other"], "ms, where they are not fused"))
        rows.append(("intensity of products", found["intensity"], f"FLOP/byte, ridge {found['ridge']:.4g}"))
        lines += [f"  {label:<26}{value:>25.4g} {unit}" for label, value, unit in rows]
        if "traffic" in record:
            lines += format_traffic(record["traffic"])
    return [*lines, ""]


def layer_traffic(layers: Iterable[tuple[str, Any, int]], on: Device, dtype: str) -> dict[str, Any]:
    """Return the predicted traffic of chains in a training step on a GPU, by layer, and the sum of the seconds.

    ``layers``: name, structure and number of vectors of each layer.
    """
    from structlin.execution.traffic import fastest

    known: dict[Problem, dict[str, Any]] = {}
    rows = []
    for name, structure, tokens in layers:
        if not isinstance(structure, Structure) or not tokens:
            continue
        problem = Problem(structure, True, "torch", "cuda", dtype, tokens, 1, True)
        if problem not in known:
            way, found = fastest(problem, on)
            costs = {key: getattr(found, key) for key in ("memory_bytes", "l2_bytes", "seconds")}
            known[problem] = {"way": way.name, "kernels": len(found.kernels), **costs}
        rows.append({"name": name, "rows": tokens} | known[problem])
    return {"device": on.name, "dtype": dtype, "seconds": sum(row["seconds"] for row in rows), "layers": rows}


def format_traffic(found: dict[str, Any]) -> list[str]:
    """Return the lines of a table, with one row for all layers of equal cost."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in found["layers"]:
        key = tuple(row[name] for name in ("rows", "way", "kernels", "memory_bytes", "l2_bytes", "seconds"))
        alike.setdefault(key, []).append(row["name"])
    cells = []
    for (rows, way, kernels, memory, l2, seconds), names in alike.items():
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        sizes = f"{memory / 1e6:,.1f} MB", f"{l2 / 1e6:,.1f} MB", f"{1e3 * seconds:.4g} ms"
        cells.append((label, way, f"{rows:,}", f"{kernels:,}", *sizes))
    head = ("layers", "way", "rows", "kernels", "memory", "L2", "time of each")
    lines = ["", f"structured layers of a training step, predicted for {found['device']}, {found['dtype']}"]
    lines += [f"  {line}" for line in table(head, cells, left=2, rule=False).splitlines()]
    return [*lines, f"  {'all layers':<26}{1e3 * found['seconds']:>25.4g} ms"]
