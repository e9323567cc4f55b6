"""A model folder with random weights, to time a model whose real weights are not at hand.

    python -m benchmarks.random_weights CONFIG OUT

CONFIG is a folder with a Gemma's config.json and tokenizer files. OUT is a new folder in the Hub's
layout, which transformers can open, too. A random model never ends its answers, so time decoding
with --fixed.
"""

from pathlib import Path

import torch

from nanogsm import UserError, data
from nanogsm.model import read_config, save_model
from nanogsm.run import console, flags
from nanogsm.transformer import Transformer


def main(argv: list[str] | None = None) -> int:
    parser = flags.Parser("Make a model folder with random weights.")
    parser.add_argument("config", type=Path, help="Folder with config.json and tokenizer files.")
    parser.add_argument("out", type=Path, help="The new folder.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights. Default: 0.")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} exists: choose another folder")
    torch.manual_seed(args.seed)
    config = read_config(args.config)
    with torch.device("meta"):
        model = Transformer(config).to(config.dtype)
    model.to_empty(device="cpu")
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
        else:
            torch.nn.init.zeros_(p)  # a norm with a gain of 1
    save_model(model, data.Tokenizer(args.config), args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} random weights in {args.out}")
    return 0


if __name__ == "__main__":
    console.entry(main)
