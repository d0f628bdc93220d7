"""The table of docs/linalg.md: the closed forms of each structure.

    python docs/algebra_table.py --write

The script calls every optional method of :class:`structlin.structure.AbstractStructure` on one example of each
structure. The entry is "closed" if the method returns an answer, "checked" if every use of its formula is verified,
"singular" if the matrix has no inverse, and "-" if it returns None. Then :mod:`structlin.linalg` uses the dense matrix
or an iteration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from generated import Generated

import structlin as sl
from structlin.linalg._functions import Function
from structlin.verdicts import Verdict

N = 256  # from where Toeplitz matrices have a recursion

_SINE = Function("the sine", np.sin, real=True)
QUESTIONS = {
    "inverse": lambda s, A: s.inverse(A),
    "solve": lambda s, A: s.solve(A, np.ones(A.shape[0])),
    "pinv": lambda s, A: s.pinv(A),
    "slogdet": lambda s, A: s.slogdet(A),
    "diagonal": lambda s, A: s.diagonal(A, 0),
    "trace": lambda s, A: s.trace(A) or s.diagonal(A, 0),
    "eig": lambda s, A: s.eig(A),
    "svd": lambda s, A: s.svd(A),
    "f(A)": lambda s, A: s.function(A, _SINE),
    "A^k": lambda s, A: s.power(A, 2),
    "Frobenius": lambda s, A: s.frobenius_norm(A),
    "spectral": lambda s, A: s.spectral_norm(A),
    "nearest": lambda s, A: s.nearest(np.eye(A.shape[0]), None),
}


def examples() -> dict[str, Any]:
    shape = (N, N)
    return {
        "dense": sl.Dense.random(shape),
        "diagonal": sl.Diagonal.random(shape),
        "permutation": sl.Permutation.random(shape),
        "circulant": sl.Circulant.random(shape),
        "Toeplitz": sl.Toeplitz(0.5 ** np.arange(N)),
        "Hankel": sl.Hankel(0.5 ** np.arange(N)[::-1], 0.5 ** np.arange(N)),
        "Fourier": sl.Fourier(N),
        "cosine": sl.Cosine(N),
        "Hadamard": sl.Hadamard(N),
        "block diagonal": sl.BlockDiagonal.random(shape, blocks=16),
        "Kronecker": sl.Kronecker.random(shape),
        "Monarch": sl.Monarch.random(shape, blocks=16),
        "Monarch, padded": sl.Monarch.random((N - 1, N - 1), blocks=16),
        "butterfly": sl.Butterfly.random(shape),
        "low rank": sl.LowRank.random(shape, rank=4),
        "Tensor-Train": sl.TensorTrain.random(shape, rank=3),
        "BTT of rank 2": sl.BlockTensorTrain.random(shape, rank=2),
        "BLAST": sl.Blast.random(shape, blocks=4, rank=80),
    }


def cell(question: Any, A: Any) -> str:
    try:
        answer = question(A.structure, A)
    except np.linalg.LinAlgError:
        return "singular"
    if answer is None:
        return "-"
    return "checked" if getattr(answer, "verdict", Verdict.VERIFIED) is Verdict.NOT_VERIFIED else "closed"


def table() -> str:
    lines = [f"| structure | {' | '.join(QUESTIONS)} |", "|---" * (len(QUESTIONS) + 1) + "|"]
    for name, A in examples().items():
        chain = isinstance(A.structure, sl.Structure)
        cells = ["fits" if question == "nearest" and chain else cell(ask, A) for question, ask in QUESTIONS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLE = Generated(__file__, "linalg.md", table)

if __name__ == "__main__":
    TABLE.main(__doc__)
