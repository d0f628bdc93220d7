"""Torch models by name: of timm, of transformers, or of a module that Python can import."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from structlin_nn._text import suggestion
from structlin_nn.models.factory import StructureConfig
from structlin_nn.models.files import make_timm
from structlin_nn.torch import replace_linear

__all__ = ["FORMS", "build_named", "example_inputs", "open_named", "own_function", "parts_of", "set_structure"]

FORMS = "timm:NAME, hf:CONFIG (a model type or a folder with config.json), or package.module:function"
EXAMPLE_TOKENS = 512
"""Tokens in a sequence of `example_inputs`, where a model of transformers takes as many."""


def open_named(text: str, *, device: str | None = "meta", **options: Any) -> nn.Module:
    """Return a model by its name, without trained weights.

    Parameters
    ----------
    text
        ``timm:NAME`` makes a model of timm; ``hf:CONFIG`` one of transformers, by the type of its configuration
        (``hf:gpt2``) or by a folder with a ``config.json``, of the class that its ``architectures`` name or else of a
        language model, or the bare model; ``package.module:function`` calls a function, with the current directory on
        the path of imports.
    device
        ``"meta"`` allocates nothing; None leaves it to the library.
    **options
        Arguments of timm's model, of the configuration, or of the function.

    Examples
    --------
    >>> model = open_named("hf:gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    >>> type(model).__name__, next(model.parameters()).device.type
    ('GPT2LMHeadModel', 'meta')
    """
    kind, colon, rest = text.partition(":")
    if not colon or not rest or not kind:
        raise ValueError(f"a model is {FORMS}, got {text!r}")
    with torch.device(device or torch.get_default_device()):
        if kind == "timm":
            import timm

            known = timm.list_models()
            if rest.partition(".")[0] not in known:
                raise ValueError(f"timm has no model {rest!r}{suggestion(rest, known)}")
            model: Any = timm.create_model(rest, **options)
        elif kind == "hf":
            model = _transformers(rest, options)
        else:
            found = own_function(text)
            model = found if isinstance(found, nn.Module) else found(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{text} must give a torch.nn.Module, got a {type(model).__name__}")
    return model


def _configuration(name: str, **options: Any) -> Any:
    """Return the configuration of a model type of transformers, or of a folder with a ``config.json``."""
    import transformers
    from transformers.models.auto import configuration_auto

    known = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    folder = Path(name)
    if (folder / "config.json").is_file() or folder.name == "config.json":
        return transformers.AutoConfig.from_pretrained(name, **options)
    if name in known:
        return transformers.AutoConfig.for_model(name, **options)
    raise ValueError(
        f"transformers has no model type {name!r}{suggestion(name, known)}, and there is no {folder / 'config.json'}"
    )


def _has(config: Any, option: str) -> bool:
    return hasattr(config, option) or hasattr(config, f"_{option}")


def _transformers(name: str, options: dict[str, Any]) -> Any:
    import transformers

    usual = _configuration(name)
    for option in options:  # a configuration stores unknown names too
        if not _has(usual, option):
            settings = [*vars(usual), *usual.attribute_map]
            raise ValueError(f"the configuration of hf:{name} has no {option!r}{suggestion(option, settings)}")
    config = _configuration(name, **options)
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)(config)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModel"):
        kind = getattr(transformers, auto)
        if type(config) in kind._model_mapping:
            return kind.from_config(config)
    raise ValueError(f"transformers has no model for a configuration of type {name!r}")


def own_function(path: str) -> Callable[..., Any]:
    """Return the function that ``package.module:function`` names; the current directory is on the path of imports.

    ValueError if there is no such function.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not name or not module_name:
        raise ValueError(f"your own model must be given as package.module:function, got {path!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{path} cannot be imported ({error}); a model is {FORMS}") from error
    if not hasattr(module, name):
        raise ValueError(f"module {module_name} has no {name!r}{suggestion(name, vars(module))}")
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{path} must be a function of a width, got {function!r}")
    return function


class _Logits(nn.Module):
    """A model of transformers as a function of one tensor to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits


def build_named(
    text: str, outputs: int, structure: StructureConfig, *, width: int = 0, size_of_outputs: str = "num_labels",
    image_size: int | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """Return a model to be trained by a recipe, with random values and structured layers.

    `text` is as for :func:`open_named`; a function is called with the width, and with the keyword ``outputs`` if it has
    that parameter. `outputs` is the number of classes or tokens, and `size_of_outputs` its name in configurations of
    transformers. `image_size` is the side of the images, for ``timm:NAME`` and ``hf:CONFIG``; `options` are further
    arguments of the model.
    """
    kind, _, name = text.partition(":")
    if kind == "timm":
        if options:
            raise ValueError(f"{text} takes no further options, got {', '.join(options)}")
        made = make_timm(name, num_classes=outputs, img_size=image_size)
    elif kind == "hf":
        # Convolutions, as in ResNet, take images of any size, and have no such setting.
        sized = image_size is not None and _has(_configuration(name), "image_size")
        size = {"image_size": image_size} if sized else {}
        made = _Logits(open_named(text, device=None, **{size_of_outputs: outputs, **size, **options}))
    else:
        function = own_function(text)
        named = {"outputs": outputs} if "outputs" in inspect.signature(function).parameters else {}
        made = function(width, **named, **options)
    model, _ = parts_of(made, text)
    if structure.name != "dense" or structure.rms_cap or structure.rule != "paper":
        set_structure(model, structure)
    return model


def parts_of(made: Any, name: str) -> tuple[nn.Module, Any]:
    """Return (model, inputs) of what a function returned: both, or a model alone (None); TypeError for anything else.

    `name` is that of the function, for the message.
    """
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        got = f"({', '.join(type(x).__name__ for x in made)})" if isinstance(made, tuple) else type(made).__name__
        raise TypeError(f"{name} must return a torch module or (module, inputs), got {got}")
    return model, inputs


def set_structure(model: nn.Module, structure: StructureConfig, dearer: Literal["warn", "allow"] = "warn") -> None:
    """Replace the linear layers of a model of another library as a configuration says; tied ones stay dense.

    `dearer` is what happens if layers have more MACs than dense ones.
    """
    replace_linear(
        model, structure.name, layers=structure.layers or "all_but_last", rms_cap=structure.rms_cap,
        rule=structure.rule, shared_weights="skip", dearer=dearer, **structure.options,
    )  # fmt: skip


def example_inputs(model: nn.Module, batch: int = 1) -> Tensor:
    """Return zeros of the shape that a model takes.

    Examples
    --------
    >>> example_inputs(open_named("hf:gpt2", n_layer=1, n_embd=32, n_head=2, n_positions=16), batch=2).shape
    torch.Size([2, 16])
    """
    own = getattr(model, "example_input", None)
    if own is not None:
        return own(batch)
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is not None and name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None) or EXAMPLE_TOKENS
        return torch.zeros(batch, min(longest, EXAMPLE_TOKENS), dtype=torch.int64)
    if config is not None and name == "pixel_values" and hasattr(config, "image_size"):
        sides = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        return torch.zeros(batch, getattr(config, "num_channels", 3), *sides)
    if (settings := getattr(model, "pretrained_cfg", None)) is not None:
        channels, *sides = settings["input_size"]
        return torch.zeros(batch, channels, *getattr(getattr(model, "patch_embed", None), "img_size", None) or sides)
    raise ValueError(f"the input shape of {type(model).__name__} is not known; add a method example_input(batch)")
