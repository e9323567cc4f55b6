"""Random damage to what we read: every input must soon end in a value or a UserError.

    python tests/fuzz.py                          # a million inputs, ten minutes or more
    python tests/fuzz.py --inputs 20000 --seed 7
    python tests/fuzz.py --replay FILE            # read a find again and show its traceback

The inputs are completions (extract_answer, last_number, cut), problem files, config.json and weight
indexes. Each is composed of parts that matter to its reader and then damaged: values of the wrong
type, missing fields, flipped, repeated and cut bytes. Any other outcome is a find. Finds are saved
to fuzz-finds/, and the exit status is then 1. pytest does not collect this file. The tests of each
reader contain what was found.
"""

import argparse
import collections
import copy
import json
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanogsm import UserError, data  # noqa: E402
from nanogsm.model import read_adapter_config, read_config  # noqa: E402
from nanogsm.store import hub  # noqa: E402
from nanogsm.transformer import Transformer  # noqa: E402

SLOW = 1.0  # seconds; the readers need well under a millisecond
CONFIGS = [json.loads((ROOT / f"tests/fixtures/{name}/config.json").read_text())
           for name in "gemma1 gemma2 gemma3 gemma3_vision llama30 llama32".split()]  # fmt: skip
ATOMS = [
    "####", "#", "###", " ", "  ", "$", "-", "--", "+", "1", "72", "1,234", "1,23", ",", ".", ".5",
    "7.", "1e5", "\n", "\t", "\r", "Question:", "Quest", "ion:", "<<48/2=24>>", "=", "%", "²", "٣",
    "½", "−", "'", "_", "x", "/", " or ", " million", "\u202f", "\u2013",
    "\u2028", "\u00a0", "\x00", "\x1b[2J", "\ud800", "9" * 400, "," * 50, " " * 50, "e",
    "nan", "inf",
]  # fmt: skip
ADAPTER = json.loads((ROOT / "tests/fixtures/gemma3_peft/adapter_config.json").read_text())
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 10**9, 10**30, 0.5, -0.5, 1e308, math.nan,
    math.inf, "", "x", "7", "float32", "full_attention", "../../x", [], [1], ["full_attention"], {},
    {"a": 1}, {"rope_type": "linear", "factor": 0}, {"rope_type": "llama3"}, "\x00", "9" * 300,
]  # fmt: skip
NAMES = [
    "model.safetensors", "a-00001-of-00002.safetensors", "../x.safetensors", "/etc/passwd",
    "a/b.safetensors", "", ".", "..", "x\x00.safetensors", "link.safetensors", "ä.safetensors",
    ".safetensors", None, 3, [],
]  # fmt: skip


def text(rng: random.Random) -> str:
    return "".join(rng.choice(ATOMS) for _ in range(rng.randrange(12)))


def absurd(rng: random.Random):
    """A copy, because a value that is put into a list of VALUES must not change VALUES."""
    return copy.deepcopy(rng.choice(VALUES))


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Sometimes flip, cut out or double a few bytes."""
    raw = bytearray(raw)
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        if raw:
            at, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
            change = rng.randrange(3)
            if change == 0:
                raw[min(at, len(raw) - 1)] = rng.randrange(256)
            elif change == 1:
                del raw[at : min(end, at + 20)]
            else:
                raw[at:at] = raw[at : min(end, at + 20)]
    return bytes(raw)


def to_bytes(obj) -> bytes:
    return json.dumps(obj, ensure_ascii=False).encode("utf-8", "surrogatepass")


def jsonl(rng: random.Random) -> bytes:
    lines = []
    for _ in range(rng.randrange(4)):
        question, answers = text(rng) or "?", (text(rng), f"{text(rng)}\n#### 7")
        row = {"question": question, "answer": rng.choice(answers)}
        if rng.random() < 0.2:
            row[rng.choice(("question", "answer", "more"))] = absurd(rng)
        if rng.random() < 0.1:
            row.pop(rng.choice(list(row)))
        lines.append(to_bytes(row if rng.random() < 0.95 else absurd(rng)))
    return damaged(rng, rng.choice((b"\n", b"\n\n", b"\r\n")).join(lines))


def adapter(rng: random.Random) -> bytes:
    return config(rng, [ADAPTER])


def config(rng: random.Random, of: list[dict] = CONFIGS) -> bytes:
    raw = copy.deepcopy(rng.choice(of))
    for _ in range(rng.randrange(4)):
        place = raw
        while (inner := [v for v in place.values() if isinstance(v, dict)]) and rng.random() < 0.5:
            place = rng.choice(inner)
        key = rng.choice(list(place) or ["model_type"])
        if rng.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = absurd(rng)
    return damaged(rng, to_bytes(raw))


def index(rng: random.Random) -> bytes:
    weight_map = {rng.choice(("a", "b", "model.norm.weight", "")): rng.choice(NAMES)
                  for _ in range(rng.randrange(4))}  # fmt: skip
    raw = {"metadata": {}, "weight_map": weight_map}
    if rng.random() < 0.2:
        raw["weight_map"] = absurd(rng)
    return damaged(rng, to_bytes(raw))


def read_completion(raw: bytes, folder: Path) -> None:
    completion = raw.decode("utf-8", "surrogatepass")
    problem = data.Problem("?", "#### 7", 0)
    for value in (data.extract_answer(completion), data.last_number(completion)):
        assert value is None or (type(value) is float and math.isfinite(value)), value
    assert "Question:" not in data.cut(completion)
    assert type(data.is_correct(completion, problem)) is bool
    assert type(data.is_correct_flexible(completion, problem)) is bool


def read_problems(raw: bytes, folder: Path) -> None:
    (folder / "p.jsonl").write_bytes(raw)
    for problem in data.read_jsonl(folder / "p.jsonl"):
        assert problem.question and data.extract_answer(problem.answer) is not None


def read_a_config(raw: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(raw)
    found = read_config(folder)
    if found.num_hidden_layers < 8:  # an accepted config can be built and, if small, run
        small = found.vocab_size * found.hidden_size < 10**5 and found.intermediate_size < 10**3
        with torch.device("cpu" if small else "meta"):
            model = Transformer(found)
        if small:
            model(torch.zeros((1, 3), dtype=torch.long))


def read_an_adapter(raw: bytes, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(raw)
    found = read_adapter_config(folder)
    assert found["peft_type"] == "LORA" and found["r"] > 0 and math.isfinite(found["scale"])


def read_index(raw: bytes, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(raw)
    for path in hub.weight_files(folder):
        assert path.resolve().parent == folder.resolve(), path


READERS = {  # name: (makes an input, reads it, its share of all inputs)
    "completion": (lambda rng: text(rng).encode("utf-8", "surrogatepass"), read_completion, 0.5),
    "problems": (jsonl, read_problems, 0.25),
    "config": (config, read_a_config, 0.1),
    "adapter": (adapter, read_an_adapter, 0.1),
    "index": (index, read_index, 0.05),
}


def hangs(number, frame):
    raise TimeoutError("a minute was not enough")


def attempt(name: str, raw: bytes, folder: Path) -> str:
    """The outcome: "read", "refused" or a description of the find."""
    began = time.perf_counter()
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        READERS[name][1](raw, folder)
        outcome = "read"
    except UserError as error:
        outcome = "refused" if "\n" not in str(error).strip() else "a message of several lines"
    except Exception:
        outcome = traceback.format_exc()
    finally:
        signal.alarm(0)
    return outcome if time.perf_counter() - began < SLOW else f"slow, then {outcome}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--inputs", type=int, default=1_000_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--replay", type=Path, metavar="FILE")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "elsewhere").write_bytes(b"")  # no reader may follow the link to it
        (folder / "model").mkdir()
        (folder / "model/link.safetensors").symlink_to(folder / "elsewhere")
        (folder / "model/a-00001-of-00002.safetensors").write_bytes(b"")
        if args.replay:
            name = args.replay.name.split("-")[0]
            print(attempt(name, args.replay.read_bytes(), folder / "model"))
            return 0
        rng, began = random.Random(args.seed), time.time()
        counts, finds = collections.Counter(), set()
        names, shares = list(READERS), [share for *_, share in READERS.values()]
        for done in range(1, args.inputs + 1):
            name = rng.choices(names, shares)[0]
            raw = READERS[name][0](rng)
            outcome = attempt(name, raw, folder / "model")
            kind = outcome if outcome in ("read", "refused") else "find"
            counts[name, kind] += 1
            if kind == "find" and (cause := outcome.rstrip().split("\n")[-1]) not in finds:
                finds.add(cause)
                Path("fuzz-finds").mkdir(exist_ok=True)
                file = Path("fuzz-finds") / f"{name}-{args.seed}-{done}"
                file.write_bytes(raw)
                print(f"{file}: {outcome}", flush=True)
            if done % 100_000 == 0 or done == args.inputs:
                summary = ", ".join(f"{n} {k} {c:,}" for (n, k), c in sorted(counts.items()))
                print(f"{done:,} inputs in {time.time() - began:.0f} s: {summary}", flush=True)
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
