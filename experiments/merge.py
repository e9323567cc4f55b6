"""Merge a LoRA adapter into its base model, for training or for other tools.

    python -m experiments.merge runs/sft-lora-main merged/
    python -m experiments.merge PEFT_ADAPTER merged/      # a folder that PEFT wrote

The sum is computed in float32 and rounded once to the dtype of the base's checkpoint.
"""

import os
from pathlib import Path

import torch

from nanogsm import UserError
from nanogsm.model import load_model, save_model
from nanogsm.run import console, flags
from nanogsm.store import hub


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(__doc__)
    p.add_argument("adapter", help="A run with an adapter, a PEFT adapter's folder or Hub id.")
    flags.add_base_flag(p)
    p.add_argument("out", help="Folder to write. It must not exist yet.")
    args = p.parse_args(argv)
    if os.path.lexists(args.out):
        raise UserError(f"{args.out} exists already: choose another folder")
    found = hub.find_model(args.adapter, base=args.base)
    if not found.adapter:
        raise UserError(f"{args.adapter} is not an adapter: there is nothing to merge")
    model, tokenizer = load_model(found, torch.float32, merge=True)
    try:
        save_model(model, tokenizer, Path(args.out))
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from error
    print(f"{args.adapter} and its base {found.name}, merged, are in {args.out}")
    return 0


if __name__ == "__main__":
    console.entry(main)
