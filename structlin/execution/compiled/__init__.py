"""Chains on a CPU as machine code: all steps for a few tokens at a time, so that no activation leaves the cache.

A BLAS computes one product of a chain at a time. The blocks of a structured matrix are small (32 x 32 at d = 1024).
Calls, packing of operands, and activations that are written to memory and read again then take most of the time. Here a
whole pass over a chain is one function, generated for its sizes and compiled by LLVM (llvmlite) at first use:

- :mod:`._product`: one strided product of three arrays, and the role of each axis in its loops,
- :mod:`._schedule`: the order of axes of every array, and the products of the two passes,
- :mod:`._program`: the text of the functions, from :mod:`._loops`, :mod:`._emit`, :mod:`._forms` and :mod:`._ir`,
- :mod:`._tiles`: products of bfloat16 by tiles, on processors with AMX,
- :mod:`._slices`: passes in slices whose factors stay in cache,
- :mod:`._limits`: bounds on the use of the caches,
- :mod:`._target`, :mod:`._objects`: the processor, the compiler, and compiled code on disk,
- :mod:`._arrange`: copies of factors in the orders that the products read,
- :mod:`._team`: threads, in torch,
- :mod:`._rules`: the programs of a chain, the division of tokens, and what is stored for the backward pass,
- :mod:`._plans`: the functions of a call and their memory, for torch and jax,
- :mod:`.passes`: the two passes, in torch,
- :mod:`.xla`, :mod:`._xla_runtime`: custom calls of XLA, for jax.

Without llvmlite, or on a processor that is neither x86-64 with AVX2 and F16C nor 64-bit Arm,
:mod:`structlin.execution.chunked` runs the chain by the BLAS. In float16 single products run then.
"""
