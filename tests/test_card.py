"""run/card.py and run/known.py: a plan for a GPU that is not here says what a run on it would
choose, whether that fits, what would make it fit, and a bound of the time that was worked out by
hand."""

import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES

import train_ppo
import train_sft
from experiments import count_tokens
from nanogsm import UserError, data
from nanogsm.model import read_config
from nanogsm.run import card, known, machine, start
from nanogsm.store import hub
from nanogsm.transformer import Transformer

COUNTS = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
}


def shapes_of(name: str) -> list:
    with torch.device("meta"):
        return [p.shape for p in Transformer(read_config(known.FOLDER / name)).parameters()]


@pytest.mark.parametrize("name", COUNTS)
def test_a_known_size_has_as_many_parameters_as_its_checkpoint(name):
    assert sum(map(math.prod, shapes_of(name))) == COUNTS[name]
    for hub_id in (f"google/{name}", f"google/{name}-it"):
        assert known.model(hub_id) == (known.FOLDER / name, None, hub_id)


def test_a_folder_here_hides_a_known_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert known.model("google/gemma-2b")
    (tmp_path / "google" / "gemma-2b").mkdir(parents=True)
    assert known.model("google/gemma-2b") is None


def test_every_known_size_is_counted():
    assert {path.parent.name for path in known.FOLDER.glob("*/config.json")} == set(COUNTS)


@pytest.mark.parametrize(
    "name", ["tiny", "gemma-2b", "me/gemma-2b", "google/gemma-9b", "google/..", "google/",
             "google/x/gemma-2b", "google/gemma-2b@main", "google/gsm8k.json"]
)  # fmt: skip
def test_other_names_are_not_known(name):
    assert known.model(name) is None


# -------------------------------------------------------------------------------------- the plans


@pytest.fixture
def gemma_2b(tmp_path):
    """A folder with gemma-2b's config, a fixture's tokenizer and no weights; 40 problems."""
    shutil.copytree(FIXTURES / "gemma1", tmp_path / "m", ignore=lambda *_: ["model.safetensors"])
    shutil.copy(known.FOLDER / "gemma-2b" / "config.json", tmp_path / "m")
    rows = [{"question": "How many? " * (4 + i % 9), "answer": f"{'so ' * i}#### 1"}
            for i in range(1, 41)]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "m"), ["--data", str(tmp_path / "own.jsonl"), "--dry-run"]


@pytest.fixture
def gated(monkeypatch):
    """The Hub gives nothing."""

    def refuse(name, weights=True, base=None):
        raise UserError(f"{name}: gated")

    monkeypatch.setattr(hub, "find_model", refuse)


SFT = ["--dry-run", "--model", "google/gemma-2b-it"]
PPO = ["--dry-run", "--init", "google/gemma-2b-it"]


def said(capsys, main, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("ppo", [False, True])
@pytest.mark.parametrize(
    "gib, flags", [(12, ["--lora"]), (80, []), (40, []), (48, ["--micro-batch", "4"])]
)
def test_a_plan_says_what_a_run_on_that_card_would(
    gemma_2b, monkeypatch, capsys, gib, flags, ppo
):
    main, flag = (train_ppo.main, "--init") if ppo else (train_sft.main, "--model")
    argv = [flag, gemma_2b[0], *gemma_2b[1], *flags]
    plan = said(capsys, main, *argv, "--gpu-memory", str(gib))
    monkeypatch.setattr(machine, "pick_compute", lambda device, precision: ("cuda", "bf16"))
    monkeypatch.setattr(machine, "free_memory", lambda device: gib * 2**30)
    run = said(capsys, main, *argv)
    assert plan.startswith(run) and f"cuda, bf16, {gib} GiB free" in run
    more = plan.removeprefix(run)
    assert f"card         {gib} GiB: it" in more and "lower bound" in more
    assert ("may be too little" in run) == ("it does NOT fit" in more)
    [total] = re.findall(r"in all +([0-9.]+) GiB", run)
    [needed] = re.findall(r"1.3 x ([0-9.]+) = ", more.splitlines()[0])
    assert abs(float(total) - float(needed)) < 0.06  # one number, rounded twice


@pytest.mark.parametrize(
    "main, flags, want",
    [
        (train_sft.main, ["24"], ["--lora", "--shard 4"]),
        (train_sft.main, ["48", "--checkpointing", "none"], []),
        (train_sft.main, ["48", "--checkpointing", "none", "--micro-batch", "8"],
         ["--checkpointing light"]),
        (train_sft.main, ["43", "--checkpointing", "light", "--micro-batch", "16"],
         ["--checkpointing full"]),
        (train_sft.main, ["37.2", "--checkpointing", "none", "--micro-batch", "16"],
         ["--micro-batch 1 --accumulation 32 --checkpointing full"]),
        (train_sft.main, ["50", "--optim", "adamw"], ["--optim adamw8bit"]),
        (train_sft.main, ["24", "--shard", "2"], ["--shard 4"]),
        (train_sft.main, ["4", "--lora"], []),
        (train_ppo.main, ["14", "--lora", "--rollout-batch", "512"], ["--rollout-batch 256"]),
        (train_ppo.main, ["40", "--critic", "separate"], ["--lora", "--shard 2 --critic shared"]),
    ],
)  # fmt: skip
def test_the_flags_that_are_named_make_it_fit(gated, capsys, main, flags, want):
    argv = [*(PPO if main is train_ppo.main else SFT), "--gpu-memory", *flags]
    plan = said(capsys, main, *argv)
    named = re.findall(r"^(?:or )?add +(--.*?)(?: on \d+ such cards.*)?: 1\.3 x", plan, re.M)
    assert named == want
    assert bool(named) or "it fits" in plan or "no flag helps (tried" in plan
    for more in named:
        assert "it does NOT fit" in plan
        assert "GiB: it fits" in said(capsys, main, *argv, *more.split())


def test_with_shards_the_plan_is_for_as_many_devices(gated, capsys):
    """On 8 devices a step of 16 gives each of them 2 rows, and not 16."""
    plan = said(capsys, train_sft.main, *SFT, "--gpu-memory", "80", "--shard", "8")
    assert "of 2 x 8 examples" in plan and "8 x cuda, every 8 share one copy" in plan


# ------------------------------------------------------------------------- sizes without the files


def test_without_a_licence_known_sizes_are_planned_and_it_is_said(gated, capsys):
    plan = said(capsys, train_sft.main, *SFT, "--device", "cuda", "--gpu-memory", "24")
    assert "planned from the known sizes of gemma-2b, because: google/gemma-2b-it: gated" in plan
    assert "GSM8K's tokens are from a table, counted by Gemma 1's tokenizer\n" in plan
    assert "7,409 examples" in plan and "2,506,172,416 parameters" in plan
    socratic = said(capsys, train_sft.main, *SFT, "--gpu-memory", "24", "--data", "socratic",
                    "--epochs", "2")  # fmt: skip
    assert "socratic answers are estimated" in socratic
    tokens = [int(re.search(r"([0-9,]+) supervised", text)[1].replace(",", ""))
              for text in (plan, socratic)]  # fmt: skip
    assert 1.2 < tokens[1] / tokens[0] < 1.4
    [once], [twice] = (re.findall(r"([0-9.]+) seconds on an H100", text) for text in (plan, socratic))
    assert 2 * 1.15 < float(twice) / float(once) < 2 * 1.35


def test_own_data_without_a_tokenizer_are_estimated(gated, gemma_2b, capsys):
    plan = said(capsys, train_sft.main, *SFT, *gemma_2b[1], "--gpu-memory", "24")
    assert "note: tokens are estimated: one for every" in plan and "36 examples" in plan
    ids, mask = known.encode(None, data.Prompt(), "x" * 362, "y" * 231)
    assert abs(len(ids) - 203) <= 2 and abs(sum(mask) - 101) <= 1  # 100 + 100 and the ends


def test_other_models_and_other_commands_need_the_files(gated):
    for argv, says in (
        ([*SFT[:-1], "google/gemma-5", "--gpu-memory", "24"], "gated .known without it: Llama-3.1-8B, "),
        ([*SFT[:-1], "google/gemma-5"], "gemma-5: gated$"),
        (SFT, "gated; --gpu-memory GIB plans without it$"),
        ([*SFT, "--gpu-memory", "24", "--base", "x"], "gated .known without it"),
    ):
        with pytest.raises(UserError, match=says):
            train_sft.main(argv)


@pytest.mark.skipif(
    not {"NANOGSM_GEMMA1", "NANOGSM_DATA_DIR"} <= os.environ.keys(),
    reason="NANOGSM_GEMMA1: a folder with Gemma 1's tokenizer; NANOGSM_DATA_DIR: GSM8K's files",
)
def test_the_table_is_what_the_tokenizer_counts():
    tokenizer = data.Tokenizer(Path(os.environ["NANOGSM_GEMMA1"]))
    found = count_tokens.count(tokenizer, os.environ["NANOGSM_DATA_DIR"])
    assert json.loads(json.dumps(found)) == known.table()


def test_the_table_has_gsm8k():
    rows = known.table()["main"]
    assert sum(count for count, *_ in rows) == hub.DATA_FILES["train.jsonl"].rows
    assert max(n + m for _, n, m in rows) == 544  # the longest example, which is in it alone


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flags, says",
    [
        *(([f"--gpu-memory={x}"], f"--gpu-memory is {x}: give GiB above 0, at most 10,000")
          for x in ("0", "-1", "nan", "inf", "10001")),
        (["--gpu-memory", "24", "--device", "cpu"], "plans for --device cuda, not for cpu"),
        (["--gpu-memory", "24", "--device", "cuda:9"], "plans for --device cuda, not for cuda:9"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(flags, says):
    for main in (train_sft.main, train_ppo.main):
        with pytest.raises(UserError, match=re.escape(says)):
            main(["--tiny", "--dry-run", *flags])


def test_a_run_has_no_use_for_it(tmp_path):
    with pytest.raises(UserError, match="add --dry-run"):
        train_sft.main(["--tiny", "--gpu-memory", "24", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    assert "gpu_memory" in start.NO_SETTINGS  # or no earlier run could be continued


# --------------------------------------------------------------------------------- the lower bound


def test_operations_worked_out_by_hand():
    full, lora = card.Weights(100, 40, 0), card.Weights(100, 40, 5)
    # 10 tokens, 3 of them predicted. Each weight: 2 forward, 2 for its input's gradient, 2 for its
    # own: 6 x 100 x 10 + 6 x 40 x 3.
    assert card.update_flops(full, 10, 3, "none") == 6000 + 720
    assert card.update_flops(full, 10, 3, "light") == 6720  # recomputes no matrix product
    assert card.update_flops(full, 10, 3, "full") == 6720 + 2000
    # Frozen ones need no gradient: 4 x 1000 + 4 x 120; the adapters 6 x 50.
    assert card.update_flops(lora, 10, 3, "none") == 4000 + 480 + 300
    assert card.update_flops(lora, 10, 3, "full") == 4780 + 2 * 1050


def test_operations_of_gemma_2b():
    """16 examples of 3,678 tokens, 2,193 of them supervised: 50.6 and 34.2 TFLOP, counted op by op
    when the GPU's part was designed."""
    everything = shapes_of("gemma-2b")
    config = read_config(known.FOLDER / "gemma-2b")
    adapters = [(19_611_648,)]  # rank 16
    for found, want in (([], 50.6), (adapters, 34.2)):
        weights = card.weights_of(config, everything, found)
        flops = card.update_flops(weights, 3678, 2193, "none")
        assert round(flops / 1e12, 1) == want


def test_a_step_of_ppo_worked_out_by_hand():
    args = argparse.Namespace(
        rollouts=4, rollout_batch=2, epochs=2, precision="bf16", checkpointing="none", shard=1,
        steps=1, critic_warmup=0,
    )  # fmt: skip
    weights = card.Weights(100, 40, 0)
    flops, read = card.ppo_work(args, weights, asked=10, answer=6, slot=8)
    # 4 prompts of 10 tokens; scored twice, 64 tokens with 24 actions; two epochs of updates.
    prompts = 2 * 100 * 40
    scoring = 2 * 2 * (100 * 64 + 40 * 24)
    updates = 2 * 6 * (100 * 64 + 40 * 24)
    assert flops == prompts + scoring + updates
    # 2 batches x 6 tokens, each reads 140 weights of 2 bytes; 4 rows x 6 tokens read a cache of 13
    # slots on average.
    assert read == 2 * 6 * 280 + 4 * 6 * 13 * 8
    args.steps, args.critic_warmup = 5, 2  # two steps without backward, which is two thirds
    later, five = card.ppo_work(args, weights, 10, 6, 8)
    assert later == 5 * (prompts + scoring) + 3 * updates + 2 * updates / 3 and five == 5 * read
    args.shard = 2  # each device samples two rows
    assert card.ppo_work(args, weights, 10, 6, 8)[1] == 5 * (6 * 280 + 2 * 6 * 13 * 8)


def test_the_bound_names_its_rates_and_is_called_one():
    args = argparse.Namespace(precision="bf16", shard=1)
    text = card.least_time(args, 989e12 * 90)
    assert text.startswith("lower bound at peak rates: 90.0 seconds on an H100 (989 TFLOP/s), ")
    assert "4.8 minutes on an A100 (312 TFLOP/s)" in text  # 90 x 989 / 312 = 285 s
    both = card.least_time(args, 989e12 * 3600, 3350e9 * 7200)
    assert "3.0 hours on an H100 (989 TFLOP/s, 3,350 GB/s)" in both
    args.shard = 2  # half of the operations each, but each device reads its own bytes
    assert "2.5 hours on an H100" in card.least_time(args, 989e12 * 3600, 3350e9 * 7200)
    args.precision = "fp32"
    assert "on an RTX 4090 (82.6 TFLOP/s)" in card.least_time(args, 1e15)


@pytest.mark.parametrize("gib", ["20", "0.001"])
def test_a_step_of_millions_is_planned_in_seconds(gated, capsys, monkeypatch, gib):
    """It has 504 divisors. The flags that are named make it fit all the same."""
    tries = []
    monkeypatch.setattr(card, "fit_card", lambda *a, f=card.fit_card: tries.append(1) or f(*a))
    argv = [*SFT, "--gpu-memory", gib, "--micro-batch", "7207200", "--accumulation", "1"]
    plan = said(capsys, train_sft.main, *argv)
    assert len(tries) < 250
    named = re.findall(r"^(?:or )?add +(--.*?)(?: on \d+ such cards.*)?: 1\.3 x", plan, re.M)
    assert len(named) == 2 * (gib == "20")
    assert all("it fits" in said(capsys, train_sft.main, *argv, *n.split()) for n in named)


def test_smaller_micro_batches_that_divide_a_step():
    assert [*card._smaller(16, 32)] == [8, 4, 2, 1]
    assert [*card._smaller(13, 60)] == [12, 10, 6, 5, 4, 3, 2, 1]  # all of the usual sizes
    assert [*card._smaller(100, 240)] == [48, 24, 16, 15, 12, 10, 8, 6, 5, 4, 3, 2, 1]
    assert [*card._smaller(1, 8)] == []
