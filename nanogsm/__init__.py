"""nanogsm: full SFT, LoRA and PPO of Gemma on GSM8K, from scratch in PyTorch."""


class UserError(Exception):
    """A mistake one line can explain: what is wrong and what to do about it.

    Scripts print the message without a traceback and exit with status 2 (`console.entry`).
    Everything else that escapes is a bug of ours and keeps its traceback.
    """
