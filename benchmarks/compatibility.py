"""Test which operations work with structured layers in models of timm and transformers.

    python benchmarks/compatibility.py --out docs/compatibility.md

The models are tiny and randomly initialised, because the test concerns the code of each architecture.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structlin_nn.torch import (
    MuAdamW,
    RatesWarning,
    StructuredLinear,
    count,
    load_structured,
    parameter_groups,
    project_linear,
    replace_linear,
    save_structured,
)


class NotApplicable(Exception):
    """A check does not apply to a model."""


@dataclass(frozen=True)
class Case:
    """A model: how it is built, the keywords that it is called with, and whether its experts are replaced too."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    generates: bool = False
    unpack: bool = False


def _timm(name: str, size: int = 32, **options: Any) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=7, **options)

    return Case(name, "timm", build, lambda: {"x": torch.randn(2, 3, size, size)})


def _tokens(vocabulary: int = 64) -> dict[str, Any]:
    tokens = torch.randint(3, vocabulary, (2, 8))
    return {"input_ids": tokens, "labels": tokens}


def _pairs() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 64, (2, 8)), "labels": torch.randint(3, 64, (2, 6))}


def _hf(
    kind: str, auto: str = "AutoModelForCausalLM", inputs: Callable[[], dict[str, Any]] = _tokens, *,
    unpack: bool = False, **sizes: Any,
) -> Case:  # fmt: skip
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **sizes))

    name = f"{kind}, experts" if unpack else kind
    return Case(name, "transformers", build, inputs, auto.endswith(GENERATING), unpack)


GENERATING = ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq")
_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_NAMES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0}
_LLAMA = {
    **_NAMES,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {**_NAMES, "intermediate_size": 64, "max_position_embeddings": 32}
_IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}

CASES = (
    _timm("vit_tiny_patch16_224", img_size=32, **_VIT),
    _timm("deit3_small_patch16_224", img_size=32, **_VIT),
    _timm("beit_base_patch16_224", img_size=32, **_VIT),
    _timm("eva02_tiny_patch14_224", img_size=28, size=28, **_VIT),
    _timm("cait_xxs24_224", img_size=32, **_VIT),
    _timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
    _timm("swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
    _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
    _hf("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2),
    _hf("llama", **_LLAMA),
    _hf("qwen3", **_LLAMA, head_dim=16),
    _hf("mistral", **_LLAMA),
    _hf("gemma2", **_LLAMA, head_dim=16),
    _hf("phi3", **_LLAMA),
    _hf("opt", **{**_NAMES, "ffn_dim": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32}),
    _hf("gpt_neox", **_BERT),
    _hf("bloom", hidden_size=32, n_layer=2, n_head=2, vocab_size=64),
    _hf("mixtral", **_LLAMA, num_local_experts=4),
    _hf("qwen3_moe", **_LLAMA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    _hf("mixtral", **_LLAMA, num_local_experts=4, unpack=True),
    _hf("gpt_oss", **_LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, unpack=True),
    _hf("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
    _hf("bert", "AutoModelForMaskedLM", **_BERT),
    _hf(
        "roberta",
        "AutoModelForSequenceClassification",
        lambda: {"input_ids": torch.randint(3, 64, (2, 8)), "labels": torch.tensor([0, 1])},
        **_BERT,
    ),
    _hf(
        "t5",
        "AutoModelForSeq2SeqLM",
        _pairs,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=0,
    ),
    _hf(
        "bart",
        "AutoModelForSeq2SeqLM",
        _pairs,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=64,
        max_position_embeddings=32,
        decoder_start_token_id=2,
    ),
    _hf(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        lambda: {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 64, (2, 6))},
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    _hf(
        "vit",
        "AutoModelForImageClassification",
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])},
        **_IMAGES,
    ),
    _hf(
        "clip",
        "AutoModel",
        lambda: {
            "input_ids": torch.randint(3, 64, (2, 8)),
            "pixel_values": torch.randn(2, 3, 32, 32),
            "return_loss": True,
        },
        text_config={**_BERT, "projection_dim": 16},
        vision_config={**_IMAGES, "projection_dim": 16},
        projection_dim=16,
    ),
)


def _structure(model: nn.Module, case: Case) -> None:
    options = {"impossible": "skip", "dearer": "allow", "unpack": case.unpack}
    replace_linear(model, "low_rank", rank=2, convolutions=True, **options)
    if not any(isinstance(module, StructuredLinear) for module in model.modules()):
        raise ValueError("no layer was replaced")


def _loss(output: Any) -> torch.Tensor:
    return output.loss if getattr(output, "loss", None) is not None else _first(output).square().mean()


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else next(v for v in output.values() if v.ndim > 1)


def _groups(model: nn.Module, case: Case) -> None:
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    if sum(len(group["params"]) for group in groups) != sum(p.requires_grad for p in model.parameters()):
        raise ValueError("the groups do not cover the parameters")


def _train(model: nn.Module, case: Case) -> None:
    optimizer, inputs = MuAdamW(model, lr=1e-3), case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RatesWarning)
        for _ in range(2):
            loss = _loss(model.train()(**inputs))
            loss.backward()
            optimizer.step()
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")


def _compile(model: nn.Module, case: Case) -> None:
    inputs = case.inputs()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(**inputs)
        torch.testing.assert_close(_first(compiled), _first(model(**inputs)), rtol=1e-3, atol=1e-4)


def _export(model: nn.Module, case: Case) -> None:
    inputs = case.inputs()
    labels = inputs.pop("labels", None)
    if labels is not None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": labels, "use_cache": False}
    config: Any = getattr(model, "config", None) if case.library == "transformers" else None
    cached = getattr(config, "use_cache", None)
    if cached is not None:
        config.use_cache = False  # a cache is an output that cannot be exported
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), inputs, strict=False)
    finally:
        if cached is not None:
            config.use_cache = cached
    with torch.no_grad():
        torch.testing.assert_close(_first(program.module()(**inputs)), _first(model(**inputs)), rtol=1e-3, atol=1e-4)


def _script(model: nn.Module, case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated
        try:
            torch.jit.script(case.build())
        except Exception as error:
            raise NotApplicable("the dense model cannot be scripted") from error
        scripted = torch.jit.script(copy.deepcopy(model))
    inputs = case.inputs()
    with torch.no_grad():
        torch.testing.assert_close(_first(scripted(**inputs)), _first(model(**inputs)), rtol=1e-3, atol=1e-4)


def _save(model: nn.Module, case: Case) -> None:
    inputs = case.inputs()
    with tempfile.TemporaryDirectory() as folder:
        if case.library == "transformers":
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder)
        else:
            save_structured(model, f"{folder}/model.safetensors")
            again = load_structured(case.build(), f"{folder}/model.safetensors")
    with torch.no_grad():
        if not torch.equal(_first(again.eval()(**inputs)), _first(model(**inputs))):
            raise ValueError("the outputs of the loaded model differ")


def _generate(model: nn.Module, case: Case) -> None:
    if not case.generates:
        raise NotApplicable("the model generates no text")
    inputs = {key: value for key, value in case.inputs().items() if key != "labels"}
    model.generate(**inputs, max_new_tokens=3, do_sample=False)


def _count(model: nn.Module, case: Case) -> None:
    twin = copy.deepcopy(model).to("meta")
    counted = count(
        twin, **{key: v.to("meta") if isinstance(v, torch.Tensor) else v for key, v in case.inputs().items()}
    )
    if counted.macs() <= 0:
        raise ValueError("nothing was counted")


def _compress(model: nn.Module, case: Case) -> None:
    dense = case.build().eval()
    project_linear(dense, "low_rank", rank=2, calibration=[case.inputs()], unpack=case.unpack)
    dense(**case.inputs())


CHECKS = {
    "replace": _structure, "groups": _groups, "train step": _train, "compile": _compile, "export": _export,
    "script": _script, "save, load": _save, "generate": _generate, "count": _count, "compress": _compress,
}  # fmt: skip
QUICK = ("replace", "groups", "train step", "save, load")
"""Checks that take less than a second for a model."""


def check(case: Case, checks: Sequence[str] = tuple(CHECKS)) -> dict[str, str]:
    """Return for each check "yes", "-" if it does not apply, or the first line of the error."""
    torch.manual_seed(0)
    model, found = case.build().eval(), {}
    for name in checks:
        try:
            CHECKS[name](model, case)
            found[name] = "yes"
        except NotApplicable:
            found[name] = "-"
        except Exception as error:  # whatever a library raises goes into the table
            text = str(error).partition("  File ")[0]  # messages of torch.jit continue with places in files
            found[name] = f"{type(error).__name__}: {' '.join(text.split())[:110]}"
        model.eval()
        model.zero_grad()
    return found


HEAD = """# Which models work

The table shows tests with tiny models of timm and transformers, whose linear layers and pointwise convolutions are
replaced by low-rank layers. A dash means that a test does not apply. Export is `torch.export`, and compile is
`torch.compile` with the backend `aot_eager`. Script is `torch.jit.script`. It does not apply if the dense model cannot
be scripted. Save and load are exact. Models are counted on the meta device and compressed with calibration. With
"experts", the experts of a mixture are replaced too (`unpack=True`). `python benchmarks/compatibility.py` makes this
page.

"""


def page(results: Mapping[Case, Mapping[str, str]]) -> str:
    """Format the table, followed by the reason for each failure."""
    notes: list[str] = []
    lines = ["| model | library | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 2) + "|"]
    for case, found in results.items():
        cells = []
        for name in CHECKS:
            text = found[name]
            if text not in ("yes", "-"):
                notes.append(f"{len(notes) + 1}. {case.name}, {name}: `{text.replace('`', chr(39))}`")
                text = f"no ({len(notes)})"
            cells.append(text)
        lines.append(f"| {case.name} | {case.library} | " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the page to this file")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    arguments = parser.parse_args()
    results = {}
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            results[case] = check(case)
            print(case.name, *(f"{k}: {v}" for k, v in results[case].items() if v not in ("yes", "-")), flush=True)
    if arguments.out:
        arguments.out.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
