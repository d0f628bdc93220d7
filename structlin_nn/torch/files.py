"""Files of models with structured layers: safetensors with the tensors and a description of the layers.

A file has the format of `safetensors <https://github.com/huggingface/safetensors>`_. Its tensors are the entries of the
state dict of the model. Its metadata have the entry ``format``: ``pt``, and the entry ``structlin``, a JSON object with

- ``version``: version of this format, 1;
- ``layers``: for each structured layer its ``names`` in the model, ``in_features`` and ``out_features``, ``structure``
  and ``options`` of :class:`StructuredLinear` (``structure`` is null for a chain without a name), the ``chain`` of
  einsums with its sizes (null for structures that are not chains), the shapes of its ``factors``, and ``bias``,
  ``rms_cap``, ``gain``, ``rule``, ``zero_init`` and ``checkpoint``; for layers of experts also ``experts``, their
  number, which is the first axis of all tensors of the layer;
- ``linear``: names of ``nn.Linear`` layers and of dense layers of experts;
- ``aliases``: for each tied entry, the name under which its tensor is stored;
- ``sha256``: checksum of all tensors in the order of their names: for each ``NAME DTYPE SHAPE``, a line feed, and the
  bytes;
- ``build``: description from which the model can be built, or null (:mod:`structlin_nn.models.files`).

Reading a file executes no code from it: nothing is unpickled, and no module is imported by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn._files import atomic_write
from structlin_nn._patterns import listed
from structlin_nn.torch._layout import changes, check_layout, layout_of
from structlin_nn.torch._modules import changed

__all__ = ["StructuredFile", "load_structured", "read_structured", "save_structured"]

KEY, VERSION = "structlin", 1


class PlainFileError(ValueError):
    """Error for a file with tensors but without a description of structured layers."""


@dataclass(frozen=True)
class StructuredFile:
    """Description of the model in a file, without the tensors, from :func:`read_structured`.

    Attributes
    ----------
    layers, linear, aliases, sha256, build
        Entries of the description (:mod:`structlin_nn.torch.files`).
    shapes
        Shape of each tensor, by name.
    dtypes
        Dtype of each tensor, by name, in the notation of safetensors: ``F32``, ``BF16``, ...
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
        """The entries ``layers`` and ``linear``."""
        return {"layers": self.layers, "linear": self.linear}


def save_structured(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    build: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model with structured layers to a .safetensors file.

    An existing file is replaced only when the new one is complete.

    Parameters
    ----------
    model
        Module whose parameters and persistent buffers are written in their dtypes; tied ones are written once.
    path
        Path of the file, with the suffix ``.safetensors``.
    build
        Description from which the model can be built. :func:`structlin_nn.models.save_model` creates it for the models
        of this package.
    metadata
        Further entries for the metadata of the file.

    Raises
    ------
    ValueError
        If the model has no structured layers and ``build`` is None, a value is on the meta device or sharded over
        processes, or safetensors cannot represent an entry of the state dict.

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
            raise ValueError(f"metadata must be strings with keys other than format and {KEY}, got {key!r}: {value!r}")
    layout = layout_of(model)
    if not layout["layers"] and build is None:
        raise ValueError("the model has no structured layers; use safetensors.torch.save_model")
    tensors, aliases = _entries(model)
    described = {
        "version": VERSION, **layout, "aliases": aliases, "sha256": digest(tensors),
        "build": None if build is None else dict(build),
    }  # fmt: skip
    try:
        text = json.dumps(described, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"build cannot be represented in JSON: {error}") from error
    from safetensors import SafetensorError
    from safetensors.torch import save

    try:
        content = save(tensors, {**extra, "format": "pt", KEY: text})
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"safetensors cannot represent the model: {error}") from error
    with atomic_write(path) as file:
        file.write(content)


def read_structured(path: str | os.PathLike[str]) -> StructuredFile:
    """Read the description of the model in a file of :func:`save_structured`, without the tensors.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing, damaged, not of :func:`save_structured` or of a newer version, or a structure does not
        exist or has other factors in this version.
    """
    with _opened(path) as (path, file):
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no iterator
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
        metadata = dict(file.metadata() or {})
    text = metadata.pop(KEY, None)
    metadata.pop("format", None)
    if text is None:
        raise PlainFileError(f"{path} does not describe structured layers; save_structured did not write it")
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
            key not in shapes and value in shapes for key, value in aliases.items()
        ):
            raise ValueError(f"aliases must name tensors of the file, got {aliases!r}")
        if not isinstance(build, dict | None) or not isinstance(sha, str):
            raise ValueError(f"build must be an object or null and sha256 a string, got {build!r} and {sha!r}")
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return StructuredFile(described["layers"], described["linear"], aliases, sha, build, shapes, dtypes, metadata)


def load_structured(
    model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str], *, verify: bool = True
) -> nn.Module:
    """Load the structured layers and the values of a file into a model.

    The layers of ``model`` are replaced by those of the file: ``nn.Linear`` and Conv1D layers by structured ones, and
    structured layers by others or by ``nn.Linear``. Then all values are copied, with the dtypes and devices of the
    parameters of the model. All checks precede the first change. Create the optimiser afterwards, because replaced
    layers have new parameters.

    Parameters
    ----------
    model
        Model of the same architecture as the saved one, with dense or structured layers; or a function that builds it.
    path
        Path of a file of :func:`save_structured`.
    verify
        Compare the checksum of the tensors.

    Raises
    ------
    FileNotFoundError, ValueError
        As for :func:`read_structured`; if the tensors are damaged; or if layers, names, sizes or ties of the model
        differ from those of the file. The message names the difference.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"model must be a torch.nn.Module or a function that returns one, got {model!r}")
        model = model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"the function must return a torch.nn.Module, got {model!r}")
    found = read_structured(path)
    try:
        return fill(model, found, read_tensors(path, found.sha256 if verify else None))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fill(model: nn.Module, found: StructuredFile, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Load layers and tensors of a file into a model; ValueError, without a change, if they do not match."""
    planned = changes(model, found.layout)
    own = model.state_dict(keep_vars=True)
    if meta := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(f"the model is on the meta device and has no values to replace: {meta[0]}, ...")
    for change in planned:
        new = change.new.state_dict(keep_vars=True)
        for place in change.names:
            own = {name: tensor for name, tensor in own.items() if not name.startswith(f"{place}.")}
            own |= {f"{place}.{name}": tensor for name, tensor in new.items()}
    given = dict(tensors) | {alias: tensors[name] for alias, name in found.aliases.items()}
    check_entries(own, given)
    _check_ties(own, found.aliases)
    for change in planned:
        change.apply(model)
    if planned:
        changed(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(given[name])
    return model


def _check_ties(own: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Raise ValueError unless the same entries are tied in the planned model and in the file."""
    first: dict[int, str] = {}
    for name, tensor in own.items():
        other, same = first.setdefault(id(tensor), name), aliases.get(name, name)
        if aliases.get(other, other) != same:
            raise ValueError(f"{name} is tied to {other} in the model, but not in the file")
    if len(first) > len({aliases.get(name, name) for name in own}):
        untied = next(name for name in aliases if name in first.values() and aliases[name] in first.values())
        raise ValueError(f"{untied} is tied to {aliases[untied]} in the file, but not in the model")


def check_entries(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors have the names, shapes and kinds of dtype of those of a model."""
    for what, names in (
        ("lacks", own.keys() - given.keys()),
        ("has, but the model lacks,", given.keys() - own.keys()),
    ):
        if names:
            raise ValueError(f"the file {what} {listed(sorted(names), most=5)}")
    for name, wanted in own.items():
        tensor = given[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the file, but {tuple(wanted.shape)} in the model"
            )
        if _kind(tensor.dtype) != _kind(wanted.dtype):
            raise ValueError(f"{name} has dtype {tensor.dtype} in the file, but {wanted.dtype} in the model")


def read_tensors(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, on the CPU; ValueError if it is damaged or the checksum differs."""
    with _opened(path) as (_, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator
    if sha256 is not None and digest(tensors) != sha256:
        raise ValueError("the file is damaged: the checksum of its tensors differs from the one in the file")
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 checksum of tensors with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _named(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must be a .safetensors file; other formats can execute code and are not read")
    return path


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Any]]:
    """Open a file; FileNotFoundError if it is missing, ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = _named(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            yield path, file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _entries(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the state dict, on the CPU and without shared memory, and the names of tied ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"entry {name} of the state dict must be a tensor, got a {type(tensor).__name__}")
        if hasattr(tensor, "placements"):
            raise ValueError(f"{name} is sharded over processes; gather it first")
        if type(tensor) not in (Tensor, nn.Parameter):  # several of them can have the same address
            raise ValueError(f"{name} is a {type(tensor).__name__}, which a .safetensors file cannot hold: save the "
                             "model before it is quantised, or its state dict with torch.save")  # fmt: skip
        if tensor.is_meta or tensor.layout is not torch.strided:
            what = "on the meta device and has no values" if tensor.is_meta else f"of layout {tensor.layout}"
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
