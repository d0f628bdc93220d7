r"""Figure 7: GPT-2 on OpenWebText, dense against Block Tensor-Train of rank 4 with capped factors.

Command:   structlin prepare openwebtext --out DIR, then
           structlin sweep gpt2 --data DIR --submit slurm --launcher 'torchrun --nproc-per-node 8 --no-python' \
             --submit-set gpus_per_node=8 --set device=cuda --set precision=bfloat16 --set compile=true
Small:     benchmarks/sweeps/gpt2_short.py: 2 runs of 400 steps on bytes, 20 minutes on one CPU core.
Time:      7 runs of 600,000 steps of 480 sequences, 3.1e20 training MACs: about 80 days of one A100 together.
Paper:     validation loss: dense 384: 3.238, 512: 3.076, 768: 2.918; Block Tensor-Train 1024: 3.222, 1536: 3.074,
           2048: 2.977, 2560: 2.865.
Result:    ``val_loss`` of the last evaluation.

Heads have 64 features; the dense model of width 512 has 12 heads, as in the paper. The base model has expansion 1, as
in the paper's code. Learning rate, warm-up, weight decay and clipping are nanoGPT's (`structlin_nn.recipes.gpt2`).
"""

from structlin_nn.sweeps import Sweep, merge, zipped

BTT = {"structure": "block_tensor_train", "options": {"rank": 4, "factorization": "greedy"}, "rms_cap": True}

SWEEP = Sweep(
    name="gpt2",
    about="figure 7: validation loss of GPT-2 on OpenWebText against compute",
    model="gpt2",
    data="OpenWebText",
    base={"base_expansion": 1},
    overlays=[
        *merge([{"structure": "dense"}], zipped(width=(384, 512, 768), heads=(6, 12, 12))),
        *merge([BTT], zipped(width=(1024, 1536, 2048, 2560), heads=(16, 24, 32, 40))),
    ],
)
