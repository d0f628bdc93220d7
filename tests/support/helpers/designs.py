"""Structures that several files of tests take."""

# One of each kind of chain, small enough for derivatives of every order: shape and options by name.
CASES = {
    "low_rank": ((35, 22), {"rank": 3}),
    "butterfly": ((16, 16), {}),
    "kronecker": ((35, 6), {}),
    "tensor_train": ((30, 24), {"cores": 3, "rank": 2}),
    "block_tensor_train": ((35, 6), {"rank": 2}),
    "monarch": ((11, 7), {"blocks": 2}),
    "blast": ((15, 6), {"blocks": 3, "rank": 2}),
    "block_diagonal": ((15, 6), {"blocks": 3}),
}
