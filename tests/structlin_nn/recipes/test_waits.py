"""Training steps do not wait for the device."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structlin_nn.recipes import cifar, gpt2, imagenet


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device on CUDA: values, and shapes that depend on them."""

    NAMES = ("_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Adds the copies of floating tensors to the host to the count; on a CPU they dispatch no operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = getattr(func, "__name__", "") in ("tolist", "numpy", "cpu") and args[0].is_floating_point()
        self.waits.count += reads
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("module", ["cifar", "gpt2", "imagenet"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_do_not_wait_for_the_device(
    module: str, optimizer: str, config: cifar.Config, gpt2_config: gpt2.Config, imagenet_config: Any,
    small_cifar: Path, text_tokens: Path, image_tree: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Between evaluations, with the interval of CUDA between looks at the loss, nothing reads a value of a tensor."""
    changes: dict[str, Any] = {
        "precision": "bfloat16", "optimizer": optimizer, "adam_lr": 1e-3 if optimizer == "muon" else 0.0, "clip": 0.5,
        "ema": 0.9, "structure": "block_tensor_train", "options": {"rank": 2}, "accumulate": 2,
    }  # fmt: skip
    options = {"out": tmp_path / "run", "quiet": True, "log_every": 0}
    waits, seen = Waits(), list[int]()

    def watch(run: Any, loss: float | None) -> bool:
        run.check_every = 50
        seen.append(waits.count)
        return False

    with waits, Copies(waits):
        if module == "cifar":
            one = config.replace(epochs=1, eval_every=1, **changes)
            cifar.train(one, cifar.Options(data=small_cifar, unverified=True, **options), watch=watch)  # type: ignore[arg-type]
        elif module == "imagenet":
            # A worker transforms the images.
            three = imagenet_config.replace(epochs=1, erasing=0.5, workers=1, **changes)
            imagenet.train(three, imagenet.Options(data=image_tree, **options), watch=watch)  # type: ignore[arg-type]
        else:
            two = gpt2_config.replace(steps=7, warmup_steps=1, eval_every=7, **changes)
            gpt2.train(two, gpt2.Options(data=text_tokens, **options), watch=watch)  # type: ignore[arg-type]
    assert len(seen) >= 6
    assert seen[0] > 0
    assert {after - before for before, after in pairwise(seen[:-1])} == {0}
