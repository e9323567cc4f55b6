"""Gradient checkpointing: what the backward pass recomputes instead of keeping. Torch only.

CHECKPOINTING[name] is what Transformer.recompute takes: None, or keywords of torch's checkpoint().
"none" keeps everything. "full" keeps only each block's input and computes the block again. "light"
also keeps the outputs of matrix products and of fused attention. They take most of the time and
little of the memory; the rest of the block is computed again from them.
"""

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Reentrant checkpointing needs an input that requires grad. The output of a frozen embedding does
# not, and then nothing would be trained. There is no dropout, so no random state has to be
# repeated.
FULL = {"use_reentrant": False, "preserve_rng_state": False}
MIN_INNER_SIZE = 128  # products with a smaller one are cheap: in practice, LoRA's with B


def _keep(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Trap: what is kept is gone after one backward, and retain_graph does not change that."""
    product = op is torch.ops.aten.mm.default and args[0].shape[1] >= MIN_INNER_SIZE
    attention = "scaled_dot_product" in str(op)  # every fused kernel has it in its name
    if product or attention:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


LIGHT = FULL | {"context_fn": lambda: create_selective_checkpoint_contexts(_keep)}
CHECKPOINTING = {"none": None, "light": LIGHT, "full": FULL}
