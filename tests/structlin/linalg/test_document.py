"""The tables of docs/linalg.md are what the code does.

Every cell says how an operation is computed. It is done on representatives of the row while products with many columns
are counted: what the table calls dense builds the dense matrix, what goes by columns multiplies with all columns of the
identity, some at a time, what is closed or fast does neither, what is iterative iterates, and what raises raises.
"""

from pathlib import Path

import algebra_table
import cola
import numpy as np
import pytest
from cola.ops import LinearOperator

import structlin
from structlin import linalg
from structlin.linalg import _diagonal, _norms
from structlin.operators import StructuredOperator
from structlin.structures import _levinson as levinson
from structlin.structures import toeplitz as toeplitz_module

DOCUMENT = Path(__file__).parents[3] / "docs" / "linalg.md"
N = 64
CHUNK = 16


def random(name, n=N, **options):
    return structlin.structure_class(name).random((n, n), **options, seed=0)


def shifted(A):
    return A + structlin.Diagonal(np.linspace(1, 2, A.shape[0]))


def plus_identity(A):
    return A + 0.5 * cola.ops.I_like(A)


def two_kroneckers():
    x = np.random.default_rng(0).standard_normal((4, 8, 8))
    a, b, c, d = x @ x.swapaxes(1, 2) + np.eye(8)
    return structlin.Kronecker(a, b) + structlin.Kronecker(c, d)


def kronecker_of_cola(first="circulant", **options):
    return cola.ops.Kronecker(random(first, n=8, **options), random("kronecker", n=8))


TOEPLITZ = structlin.Toeplitz(0.5 ** np.arange(N), 0.25 ** np.arange(N))
HANKEL = structlin.Hankel(0.5 ** np.arange(N)[::-1], 0.25 ** np.arange(N))
BLOCKS = cola.block_diag(random("circulant"), random("kronecker"))
SLICE = random("circulant", n=70)[3:67, 5:69]
THIN = cola.ops.Dense(np.random.default_rng(0).standard_normal((N, 3)))
TRAIN, KRONECKER = random("tensor_train", rank=3), random("kronecker")
# Chains of blocks that are not square, without regrouping.
WIDE_CHAINS = [random("block_tensor_train", rank=2), random("blast", rank=20, blocks=4)]
SQUARE_STEPS = [random("monarch", blocks=8), random("butterfly"), random("block_tensor_train")]
# label of a row: what stands for it
ROWS = {
    "diagonal, permutation": [random("diagonal"), random("permutation")],
    "diagonal": [random("diagonal")],
    "permutation": [random("permutation")],
    "circulant": [random("circulant")],
    "circulant, Toeplitz, Hankel": [random("circulant"), TOEPLITZ, HANKEL],
    "Kronecker": [KRONECKER],
    "block diagonal": [random("block_diagonal", blocks=8)],
    "chains of square blocks (Monarch, butterfly, BTT)": SQUARE_STEPS,
    "chains of square blocks, padded": [random("monarch", n=63, blocks=8)],
    "low rank": [random("low_rank", rank=3)],
    "BLAST with a rank below n / b": [random("blast", rank=3, blocks=4)],
    "Tensor-Train, BTT with a rank above 1, BLAST, other chains": [TRAIN, *WIDE_CHAINS],
    "Toeplitz and Hankel from 256 rows": [TOEPLITZ, HANKEL],
    "Toeplitz and Hankel with fewer rows": [TOEPLITZ, HANKEL],
    "Kronecker product or `KronSum`, plus c I": [
        plus_identity(KRONECKER),
        plus_identity(cola.kronsum(random("toeplitz", n=8), random("toeplitz", n=8))),
    ],
    "sum of two Hermitian Kronecker products, one of them positive definite": [two_kroneckers()],
    "low rank plus diagonal, or plus another matrix with a closed form in this table": [
        shifted(random("low_rank", rank=3)),
        random("low_rank", rank=3) + random("circulant"),
        random("low_rank", rank=3) + TOEPLITZ,
    ],
    "product of square operators": [cola.ops.Product(KRONECKER, random("circulant"))],
    "`cola.ops.Kronecker`, `BlockDiag`, transposes, adjoints, multiples": [
        kronecker_of_cola(),
        BLOCKS,
        cola.ops.Adjoint(kronecker_of_cola("monarch", blocks=2)),
        2 * kronecker_of_cola(),
    ],
    "other sums, slices": [TRAIN + KRONECKER, SLICE],
    "Tensor-Train": [TRAIN],
    "BTT, Monarch if b divides the size of the blocks, BLAST, other chains": [
        random("monarch", blocks=8),
        *WIDE_CHAINS,
    ],
    "butterfly": [random("butterfly")],
    "other Monarch, and chains whose axes do not split into common factors": [random("monarch", n=60, blocks=4)],
    "product with a diagonal factor or a small inner dimension": [
        cola.ops.Product(random("diagonal"), KRONECKER),
        cola.ops.Product(THIN, THIN.T),
    ],
    "sum": [TRAIN + KRONECKER],
    "`cola.ops.Kronecker`, `BlockDiag`": [kronecker_of_cola(), BLOCKS],
    "other products, slices": [cola.ops.Product(TRAIN, KRONECKER), SLICE],
    "other chains, Toeplitz, Hankel, sums, products, slices": [
        TRAIN,
        *SQUARE_STEPS,
        *WIDE_CHAINS,
        TOEPLITZ,
        TRAIN + KRONECKER,
        cola.ops.Product(TRAIN, KRONECKER),
        SLICE,
    ],
    "`cola.ops.BlockDiag`, transposes": [BLOCKS, cola.ops.Transpose(BLOCKS)],
    "`cola.ops.Kronecker`": [kronecker_of_cola()],
    "Kronecker plus c I, `KronSum`": [
        plus_identity(KRONECKER),
        cola.kronsum(random("diagonal", n=8), random("circulant", n=8)),
    ],
}
# heading of a column: what it stands for
OPERATIONS = {
    "`cola.inv`, `sl.solve`": [cola.inv, lambda A: linalg.solve(A, np.ones(A.shape[0]))],
    "`slogdet`, `logdet`": [cola.linalg.slogdet],
    "`cola.pinv`": [cola.pinv],
    "`diag`, `trace`": [cola.diag, cola.trace],
    "`frobenius_norm`": [linalg.frobenius_norm],
    "`spectral_norm`": [lambda A: linalg.spectral_norm(A, tolerance=1e-1)],
    "`sl.svd`": [linalg.svd],
    "`cola.eig`": [lambda A: cola.eig(A, 2, "LM")],
    "`exp`, `log`, `sqrt`, `pow`": [cola.exp],
}
NO_COST = ("by its members", "by its terms", "raises", "iterative")


def table():
    """{(row, column): cell} of all tables."""
    found, head = {}, None
    document = DOCUMENT.read_text()
    made = algebra_table.TABLE.recorded
    for line in document.replace(made, "").splitlines():
        if not line.startswith("| ") and not line.startswith("|-"):
            head = None
            continue
        cells = [c.strip() for c in line.strip("|").split("|")]
        if head is None:
            head = cells
        elif not line.startswith("|-"):
            for column, cell in zip(head[1:], cells[1:], strict=True):
                assert (cells[0], column) not in found, f"{cells[0]} stands twice"
                found[cells[0], column] = cell
    return found


TABLE = table()


@pytest.fixture
def way(monkeypatch):
    """A function: how ``operation`` is done on an operator."""
    widths, flags = [], set()
    for cls in (LinearOperator, StructuredOperator):
        plain = cls.__matmul__

        def counted(self, X, plain=plain):
            if not isinstance(X, LinearOperator) and X.ndim == 2 and min(self.shape) >= N - 4:
                widths.append(X.shape[1])
            return plain(self, X)

        monkeypatch.setattr(cls, "__matmul__", counted)
    for cls in {c for c in _subclasses(LinearOperator) if "to_dense" in vars(c)}:

        def dense(self, plain=cls.to_dense):
            if min(self.shape) >= N - 4:
                flags.add("dense")
            return plain(self)

        monkeypatch.setattr(cls, "to_dense", dense)
    iterate = _norms._iterated

    def iterated(*args, **options):
        flags.add("iterative")
        return iterate(*args, **options)

    monkeypatch.setattr(_norms, "_iterated", iterated)
    for module in (_norms, _diagonal):
        monkeypatch.setattr(module, "_CHUNK", CHUNK)

    def find(operation, A):
        widths.clear()
        flags.clear()
        try:
            operation(A)
        except ValueError:
            return "raises"
        if flags:
            return "dense" if "dense" in flags else "iterative"
        if max(widths, default=0) >= N - 4:
            return "dense"
        return "columns" if sum(w for w in widths if w > 1) >= N - 4 else "closed"

    return find


def _subclasses(cls):
    return {cls}.union(*(_subclasses(c) for c in cls.__subclasses__()))


def expected(cell, A):
    """What a cell says of an operator; exceptions stand behind a semicolon, after the name of what they are for."""
    first, *others = cell.split(";")
    for other in others:
        named, _, said = other.partition(":")
        if said and named.strip() in type(A).__name__:
            first = said
    word = first.strip().split(",")[0].split(" (")[0]
    return "closed" if word.startswith(("closed", "fast", "by its", "`exp`")) else word.split(":")[0].split()[0]


@pytest.mark.parametrize(("row", "column"), [k for k in TABLE if k[0] != "dense"])
def test_a_cell_says_how_it_is_done(row, column, way, monkeypatch):
    below = row == "Toeplitz and Hankel with fewer rows"
    monkeypatch.setattr(toeplitz_module, "LEAST", N + below)
    monkeypatch.setattr(levinson, "LEAST", N + below)
    for A in ROWS[row]:
        for operation in OPERATIONS[column]:
            assert way(operation, A) == expected(TABLE[row, column], A), f"{type(A).__name__}: {TABLE[row, column]}"


def test_the_table_is_complete():
    rows, columns = ({k[i] for k in TABLE} for i in (0, 1))
    assert columns == set(OPERATIONS)
    assert rows == {*ROWS, "dense"}
    words = " ".join(rows).lower().replace("-", "")
    assert f"from {toeplitz_module.LEAST} rows" in words
    for name in structlin.structure_names():
        if name not in ("einsum", "block_tensor_train"):  # other chains, BTT
            assert name.replace("_", " ").replace("tensor train", "tensortrain") in words, name
    assert "btt" in words
    assert "other chains" in words


def test_every_cell_states_a_cost_or_why_not():
    for (row, column), cell in TABLE.items():
        if cell.startswith(("closed", "fast")):
            stated = any(letter in cell for letter in ("n", "b m", "m times", "sum", "the same", "0")) or ":" in cell
            assert stated, f"{row} | {column} | {cell}"
        else:
            assert cell.startswith(("dense", "columns", "integer", "`exp`", *NO_COST)), f"{row} | {column} | {cell}"


def test_the_table_of_methods_is_the_one_that_the_methods_make():
    """After a change: python docs/algebra_table.py --write."""
    assert algebra_table.TABLE.make() == algebra_table.TABLE.recorded
    for name, A in algebra_table.examples().items():
        dense = A.structure.dense(A.factors)
        assert isinstance(A.structure, structlin.Structure) or np.allclose(dense, A.to_dense()), name
