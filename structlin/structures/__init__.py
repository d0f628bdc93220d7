"""The named structures, one file for each. Importing this package registers them."""

# ruff: noqa: I001 -- the order of the imports is the order of the register

from structlin.structures.dense import Dense
from structlin.structures.low_rank import LowRank
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.kronecker import Kronecker
from structlin.structures.tensor_train import TensorTrain
from structlin.structures.block_tensor_train import BlockTensorTrain
from structlin.structures.monarch import Monarch
from structlin.structures.blast import Blast
from structlin.structures.butterfly import Butterfly
from structlin.structures.einsum_space import Coordinates, EinsumSpace, Theta, coordinates, theta_of
from structlin.structures.toeplitz import Toeplitz
from structlin.structures.circulant import Circulant
from structlin.structures.permutation import Permutation
from structlin.structures.diagonal import Diagonal
from structlin.structures.hankel import Hankel
from structlin.structures.cosine import Cosine
from structlin.structures.hadamard import Hadamard
from structlin.structures.fourier import Fourier

__all__ = [
    "Blast",
    "BlockDiagonal",
    "BlockTensorTrain",
    "Butterfly",
    "Circulant",
    "Coordinates",
    "Cosine",
    "Dense",
    "Diagonal",
    "EinsumSpace",
    "Fourier",
    "Hadamard",
    "Hankel",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Permutation",
    "TensorTrain",
    "Theta",
    "Toeplitz",
    "coordinates",
    "theta_of",
]
