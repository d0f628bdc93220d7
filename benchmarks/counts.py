"""Counts of published architectures, forward and in training, against torch's FlopCounterMode.

    python benchmarks/counts.py --out counts.json

Every model is built from its configuration on the meta device, where nothing is computed. Models of timm have full
size, language models of transformers two layers. torch's counter is corrected in one place: for the gradients of a
grouped convolution it counts every channel in every group. Attention is computed by single products, which the counter
supports. ``left_out`` states why a model has no row: it cannot be built or run without values.

Small mixtures of experts are counted twice, on a CPU with random weights: with ``torch._grouped_mm``, the default of
transformers, and with a loop over the experts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from structlin_nn.torch import count
from structlin_nn.torch.counting._run import _tensors

aten = torch.ops.aten


def _names(text: str) -> list[str]:
    return text.split()


CAUSAL = _names(
    """
    apertus arcee biogpt bitnet bloom codegen cohere cohere2 ctrl diffllama exaone4 falcon gemma gemma2 gemma3_text
    glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium llama ministral mistral mpt nanochat nemotron
    olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 xglm
    """
)
ENCODERS = _names(
    """
    albert bert camembert convbert deberta-v2 distilbert electra ernie esm fnet ibert megatron-bert mobilebert
    modernbert mpnet rembert roberta roberta-prelayernorm roformer squeezebert xlm-roberta xlm-roberta-xl xmod
    """
)
VISION = _names(
    """
    beit bit convnext convnextv2 data2vec-vision deit dinov2 dinov2_with_registers efficientnet focalnet ijepa
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet segformer swiftformer swin
    swinv2 vit vit_msn
    """
)
UNMASKED = ("bloom", "opt", "openai-gpt", "deberta-v2")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe")


def corrected_gradients(
    grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], bias: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int, output_mask: Sequence[bool], *,
    out_shape: Any = None, **options: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of convolution_backward: those of the forward pass for each gradient, by groups."""
    one = 2 * math.prod(x_shape if transposed else grad_shape) * math.prod(w_shape[1:])
    return one * sum(output_mask[:2])


def reference(model: nn.Module, inputs: dict[str, Tensor], train: bool) -> int:
    """Return the MACs by torch's counter."""
    corrected = {aten.convolution_backward: corrected_gradients}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(**inputs)
        if train:
            reached = [x for x in {id(x): x for x in _tensors(output)}.values() if x.requires_grad]
            torch.autograd.backward(reached, [torch.ones_like(x) for x in reached])
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() // 2


def compare(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Count one model in both ways."""
    start = time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):
        found = count(model, **inputs)
    forward, training = (reference(model, inputs, train) for train in (False, True))
    row = {
        "name": name, "params": found.params, "forward_macs": found.macs(), "training_macs": found.training_macs,
        "reference_forward_macs": forward, "reference_training_macs": training,
        "exact": (found.macs(), found.training_macs) == (forward, training),
        "unknown": found.unknown_ops, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip
    return row


def timm_models(number: int) -> list[str]:
    """Select the first and the last model of every family, then others at even distances."""
    import timm

    families = [timm.list_models(module=module) for module in timm.list_modules()]
    chosen: dict[str, None] = {}
    for place in (0, -1, 1, 2, 3):
        for names in families:
            if names and len(chosen) < number:
                chosen[names[place % len(names)]] = None
    return list(chosen)


def build_timm(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False).train()
        return model, {"x": torch.zeros(2, *model.pretrained_cfg["input_size"])}


def build_transformers(name: str, layers: int = 2) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model with its default configuration and few layers."""
    import transformers

    config = transformers.AutoConfig.for_model(name)
    if name not in VISION:
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(getattr(config, key, None), int):
                setattr(config, key, layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config.use_cache = False
    loader = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
    with torch.device("meta"):
        model = loader.from_config(config).train()
        if name in VISION:
            size = getattr(config, "image_size", 224)
            side = size if isinstance(size, int) else size[0]
            return model, {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), side, side)}
        inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
        if name not in UNMASKED:  # these models read values of the mask, which meta tensors do not have
            inputs["attention_mask"] = torch.ones(2, 1, 16, 16).bool()
        return model, inputs


def expert_models(names: Sequence[str] = EXPERTS) -> Iterator[dict[str, Any]]:
    """Count small mixtures of experts by grouped products and by a loop, with the same weights and tokens."""
    import transformers

    small = {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "num_experts": 6,
        "num_local_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 80, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for name in names:
        known = transformers.AutoConfig.for_model(name).to_dict()
        config = transformers.AutoConfig.for_model(name, **{k: v for k, v in small.items() if k in known})
        macs: dict[str, tuple[int, int]] = {}
        for way in ("grouped_mm", "eager"):
            torch.manual_seed(0)
            config._experts_implementation = way
            model = transformers.AutoModelForCausalLM.from_config(config).train()
            found = count(model, torch.arange(2 * 16).reshape(2, 16))
            macs[way] = found.macs(), found.training_macs
        yield {"name": name, **{way: list(pair) for way, pair in macs.items()}, "exact": len(set(macs.values())) == 1}


def attempt(name: str, build: Any) -> dict[str, Any]:
    """Return a row, or the reason why there is none."""
    try:
        return compare(name, *build(name))
    except Exception as error:
        return {"name": name, "left_out": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--timm", type=int, default=170, metavar="N", help="number of models of timm (170)")
    parser.add_argument("--names", nargs="*", metavar="NAME", help="these alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"torch": torch.__version__}
    for library, names, build in (
        ("timm", timm_models(arguments.timm) if arguments.timm else [], build_timm),
        ("transformers", [*CAUSAL, *ENCODERS, *VISION], build_transformers),
    ):
        rows = []
        for name in names:
            if arguments.names and name not in arguments.names:
                continue
            rows.append(attempt(name, build))
            row = rows[-1]
            print(name, row.get("left_out") or ("exact" if row["exact"] else f"DIFFERS {row}"), flush=True)
        result[library] = rows
        tally = Counter("left out" if "left_out" in r else "exact" if r["exact"] else "differs" for r in rows)
        print(library, dict(tally), flush=True)
    result["experts"] = []
    for row in expert_models():
        result["experts"].append(row)
        print(row, flush=True)
    if arguments.out:
        temporary = arguments.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
