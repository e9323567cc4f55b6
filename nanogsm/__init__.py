"""nanogsm: full SFT, LoRA and PPO of Gemma and Llama on GSM8K, from scratch in PyTorch."""

import os

# For bfloat16 products on a CPU, PyTorch compiles a kernel for each shape and keeps the newest
# 1,024 in each of two caches. Batch lengths keep changing, so they would grow to gigabytes. 64 are
# enough.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")


class UserError(Exception):
    """A mistake that one line can explain: what is wrong and what to do about it.

    Scripts print the message without a traceback and exit with status 2 (`console.entry`).
    Any other exception that escapes is a bug of ours and keeps its traceback.
    """
