"""Models with structured layers as files: safetensors, which hold plain tensors and a description of the layers.

A file is one of `safetensors <https://github.com/huggingface/safetensors>`_, with the entries of the model's state
dictionary under their names. Its metadata have, beside ``format``: ``pt``, the key ``structlin``: JSON with

- ``version``: of this form, 1;
- ``layers``: for each structured layer its ``names`` in the model, ``in_features`` and ``out_features``, ``structure``
  and ``options`` as :class:`StructuredLinear` takes them (``structure`` is null for a chain without a name), the
  ``chain`` of einsums with its sizes (null for structures that are none), the shapes of its ``factors``, and ``bias``,
  ``rms_cap``, ``gain``, ``rule``, ``zero_init`` and ``checkpoint``;
- ``linear``: the names of layers that are plain ``nn.Linear``;
- ``aliases``: names of tied entries, and under which name the tensor is;
- ``sha256``: of all tensors, in the order of their names: for each ``NAME DTYPE SHAPE``, a line feed, and its
  bytes;
- ``build``: how to build the model, or null (:mod:`structlin_nn.models.files`).

Reading runs no code of the file: nothing is unpickled, no module is imported by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn._files import atomic_write
from structlin_nn._patterns import listed
from structlin_nn.torch._layout import Change, changes, check_layout, layout_of
from structlin_nn.torch._modules import changed

__all__ = ["StructuredFile", "load_structured", "read_structured", "save_structured"]

KEY, VERSION = "structlin", 1


class PlainFileError(ValueError):
    """The file holds tensors, and says nothing of structured layers."""


@dataclass(frozen=True)
class StructuredFile:
    """What a file says of its model, without the tensors; from :func:`read_structured`.

    Attributes
    ----------
    layers, linear, aliases, sha256, build
        As in the file.
    shapes
        Of the tensors, by name.
    dtypes
        Of the tensors, as safetensors names them: ``F32``, ``BF16``, ...
    metadata
        Further entries of the metadata, strings.
    """

    layers: list[dict[str, Any]]
    linear: list[str]
    aliases: dict[str, str]
    sha256: str
    build: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def layout(self) -> dict[str, Any]:
        """``layers`` and ``linear``."""
        return {"layers": self.layers, "linear": self.linear}


def save_structured(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    build: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model with structured layers to a .safetensors file, in place of an older one, as a whole or not at all.

    Parameters
    ----------
    model
        Its parameters and persistent buffers are written, in their dtypes; tied ones once.
    path
        The file, ``.safetensors``.
    build
        How to build the model (:func:`structlin_nn.models.save_model` says it for the models of this package).
    metadata
        Further entries for the metadata of the file.

    Raises
    ------
    ValueError
        A name that does not end in .safetensors; a model without structured layers and ``build``, which safetensors
        alone can hold; values on the meta device or spread over processes; a dtype, layout or entry of the state
        dictionary that safetensors has no form for; metadata that are no strings, or named ``format`` or ``structlin``.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> from structlin_nn.torch import StructuredLinear, replace_linear
    >>> model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    >>> _ = replace_linear(model, "low_rank", rank=2)
    >>> save_structured(model, "small.safetensors")
    >>> again = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    >>> again = load_structured(again, "small.safetensors")
    >>> again[0].structure.rank_bound, torch.equal(again(torch.ones(12)), model(torch.ones(12)))
    (2, True)
    """
    path = _named(path)
    extra = dict(metadata or {})
    for key, value in extra.items():
        if not isinstance(key, str) or not isinstance(value, str) or key in ("format", KEY):
            raise ValueError(f"metadata must be strings, and not named format or {KEY}, got {key!r}: {value!r}")
    layout = layout_of(model)
    if not layout["layers"] and build is None:
        raise ValueError("the model has no structured layers: safetensors.torch.save_model writes it")
    tensors, aliases = _entries(model)
    described = {
        "version": VERSION, **layout, "aliases": aliases, "sha256": digest(tensors),
        "build": None if build is None else dict(build),
    }  # fmt: skip
    try:
        text = json.dumps(described, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"build must be what JSON can hold: {error}") from error
    from safetensors import SafetensorError
    from safetensors.torch import save

    try:
        content = save(tensors, {**extra, "format": "pt", KEY: text})
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"safetensors cannot hold the model: {error}") from error
    with atomic_write(path) as file:
        file.write(content)


def read_structured(path: str | os.PathLike[str]) -> StructuredFile:
    """Return what a file of :func:`save_structured` says of its model, read without the tensors.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        A name that does not end in .safetensors; a damaged file; one that :func:`save_structured` did not write, or
        that is of a newer version; structures that do not exist, or that have other factors here.
    """
    path = _named(path)
    found = _header(path)
    text = found["metadata"].pop(KEY, None)
    found["metadata"].pop("format", None)
    if text is None:
        raise PlainFileError(f"{path} says nothing of structured layers: save_structured did not write it")
    try:
        described = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    version = described.get("version") if isinstance(described, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} must be of version {VERSION}, got {version!r}")
    try:
        check_layout(described)
        aliases, build, sha = (described.get(key) for key in ("aliases", "build", "sha256"))
        if not isinstance(aliases, dict) or not all(
            key not in found["shapes"] and value in found["shapes"] for key, value in aliases.items()
        ):
            raise ValueError(f"aliases must name entries that are there, got {aliases!r}")
        if not isinstance(build, dict | None) or not isinstance(sha, str):
            raise ValueError(f"build must be an object or null and sha256 a string, got {build!r} and {sha!r}")
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return StructuredFile(
        described["layers"], described["linear"], aliases, sha, build, found["shapes"], found["dtypes"],
        found["metadata"],
    )  # fmt: skip


def load_structured(
    model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str], *, verify: bool = True
) -> nn.Module:
    """Give a freshly built model the structured layers and the values of a file.

    Layers of ``model`` become what the file says: its ``nn.Linear`` and Conv1D layers structured ones, and structured
    layers others, or plain ones. All values are then copied, into the dtypes and onto the devices that the parameters
    of the model have. Everything is checked before anything is changed. Make the optimiser afterwards, for the
    parameters of replaced layers are new.

    Parameters
    ----------
    model
        Of the same architecture as the one that was written, dense or not; or a function that builds one.
    path
        From :func:`save_structured`.
    verify
        Compare the sum over the tensors, which tells a damaged file.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        As :func:`read_structured`; tensors that are damaged; a model with other layers, names, sizes or ties than the
        file (the message says which).
    TypeError
        What is no model and no function to one.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"a model, or a function that builds one, is needed, got {model!r}")
        model = model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"the function must build a model, got {model!r}")
    found = read_structured(path)
    try:
        return fill(model, found, read_tensors(path, found.sha256 if verify else None))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fill(model: nn.Module, found: StructuredFile, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a model the layers that a file describes, and its tensors; ValueError, and no change, where they differ."""
    planned = changes(model, found.layout)
    if meta := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"the model is on the meta device and has no values to replace: {meta[0]}, ...")
    own = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    for change in planned:
        for place in change.names:
            own = {name: value for name, value in own.items() if not name.startswith(f"{place}.")}
        for name, t in change.new.state_dict().items():
            own |= {f"{place}.{name}": (tuple(t.shape), t.dtype) for place in change.names}
    given = dict(tensors) | {alias: tensors[name] for alias, name in found.aliases.items()}
    check_entries(own, given)
    _check_ties(model, planned, found.aliases, own)
    for change in planned:
        change.apply(model)
    if planned:
        changed(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(given[name])
    return model


def _check_ties(model: nn.Module, planned: Sequence[Change], aliases: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise ValueError unless exactly those entries are tied in the model to be that the file says."""
    places = {f"{place}.": number for number, change in enumerate(planned) for place in change.names}
    held = model.state_dict(keep_vars=True)
    first: dict[Any, str] = {}
    for name in names:
        new = next((place for place in places if name.startswith(place)), None)
        identity = id(held[name]) if new is None else (places[new], name.removeprefix(new))
        other, same = first.setdefault(identity, name), aliases.get(name, name)
        if aliases.get(other, other) != same:
            raise ValueError(f"{name} is tied to {other} in the model, and not in the file")
    if len(first) > len({aliases.get(name, name) for name in names}):
        untied = next(name for name in aliases if name in first.values() and aliases[name] in first.values())
        raise ValueError(f"{untied} is tied to {aliases[untied]} in the file, and not in the model")


def check_entries(own: Mapping[str, tuple[tuple[int, ...], torch.dtype]], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors have the names, shapes and kinds of dtype that a model needs."""
    for what, names in (("lacks", own.keys() - given.keys()), ("has, and the model lacks,", given.keys() - own.keys())):
        if names:
            raise ValueError(f"the file {what} {listed(sorted(names), most=5)}")
    for name, (shape, dtype) in own.items():
        tensor = given[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the file and {shape} in the model")
        if _kind(tensor.dtype) != _kind(dtype):
            raise ValueError(f"{name} is {tensor.dtype} in the file and {dtype} in the model")


def read_tensors(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, on the CPU; ValueError where it is damaged or has another sum."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _named(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if sha256 is not None and digest(tensors) != sha256:
        raise ValueError("the file is damaged: its tensors have another sum than was written")
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 sum of tensors with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _named(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must be a .safetensors file; files of another kind can run code, and are not read")
    return path


def _header(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no iterator
            return {
                "metadata": dict(file.metadata() or {}),
                "shapes": {name: tuple(part.get_shape()) for name, part in slices.items()},
                "dtypes": {name: part.get_dtype() for name, part in slices.items()},
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _entries(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of the state dictionary, on the CPU and without shared memory, and the names of those that are tied."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} of the state dictionary is a {type(tensor).__name__}, and no tensor")
        if hasattr(tensor, "placements"):
            raise ValueError(f"{name} is spread over processes: gather it first")
        if tensor.is_meta or tensor.layout is not torch.strided:
            what = "on the meta device, and has no values" if tensor.is_meta else f"of layout {tensor.layout}"
            raise ValueError(f"{name} is {what}")
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else str(dtype)
