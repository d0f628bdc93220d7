"""Run scripts that may crash: ``{name: script}`` as JSON on stdin, ``{name: [status, output]}`` as JSON on stdout.

Each script runs in a process of its own. This one imports what all of them need and forks for each, which takes
milliseconds where a new interpreter takes seconds. A script with the name "" runs in this process before the others,
for example to compile what most of them need. It runs on one thread, since a pool of threads does not survive a fork.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
import warnings

import torch

import structlin
from structlin.testing import dense_matrix
from structlin_nn.torch import StructuredLinear


def expect(error, call, words):
    """Run ``call``, which is to raise ``error`` with all of ``words`` in its message."""
    message = None
    try:
        call()
    except error as raised:
        message = str(raised)
    missing = words if message is None else [word for word in words if word not in message]
    assert not missing, f"no {error.__name__} with {missing}, but {message}"


def close(found, wanted, tolerance=1e-4):
    """Compare tensors, or sequences of them, by their norms."""
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    for got, exact in zip(found, wanted, strict=True):
        assert got.shape == exact.shape, f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
        error = (got.double() - exact.double()).norm()
        assert error <= tolerance * exact.double().norm(), f"{error} of {exact.norm()}"


def dense(layer, x):
    """What a layer is to give, by its matrix in float64."""
    y = x.double() @ torch.from_numpy(dense_matrix(layer.structure, layer.effective_factors())).T
    return y if layer.bias is None else y + layer.bias.double()


NAMES = {
    "torch": torch,
    "nn": torch.nn,
    "structlin": structlin,
    "StructuredLinear": StructuredLinear,
    "expect": expect,
    "close": close,
    "dense": dense,
}


def run(name, script):
    """Status and output of a script in a process that is forked for it."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                try:
                    torch.manual_seed(0)
                    exec(compile(script, name, "exec"), dict(NAMES))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    scripts = json.load(sys.stdin)
    if first := scripts.pop("", None):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        exec(first, dict(NAMES))
        torch.set_num_threads(threads)
    print(json.dumps({name: run(name, script) for name, script in scripts.items()}))
