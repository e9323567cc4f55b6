"""Many devices give what one gives. Two to four processes on the CPU, joined by gloo, stand for GPUs.

Processes are forked from this one, which has PyTorch loaded, so that they start at once. Each test
has a limit of time: ranks that wait for each other would wait for an hour.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp  # here once, and not for two seconds in every process
from conftest import FIXTURES, slow
from safetensors.torch import load_file

import evaluate
import train_ppo
import train_prm
import train_sft
from nanogsm import UserError, boxed, data, distributed, generate, optim
from nanogsm.model import load_model, sampler_of, save_model
from nanogsm.run import card, console, loop, machine
from nanogsm.run.critic import find_critic

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes with PyTorch in them")

SECONDS = 90


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(count: int, do, *args) -> list:
    """What do(*args) returns on each of `count` ranks, or (type's name, message) of what it raises.
    The test fails if a rank gives no answer within SECONDS."""
    port = free_port()

    def one(rank: int, pipe) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        torch.set_num_threads(1)
        try:
            distributed.start()
            pipe.send(do(*args))
            distributed.end()
        except BaseException as e:
            pipe.send((type(e).__name__, str(e)))
        os._exit(0)

    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [context.Process(target=one, args=(r, p[1])) for r, p in enumerate(pipes)]
    for process in processes:
        process.start()
    try:
        found = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(SECONDS), f"rank {rank} gave no answer"
            found.append(receiver.recv())
        return found
    finally:
        for process in processes:
            process.join(5)
            process.kill()


# ------------------------------------------------------------------------------- what travels


def test_every_card_is_dealt_once():
    sizes = (0, 1, 2, 3, 5, 6)
    found = on_ranks(3, lambda: [[*distributed.deal(list(range(n)))] for n in sizes])
    for n, *hands in zip(sizes, *found):
        assert sorted(sum(hands, [])) == list(range(n))
        assert max(map(len, hands)) == -(-n // 3) and min(map(len, hands)) == n // 3


def test_sums_and_messages():
    def meet():
        rank = distributed.RANK
        x, y = torch.tensor([1.0, rank]), torch.full((2, 2), 10.0**rank)
        distributed.add_up(x, y)
        top = distributed.largest(torch.tensor(float(rank == 1)))
        told = distributed.gathered({"rank": rank, "text": "ä" * rank, "none": None})
        heard = distributed.on_rank_0(lambda: [rank, float("inf")])
        signals = distributed.agreed(15 if rank == 1 else None), distributed.agreed(None)
        return x.tolist(), y.tolist(), top.item(), told, heard, signals

    for x, y, top, told, heard, signals in on_ranks(3, meet):
        assert x == [3.0, 3.0] and y == [[111.0, 111.0]] * 2 and top == 1.0
        assert told == [{"rank": r, "text": "ä" * r, "none": None} for r in range(3)]
        assert heard == [0, float("inf")] and signals == (15, None)


def test_gradients_are_added_and_not_divided(monkeypatch):
    """Small ones together, large ones alone, and where a rank has none."""
    monkeypatch.setattr(distributed, "SMALL", 10)

    def add():
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 20, 5)]
        for i, p in enumerate(params[: 4 - distributed.RANK]):
            p.grad = torch.full_like(p, (i + 1) * 10.0**distributed.RANK)
        distributed.add_up_gradients(params)
        return [p.grad.tolist() for p in params]

    want = [[11.0] * 3, [22.0] * 4, [33.0] * 20, [4.0] * 5]
    assert on_ranks(2, add) == [want, want]


def test_a_user_error_of_rank_0_is_raised_on_all():
    def fail():
        def find():
            raise UserError("in use")

        distributed.on_rank_0(find)

    assert on_ranks(3, fail) == [("UserError", "in use")] * 3


def test_machines_with_different_versions_are_refused(monkeypatch):
    def meet():
        return distributed.COUNT

    real = distributed.gathered
    fake = lambda mine: [[f"2.{11 + i}", *v[1:]] for i, v in enumerate(real(mine))]  # noqa: E731
    monkeypatch.setattr(distributed, "gathered", fake)
    for name, text in on_ranks(2, meet):
        assert name == "UserError" and "rank 0 has 2.11 on Python" in text and "2.12" in text


# ------------------------------------------------------------------------------- whole runs

SFT = ["--tiny", "--device", "cpu", "--max-examples", "45", "--val-examples", "5", "--epochs", "1",
       "--lr", "0.002", "--warmup", "0.03", "--micro-batch", "8", "--accumulation", "2",
       "--max-new-tokens", "16", "--optim", "adamw"]  # fmt: skip
PPO = ["--tiny", "--device", "cpu", "--init", "tiny", "--steps", "2", "--rollouts", "14",
       "--micro-batch", "2", "--accumulation", "3", "--val-examples", "4", "--val-every", "1",
       "--max-new-tokens", "16", "--optim", "adamw", "--entropy-coef", "0.01"]  # fmt: skip
OF_THE_CLOCK = ("seconds", "peak_memory")


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line).items() for line in lines]
    return [{k: v for k, v in row if not k.startswith(OF_THE_CLOCK)} for row in kept]


def weights(folder: Path) -> dict:
    [file] = [*folder.glob("model/model.safetensors"), *folder.glob("adapter/*.safetensors")]
    return load_file(file)


def near(a: Path, b: Path, rel: float) -> None:
    """Two runs agree: every metric within rel, and the weights within a hundredth of their way."""
    for x, y in zip(rows(a), rows(b), strict=True):
        assert y == pytest.approx(x, rel=rel, abs=1e-6), x["step"]
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-4) for k in x)


def without_shard(flags: list) -> list:
    at = flags.index("--shard") if "--shard" in flags else len(flags)
    return flags[:at] + flags[at + 2 :]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns a function that runs a script on one device, once for each list of flags."""
    place, known = tmp_path_factory.mktemp("alone"), {}

    def run(script, flags: list) -> Path:
        key = (script.__name__, *flags)
        if key not in known:
            known[key] = place / str(len(known))
            assert script.main([*flags, "--out", str(known[key])]) == 0
        return known[key]

    return run


@pytest.fixture(autouse=True)
def one_thread():
    """So that sums inside a product have one order, here and on the ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHARDED = [
    (2, ["--shard", "2"]),
    pytest.param(3, ["--shard", "3", "--checkpointing", "light"], marks=slow),
    (4, ["--shard", "2", "--val-every", "2"]),
]


@pytest.mark.parametrize("count, more", [(2, []), (3, ["--lora"]), *SHARDED])
def test_sft_is_the_same_on_many_devices(alone, tmp_path, count, more):
    out = tmp_path / "many"
    assert on_ranks(count, train_sft.main, [*SFT, *more, "--out", str(out)]) == [0] * count
    near(alone(train_sft, [*SFT, *without_shard(more)]), out, 2e-5)
    assert json.loads((out / "run_args.json").read_text())["info"]["devices"] == count


PPO_LORA = ["--lora", "--critic", "separate", "--critic-warmup", "1"]
GRPO = ["--advantage", "grpo", "--group", "2", "--shard", "3", "--penalty-no-answer", "0.3"]


SHARED = pytest.param(["--shard", "3", "--critic-warmup", "1"], marks=slow)


@pytest.mark.parametrize("more", [[], pytest.param(PPO_LORA, marks=slow), SHARED, GRPO])
def test_ppo_is_the_same_on_many_devices(alone, tmp_path, more, monkeypatch):
    """14 answers in updates of 6, 6 and 2, on 3 ranks: unequal shares, and once none at all."""
    reward = lambda completion, *_: float(len(completion) % 2)  # noqa: E731
    monkeypatch.setattr(train_ppo, "reward", reward)
    out = tmp_path / "many"
    assert on_ranks(3, train_ppo.main, [*PPO, *more, "--out", str(out)]) == [0] * 3
    one = alone(train_ppo, [*PPO, *without_shard(more)])
    near(one, out, 1e-4)
    assert (one / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()
    first = next(row for row in rows(out) if "kl" in row)
    assert first["first_ratio_error"] == 0 and first["kl"] == 0 and first["kl_sequence"] == 0
    if more is GRPO:
        assert first["reward_no_answer"] < 0
        assert not list(out.glob("value_head*"))
        return
    a, b = (load_file(f / "value_head.safetensors") for f in (one, out))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert find_critic(str(out)).separate == ("separate" in more)


def test_an_untied_output_head_in_parts(tmp_path):
    """Two micro-batches on three ranks: one rank is dealt nothing, and its part of the head, which
    forward does not use, has to take part in the sum. Then sampling and saving."""
    examples = [data.Example([2, 9, 40, 7, i], [0, 0, 1, 1, 1], i) for i in (30, 50)]

    def work(shard: int):
        model, tokenizer = load_model(FIXTURES / "llama30", torch.float32, shard=shard)
        loss = train_sft.backward_step(model, examples, 1, 0, contextlib.nullcontext)
        grads = {n: distributed.whole(p.grad).tolist() for n, p in model.named_parameters()}
        with sampler_of(model, False) as sampler:
            [found] = generate.generate(sampler, [[2, 9, 40]], frozenset(), 6)
        save_model(model, tokenizer, tmp_path / str(shard))
        return loss.item(), grads, found.ids

    loss, grads, ids = work(1)
    for other_loss, others, other_ids in on_ranks(3, work, 3):
        assert other_loss == pytest.approx(loss, rel=1e-6) and other_ids == ids
        for name, grad in grads.items():
            a, b = torch.tensor(grad), torch.tensor(others[name])
            assert a.any() and (a - b).abs().max() <= 1e-5 * a.abs().max(), name
    one, parts = (load_file(tmp_path / f / "model.safetensors") for f in "13")
    assert one.keys() == parts.keys() and all(torch.equal(one[k], parts[k]) for k in one)


@pytest.mark.parametrize("flags", [[], ["--samples", "2", "--temperature", "0.9"]])
def test_an_evaluation_is_the_same_to_the_byte(tmp_path, flags):
    argv = ["--tiny", "--device", "cpu", "--n", "7", "--max-new-tokens", "16", *flags]
    assert evaluate.main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert on_ranks(3, evaluate.main, [*argv, "--out", str(tmp_path / "many")]) == [0] * 3
    [one], [many] = ((tmp_path / f).glob("*.jsonl") for f in ("one", "many"))
    assert one.read_bytes() == many.read_bytes() and one.read_bytes()
    figures = [json.loads(f.with_suffix(".json").read_text())["accuracy"] for f in (one, many)]
    assert figures[0] == figures[1]


def test_a_critic_chooses_the_same_answers(alone, tmp_path):
    run = str(alone(train_ppo, PPO))
    argv = ["--tiny", "--device", "cpu", "--n", "5", "--max-new-tokens", "8", "--samples", "3",
            "--temperature", "0.9", "--batch-size", "4", "--rerank", run]  # fmt: skip
    assert evaluate.main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert on_ranks(3, evaluate.main, [*argv, "--out", str(tmp_path / "many")]) == [0] * 3
    [one], [many] = ((tmp_path / f).glob("*.jsonl") for f in ("one", "many"))
    a, b = ([json.loads(x) for x in f.read_text().splitlines()] for f in (one, many))
    assert [r.pop("value") for r in a] == pytest.approx([r.pop("value") for r in b], abs=1e-6)
    assert a == b


def test_processes_with_different_settings_are_refused():
    """A second machine with an old file, or a flag that was given to one only."""
    def check():
        distributed.check_same({"a": 1, "b": [2]})
        distributed.check_same({"a": 1, "lr": 0.1 + 0.1 * (distributed.RANK == 2), "b": None})

    for name, text in on_ranks(3, check):
        assert name == "UserError" and "the processes differ in lr: start the same" in text


@pytest.mark.parametrize(
    "mine, says",
    [(lambda r: {"a": 1, "own": 2} if r == 0 else {"a": 1}, "own"),
     (lambda r: {"a": 1, "own": None} if r == 1 else {"a": 1}, "own"),
     (lambda r: {"a": 1} if r == 0 else [None, None], "what they do"),
     (lambda r: {f"x{i:02}": r for i in range(11)},
      "x00, x01, x02, x03, x04, x05, x06, x07 and 3 more")],
)  # fmt: skip
def test_a_rank_that_lacks_a_setting_or_says_something_else_is_refused(mine, says):
    for name, text in on_ranks(2, lambda: distributed.check_same(mine(distributed.RANK))):
        assert name == "UserError" and f"the processes differ in {says}: start" in text


@pytest.mark.parametrize(
    "main, argv, more, says",
    [(train_sft.main, SFT, ["--dry-run"], "dry_run"),
     (train_sft.main, SFT, ["--overwrite"], "overwrite"),
     (train_ppo.main, ["--tiny", "--init", "tiny"], ["--reward", "own.py"], "reward"),
     (train_prm.main, ["--tiny", "--data", "x.jsonl"], ["--lr", "0.5"], "lr"),
     (evaluate.main, ["--tiny"], ["--ask", "1?"], "ask"),
     (evaluate.main, ["--tiny"], ["--compare", "a", "b"], "compare"),
     (evaluate.main, ["--tiny", "--samples", "2", "--temperature", "1"], ["--rerank", "x"],
      "rerank")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("on", [0, 1])
def test_a_flag_of_one_rank_alone_is_refused(tmp_path, monkeypatch, main, argv, more, says, on):
    monkeypatch.chdir(tmp_path)
    for name, text in on_ranks(2, lambda: main([*argv, *more * (distributed.RANK == on)])):
        assert name == "UserError" and f"the processes differ in {says}: start" in text
    assert not [*tmp_path.iterdir()]


def test_ranks_with_different_scripts_are_refused():
    def meet():
        sys.argv = [f"/somewhere/{('train_sft.py', 'evaluate.py')[distributed.RANK]}"]
        (train_sft.main, evaluate.main)[distributed.RANK](["--tiny"])

    for name, text in on_ranks(2, meet):
        assert name == "UserError" and "the processes differ in the script: start" in text


def test_machines_may_have_files_and_devices_of_their_own():
    def meet():
        sys.argv = [f"/home/{distributed.RANK}/train_sft.py"]
        places = {name: f"/data{distributed.RANK}" for name in (*console.PLACES, "device")}
        found = SimpleNamespace(**places, seed=3, data_dir=[None, "/x"][distributed.RANK])
        return console.same_command(found) is found

    assert on_ranks(2, meet) == [True, True]


@pytest.mark.parametrize(
    "changed, says",
    [({"RANK": "x"}, "RANK is 'x', which"), ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', which"),
     ({"RANK": "-1"}, "RANK is '-1', which"), ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', which"),
     ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"), ({"MASTER_PORT": "http"}, "MASTER_PORT is"),
     ({"WORLD_SIZE": "0"}, "RANK is 0, and must be below WORLD_SIZE, which is 0"),
     ({"RANK": "5"}, "RANK is 5, and must be below WORLD_SIZE, which is 2"),
     ({"RANK": "2"}, "RANK is 2, and must be below WORLD_SIZE, which is 2")],
    ids=str,
)  # fmt: skip
def test_ranks_that_cannot_be_are_refused_before_any_waits(monkeypatch, changed, says):
    usual = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "1"}  # fmt: skip
    for name, text in (usual | changed).items():
        monkeypatch.setenv(name, text)
    for name in ("RANK", "COUNT"):  # which would be put back
        monkeypatch.setattr(distributed, name, getattr(distributed, name))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=says):
        distributed.start()
    assert (distributed.RANK, distributed.COUNT) == (0, 1)


def test_a_run_with_another_seed_on_one_rank_is_refused(tmp_path):
    def train():
        seed = ["--seed", str(distributed.RANK)]
        return train_sft.main([*SFT, *seed, "--out", str(tmp_path / "run")])

    for name, text in on_ranks(2, train):
        assert name == "UserError" and "the processes differ in seed" in text
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_merged_into_parts(tmp_path):
    """SFT --shard 2 that starts from an adapter: as on one device."""
    adapter = tmp_path / "adapter"
    assert train_sft.main([*SFT, "--lora", "--out", str(adapter)]) == 0
    more = ["--model", str(adapter), "--val-examples", "5"]
    assert train_sft.main([*SFT, *more, "--out", str(tmp_path / "one")]) == 0
    argv = [*SFT, *more, "--shard", "2", "--out", str(tmp_path / "many")]
    assert on_ranks(2, train_sft.main, argv) == [0, 0]
    near(tmp_path / "one", tmp_path / "many", 2e-5)


def leaves_late(seconds: float) -> float:
    """When rank 0 is done, and when this rank leaves."""
    began = time.time()
    if distributed.RANK == 0:
        time.sleep(seconds)
    distributed.end()
    return time.time() - began


def test_no_rank_leaves_before_all_have_done_their_work():
    """torchrun ends those that are still writing soon after the first has left."""
    assert min(on_ranks(2, leaves_late, 1.0)) >= 0.9


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "COUNT", 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 has no GPU: this machine has 2"):
        distributed.local_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.local_device("cuda") == "cuda:2" and distributed.local_device("cpu") == "cpu"
    for device in ("cuda:0", "mps"):
        with pytest.raises(UserError, match=f"--device {device}: under torchrun give cuda or cpu"):
            distributed.local_device(device)


def test_the_gpu_with_the_least_memory_decides_for_all(monkeypatch):
    """Or ranks would split a step differently, and wait for each other for ever."""
    free = lambda device: (5 - distributed.RANK) * 2**30 if device == "cuda" else None  # noqa: E731
    monkeypatch.setattr(machine, "free_memory", free)
    ask = lambda device: card.memory(SimpleNamespace(gpu_memory=None, device=device))  # noqa: E731
    assert on_ranks(3, lambda: [ask("cuda"), ask("cpu")]) == [[3 * 2**30, None]] * 3


def test_fewer_prompts_than_ranks_are_completed():
    model, _ = load_model(FIXTURES / "gemma3", torch.float32)
    argv = (model, [[2, 5, 6], [2, 7]], frozenset(), 4)
    want = [list(c) for c in generate.generate(*argv)]
    found = on_ranks(4, lambda: [list(c) for c in generate.generate(*argv)])
    assert found == [want] * 4


# ------------------------------------------------------------------------ stop and continue


def stop_after(step: int, rank: int) -> None:
    """A signal to one rank alone, once it has finished `step`."""
    real = loop.Run.end_step

    def end_step(self, *args):
        if self.step + 1 == step and distributed.RANK == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    loop.Run.end_step = end_step


def run_sft(out: Path, more: list, stop: int | None = None) -> int:
    if stop:
        stop_after(stop, rank=1)
    return train_sft.main([*SFT, *more, "--out", str(out)])


@pytest.mark.parametrize(
    "more", [pytest.param(["--optim", "adamw8bit"], marks=slow), ["--shard", "2"]]
)
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(tmp_path, more):
    """On the same number of ranks to the bit, on another within rounding."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert on_ranks(2, run_sft, whole, more) == [0, 0]
    assert on_ranks(2, run_sft, halved, more, 2) == [143, 143]
    assert (halved / "checkpoint/step-2").is_dir()
    assert on_ranks(2, run_sft, halved, more) == [0, 0]
    assert rows(whole) == rows(halved)
    a, b = weights(whole), weights(halved)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_goes_on_with_another_number_of_devices(alone, tmp_path):
    """Two parts, then one device, then three replicas."""
    out = tmp_path / "run"
    assert on_ranks(2, run_sft, out, ["--shard", "2"], 1) == [143, 143]
    stop = lambda: (stop_after(2, rank=0), run_sft(out, []))[1]  # noqa: E731
    assert on_ranks(1, stop) == [143]
    assert on_ranks(3, run_sft, out, []) == [0] * 3
    near(alone(train_sft, SFT), out, 2e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_rows_of_a_matrix_are_updated_as_in_the_whole_to_the_bit(count, monkeypatch):
    """8-bit AdamW with several chunks, uneven parts and an empty one."""
    monkeypatch.setattr(optim, "CHUNK", 3000)
    shapes = {"embedding": (831, 128), "odd": (77, 160), "norm": (4608,), "B": (512, 16),
              "one": (1, 4096)}  # fmt: skip

    def compare():
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = torch.distributed.init_device_mesh("cpu", (distributed.COUNT,))
        put = lambda t: distribute_tensor(t, mesh, [Shard(0)])  # noqa: E731
        torch.manual_seed(0)
        start = {n: torch.randn(s) for n, s in shapes.items()}
        plain = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
        parts = {n: torch.nn.Parameter(put(t.clone())) for n, t in start.items()}
        a, b = (optim.AdamW(x.items(), 1e-3, weight_decay=0.1) for x in (plain, parts))
        for _ in range(3):
            for n, s in shapes.items():
                plain[n].grad = torch.randn(s)
                parts[n].grad = put(plain[n].grad)
            a.step()
            b.step()
        whole = {k: distributed.whole(t) for k, t in b.state_tensors().items()}
        equal = all(torch.equal(t, whole[k]) for k, t in a.state_tensors().items())
        return equal, b.state_bytes() < a.state_bytes()

    assert on_ranks(count, compare) == [(True, True)] * count


def test_a_run_that_is_in_use_or_finished_is_said_to_all(tmp_path, alone):
    done = alone(train_sft, SFT)
    assert on_ranks(2, train_sft.main, [*SFT, "--out", str(done)]) == [0, 0]
    other = [*SFT, "--lr", "0.5", "--out", str(done)]
    for name, text in on_ranks(2, train_sft.main, other):
        assert name == "UserError" and "lr was" in text


@pytest.mark.parametrize(
    "flags, says",
    [(["--shard", "4"], "--shard 4 needs a multiple of that many devices"),
     (["--shard", "3", "--lora"], "--shard is for full fine-tuning"),
     (["--shard", "0"], "--shard is 0")],
)  # fmt: skip
def test_parts_that_cannot_be_are_refused(flags, says):
    for name, text in on_ranks(3, train_sft.main, [*SFT, *flags]):
        assert name == "UserError" and says in text


def test_a_dry_run_says_what_each_device_needs(capsys):
    found = []
    for n in ("1", "4"):
        argv = [*SFT, "--shard", n, "--device", "cpu", "--dry-run"]
        assert train_sft.main(argv) == 0
        said = capsys.readouterr().out
        names = ("weights", "gradients", "optimizer")
        found.append([float(re.search(rf"{name} +([0-9.]+) MiB", said)[1]) for name in names])
    assert "4 x cpu, every 4 share one copy" in said and "gathered" in said
    assert found[0] == pytest.approx([4 * x for x in found[1]], rel=0.02)


@pytest.mark.parametrize("script", [train_sft, train_prm])
def test_a_step_smaller_than_the_number_of_devices_is_refused(script):
    argv = ["--tiny", "--device", "cpu", "--data", "x.jsonl", "--dry-run"]
    argv += ["--micro-batch", "1", "--accumulation", "2"]
    for name, text in on_ranks(3, script.main, argv):
        assert name == "UserError" and "a step of 1 x 2 is too small for 3 devices" in text


# ------------------------------------------------------------------------------ real processes


def torchrun(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(free_port()), *argv]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=SECONDS)  # fmt: skip


def test_a_bad_flag_under_torchrun_is_one_error_line(tmp_path):
    """torchrun has a flag --nnodes and would take evaluate.py's --n for it, but for the "--"."""
    done = torchrun(tmp_path, "--", str(Path(evaluate.__file__)), "--tiny", "--n", "0")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: --n is 0: give at least 1"] and done.returncode != 0
    assert "terminate called" not in done.stderr, done.stderr  # the ranks' threads end with them


def fail_on_rank_1(error: BaseException) -> None:
    """The others wait for it. (They all see --help.)"""
    if distributed.RANK == 1 or isinstance(error, SystemExit):
        raise error
    distributed.gathered(None)


@pytest.mark.parametrize(
    "error, status, line",
    [(UserError("wrong"), 2, "error: wrong"), (SystemExit(0), 0, ""),
     (SystemExit("text"), 1, "error: text"),  # os._exit takes numbers only
     (KeyboardInterrupt(), 130, "stopped at once"), (KeyError("bug"), 1, "KeyError: 'bug'")],
    ids=["user error", "--help", "sys.exit with a text", "Ctrl-C", "bug"],
)  # fmt: skip
def test_a_rank_that_fails_ends_all_with_one_message(tmp_path, error, status, line):
    """Also if it ends by --help: its threads must not be aborted, which would be a core dump."""
    port, said = free_port(), tmp_path / "stderr"

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = open(2, "w", closefd=False)
        console.entry(lambda: fail_on_rank_1(error))

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one, args=(rank,)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
        process.kill()
    assert ranks[1].exitcode == status and {p.exitcode for p in ranks} <= {status, 1, 2}
    text = said.read_text()
    assert line in text and "terminate" not in text, text
    assert text.count("error: ") == line.startswith("error: ")
    assert text.count("Traceback") == isinstance(error, KeyError)


def test_a_rank_that_is_killed_loses_nothing_that_was_saved(tmp_path, alone):
    """Rank 1 kills itself at the end of the second step. One device finishes the run."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "import train_sft\n"
        "from nanogsm import distributed\n"
        "from nanogsm.run import console, loop\n"
        "real = loop.Run.end_step\n"
        "def end_step(self, *args):\n"
        "    if self.step + 1 == 2 and distributed.RANK == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *args)\n"
        "loop.Run.end_step = end_step\n"
        "console.entry(lambda: train_sft.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "run"
    done = torchrun(tmp_path, str(script), *SFT, "--save-every", "1", "--out", str(out))
    assert done.returncode != 0 and "Traceback (most recent call last)" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1 and all("lost another rank" in line for line in lines), done.stderr
    assert [*(out / "checkpoint").glob("step-[12]")]
    assert train_sft.main([*SFT, "--save-every", "1", "--out", str(out)]) == 0
    near(alone(train_sft, SFT), out, 2e-5)


def test_one_process_knows_nothing_of_others():
    assert (distributed.RANK, distributed.COUNT) == (0, 1)
    batch = [data.Example([1], [1], i) for i in range(5)]
    assert [len(x) for x in data.micro_batches(batch, 2)] == [2, 2, 1]
    assert data.micro_batches([], 2) == []
    assert console._fail("x") == 2


def test_rank_0_grades_boxes_and_the_others_hear_of_it(monkeypatch):
    monkeypatch.setattr(boxed, "_ask", lambda *_: boxed.Verdict(distributed.RANK == 0))
    boxed._grade_on_all.cache_clear()
    found = on_ranks(2, lambda: [boxed.grade("6", gold).right for gold in ("7", "6", "8")])
    assert found == [[True, True, True]] * 2  # rank 1 itself would say that 6 is not 7


def test_what_rank_0_grades_alone_pushes_out_nothing_that_all_have_graded(monkeypatch):
    """Or it would ask again, and the ranks would be out of step."""
    monkeypatch.setattr(boxed, "_ask", lambda *_: boxed.Verdict(True))
    memories = {name: getattr(boxed, name) for name in ("_grade_on_all", "_grade_alone")}
    small = {old: functools.lru_cache(3)(old.__wrapped__) for old in memories.values()}
    for name, old in memories.items():
        monkeypatch.setattr(boxed, name, small[old])

    def steps():
        for answer in "ababcdabcd":
            many = [f"{answer}{i}" for i in range(3)]
            distributed.on_rank_0(lambda: [boxed.grade(each, "x").right for each in many])
            boxed.grade(answer, "x")
        return distributed.gathered("done")

    assert on_ranks(2, steps) == [["done", "done"]] * 2
