"""Whether an installed nanogsm works. Run it by path, outside the repository: `python PATH`."""

import importlib.util
import sys
from pathlib import Path

# Python puts the folder of this file first in its path, and nothing else of the repository.
assert importlib.util.find_spec("train_sft") is None, "run it outside the repository"

from nanogsm import data, generate  # noqa: E402
from nanogsm.model import load_model  # noqa: E402
from nanogsm.report import page  # noqa: E402
from nanogsm.run import known  # noqa: E402

print(f"nanogsm in {Path(page.__file__).parents[1]}, Python {sys.version.split()[0]}")
model, tokenizer = load_model("tiny")
[answer] = generate.answer(model, tokenizer, ["2 + 3?"], data.Prompt(), max_new_tokens=8)
assert answer.text and len(data.load_problems("tiny", "test")) == 1319
assert page.STYLE and known.model("google/gemma-2b-it") is not None
print("installed: the embedded model answers, and the package's data files are there")
