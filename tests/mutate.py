"""Does the suite notice a wrong line? Applies named one-line mutations to a copy of the code, one at
a time, and runs the tests that should see red.

    python tests/mutate.py                # all of them
    python tests/mutate.py gae KL         # those whose name contains one of these

Exit status 1 if one goes unnoticed. Not collected by pytest.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PPO, DATA, MODEL, LORA = "train_ppo.py", "nanogsm/data.py", "nanogsm/model.py", "nanogsm/lora.py"
LOGPROB, GENERATE, OPTIM, SFT = (
    "nanogsm/logprob.py", "nanogsm/generate.py", "nanogsm/optim.py", "train_sft.py",
)  # fmt: skip
TESTS = {
    PPO: "test_ppo", DATA: "test_data", MODEL: "test_model", LORA: "test_lora", LOGPROB: "test_logprob",
    GENERATE: "test_generate", OPTIM: "test_optim", SFT: "test_sft", "nanogsm/report/scores.py": "test_scores",
    "nanogsm/run/folder.py": "test_runs", "nanogsm/store/files.py": "test_files", "nanogsm/tiny/problems.py": "test_tiny_problems",
}  # fmt: skip

# name, file, the text (there once), what stands there instead
MUTATIONS = [
    ("PPO: advantage sign", PPO, "return -torch.min(free, clipped)", "return torch.min(free, clipped)"),
    ("PPO: clip on the wrong side", PPO, "return -torch.min(free, clipped)", "return -torch.max(free, clipped)"),
    ("PPO: no lower clip", PPO, "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
    ("PPO: ratio upside down", PPO, "(logp - old_logp).exp()\n    free", "(old_logp - logp).exp()\n    free"),
    ("PPO: value clip takes the smaller", PPO, "torch.max(free, clipped), clipped > free", "torch.min(free, clipped), clipped > free"),
    ("PPO: value loss without 1/2", PPO, "0.5 * (values - returns) ** 2, 0.5", "1.0 * (values - returns) ** 2, 0.5"),
    ("PPO: gamma left out", PPO, "rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value"),
    ("PPO: lambda left out", PPO, "delta + gamma * lam *", "delta + gamma *"),
    ("PPO: value sign in delta", PPO, "* next_value - values[:, t]", "* next_value + values[:, t]"),
    ("PPO: gae looks past the answer", PPO, "next_value = torch.where(mask[:, t], values[:, t], 0.0)", "next_value = values[:, t]"),
    ("PPO: return is the advantage", PPO, "torch.where(mask, advantages + values, 0.0)", "torch.where(mask, advantages, 0.0)"),
    ("PPO: KL rewarded", PPO, "-kl_coef * (logp - ref_logp)", "kl_coef * (logp - ref_logp)"),
    ("PPO: KL on the prompt too", PPO, "torch.where(mask, -kl_coef * (logp - ref_logp), 0.0)", "-kl_coef * (logp - ref_logp)"),
    ("PPO: score one action early", PPO, "torch.where(columns == last, score", "torch.where(columns == last - 1, score"),
    ("PPO: score everywhere", PPO, "torch.where(columns == last, score", "torch.where(mask, score"),
    ("PPO: whitening keeps the mean", PPO, "(x - mean) * torch.rsqrt", "x * torch.rsqrt"),
    ("PPO: whitening counts padding", PPO, "mean = masked_mean(x, mask)\n", "mean = x.mean()\n"),
    ("PPO: k3 without its 1", PPO, "torch.expm1(-d) + d", "(-d).exp() + d"),
    ("PPO: k3 by exp", PPO, "torch.expm1(-d) + d", "(-d).exp() - 1 + d"),
    ("PPO: mask not shifted", PPO, "mask = mask[:, 1:]", "mask = mask[:, :-1]"),
    ("PPO: values one token late", PPO, "values = models.value(hidden[:, :-1])", "values = models.value(hidden[:, 1:])"),
    ("PPO: entropy punished", PPO, "loss - args.entropy_coef", "loss + args.entropy_coef"),
    ("PPO: value loss not weighted", PPO, "args.value_coef * mean(v_loss)", "mean(v_loss)"),
    ("PPO: mean of each cut", PPO, "mean = lambda x: masked_mean(x, mask, count)", "mean = lambda x: masked_mean(x, mask)"),
    ("PPO: warm-up trains the actor", PPO, "            if not warming:\n", "            if True:\n"),
    ("PPO: warm-up trains the head alone", PPO, "            hidden = models.critic(ids, lengths)\n    values", "            hidden = models.critic(ids, lengths).detach()\n    values"),
    ("PPO: temperature forgotten", PPO, "mask[some], args.temperature, True", "mask[some], 1.0, True"),
    ("PPO: a cut answer is rewarded", PPO, "0.0 if done.truncated else float(", "float("),
    ("PPO: reference shares the actor", PPO, "actor, reference = base, frozen_copy(base, bf16)", "actor, reference = base, base"),
    ("PPO: actor's adapters on the critic", PPO, "critic = twin(reference)", "critic = twin(actor)"),
    ("PPO: problems repeat", PPO, "epoch, i = divmod(place, len(problems))", "epoch, i = 0, place % len(problems)"),
    ("data: label shift", DATA, "add(target, 1)", "add(target, 0)"),
    ("data: no end of sequence", DATA, "        add(end, 1)  #", "        pass  #"),
    ("data: end not supervised", DATA, "        add(end, 1)  #", "        add(end, 0)  #"),
    ("data: BOS twice", DATA, "    add(tokenizer.bos_id)  #", "    add(tokenizer.bos_id); add(tokenizer.bos_id)  #"),
    ("data: the space goes to the prompt", DATA, 'add(f"{lead}Question: {question}\\nAnswer:")', 'add(f"{lead}Question: {question}\\nAnswer: ")'),
    ("data: last ####", DATA, 'text.partition("####")', 'text.rpartition("####")'),
    ("data: padding supervised", DATA, "mask = torch.zeros((len(rows), T), dtype=torch.bool)", "mask = torch.ones((len(rows), T), dtype=torch.bool)"),
    ("data: gold answers are not cut", DATA, "kept = cut(answer)", "kept = answer"),
    ("data: one stop id", DATA, "frozenset({self.eos_id, self.end_of_turn_id} |", "frozenset({self.eos_id} |"),
    ("model: w instead of 1 + w", MODEL, "gain = 1.0 + self.weight.float()", "gain = self.weight.float()"),
    ("model: embedding not scaled", MODEL, "c.hidden_size**0.5, dtype", "1.0, dtype"),
    ("model: rotary pairs swapped", MODEL, "torch.cat((-second, first), dim=-1)", "torch.cat((second, -first), dim=-1)"),
    ("model: window one too wide", MODEL, "(distance < window)", "(distance <= window)"),
    ("model: attention scale", MODEL, "c.query_pre_attn_scalar**-0.5", "c.hidden_size**-0.5"),
    ("model: exact GELU", MODEL, 'approximate="tanh"', 'approximate="none"'),
    ("model: cache one short", MODEL, "k[:, :, :n], v", "k[:, :, : n - 1], v"),
    ("LoRA: scale", LORA, "LoRALinear(base, a, torch.zeros(size_out, r), alpha / r)", "LoRALinear(base, a, torch.zeros(size_out, r), alpha)"),
    ("LoRA: merge forgets the scale", LORA, "own = self.scale * self.lora_B", "own = self.lora_B"),
    ("LoRA: merge forgets the adapter below", LORA, "return own + self.base.delta() if isinstance(self.base, LoRALinear) else own", "return own"),
    ("LoRA: two adapters' scales", LORA, "a, b = self.lora_A.weight, self.scale * self.lora_B.weight", "a, b = self.lora_A.weight, self.lora_B.weight"),
    ("LoRA: two adapters not paired", LORA, "torch.cat((below[1], b), dim=1)", "torch.cat((b, below[1]), dim=1)"),
    ("LoRA: the adapter below trains on", LORA, "    model.requires_grad_(False)\n    for name in names:", "    for name in names:"),
    ("LoRA: B not zero", LORA, "torch.zeros(size_out, r), alpha", "torch.ones(size_out, r), alpha"),
    ("model: rows end to end without their windows", MODEL, "[self._mask(kind, row, row, True) for row in rows]", "[None for row in rows]"),
    ("model: rows come back in another order", MODEL, "index_copy(0, real, hidden[0])", "index_copy(0, real.flip(0), hidden[0])"),
    ("model: packed weights stay", MODEL, "                layer.packed = None", "                pass"),
    ("model: the tail's rows lose their keys", MODEL, "            x[:, new] = x[:, old]", "            pass"),
    ("logprob: entropy sign", LOGPROB, "scores.append(total.log() - mean)", "scores.append(total.log() + mean)"),
    ("logprob: the head's gradient without the target's", LOGPROB, "        add_rows(grad, t, by_t[:, None] * low)\n", ""),
    ("logprob: kept terms taken for the last top's", LOGPROB, "d, terms = tops[i] - top,", "d, terms = 0 * top,"),
    ("logprob: the entropy's mean moved the wrong way", LOGPROB, "(mean - d) - grads[0]", "(mean + d) - grads[0]"),
    ("logprob: the head's gradient without the entropy's own term", LOGPROB, " - grads[1] * scale * terms[1]\n", "\n"),
    ("logprob: temperature multiplies", LOGPROB, "z /= temperature", "z *= temperature"),
    ("logprob: slope without the cap's", LOGPROB, "(x if bend is None else x.mul_(bend)).to(dtype)", "x.to(dtype)"),
    ("logprob: earlier blocks' sums not put right", LOGPROB, "            x *= by.exp()", "            pass"),
    ("logprob: ... nor the second of them", LOGPROB, "x[1] += by * x[0]", "pass"),
    ("logprob: the largest logit so far is 0", LOGPROB, "zeros(n) + torch.finfo(torch.float32).min", "zeros(n)"),
    ("logprob: the head's gradient of one micro-batch", LOGPROB, "+= left @ right", "= left @ right"),
    ("logprob: the target stays in the sums", LOGPROB, "e.scatter_(0, at, e.gather(0, at).masked_fill(inside, 0))", "pass"),
    ("logprob: outputs kept on the node", LOGPROB, "ctx.head, ctx.temperature, ctx.block, ctx.n_slopes = head,", "ctx.scores, ctx.head, ctx.temperature, ctx.block, ctx.n_slopes = scores, head,"),
    ("model: a light checkpoint keeps nothing", MODEL, "CheckpointPolicy.MUST_SAVE if", "CheckpointPolicy.PREFER_RECOMPUTE if"),
    ("logprob: a token's other places get no gradient", LOGPROB, "rows, accumulate=True", "rows, accumulate=False"),
    ("logprob: ... on a CPU", LOGPROB, "total.index_add_(0, ids, rows)", "total[ids] += rows"),
    ("logprob: kept for a gradient that nobody asks for", LOGPROB, " if torch.is_grad_enabled() else head.weight.detach()", ""),
    ("generate: a token's place in its block", GENERATE, "return (block * width + token).clamp", "return token.clamp"),
    ("generate: blocks' sums with tops of their own", GENERATE, "(sums * (tops - tops.amax(0)).exp())", "sums"),
    ("generate: the last of equal tokens", GENERATE, "(largest > top).nonzero()", "(largest >= top).nonzero()"),
    ("generate: a group looks as far as another", GENERATE, "used = [max(used[i : i + size]) for i in", "used = [min(used[i : i + size]) for i in"),
    ("generate: prefill off by one", GENERATE, "[len(p) - 1 for", "[len(p) - 2 for"),
    ("generate: uniform numbers by place", GENERATE, "request[s] for s in places])  # -1", "s for s in places])  # -1"),
    ("generate: stop token ignored", GENERATE, "over = i in stop_ids or is_over", "over = is_over"),
    ("optim: no bias correction", OPTIM, "self.lr / (1 - beta1**self.step_count)", "self.lr"),
    ("optim: decay on norms", OPTIM, "if p.dim() >= 2 else 1.0", "if p.dim() >= 1 else 1.0"),
    ("optim: steps not restored", OPTIM, 'self.step_count = int(tensors["step_count"])', "pass"),
    ("optim: cosine upside down", OPTIM, "(1 + math.cos(", "(1 - math.cos("),
    ("SFT: loss by micro-batch", SFT, "part = -logp.sum() / supervised", "part = -logp.sum() / mask.sum()"),
    ("SFT: no shift", SFT, "hidden[:, :-1], ids[:, 1:], mask[:, 1:])\n        part", "hidden[:, :-1], ids[:, :-1], mask[:, :-1])\n        part"),
    ("SFT: same order every epoch", SFT, "seed * 1_000_003 + epoch", "seed * 1_000_003"),
    ("files: nothing is put back", "nanogsm/store/files.py", "        put_back()\n        shutil", "        shutil"),
    ("scores: percent without brackets", "nanogsm/report/scores.py", 'r"(\\1/100)"', 'r"\\1/100"'),
    ("scores: McNemar one-sided", "nanogsm/report/scores.py", "min(1.0, 2 * sum", "min(1.0, sum"),
    ("scores: Wilson without its centre", "nanogsm/report/scores.py", "p + z2n / 2", "p"),
]  # fmt: skip


def red(test: str, folder: Path) -> bool:
    """Whether a test file fails there; one that does not end has noticed something, too."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=900).returncode == 1
    except subprocess.TimeoutExpired:
        return True


def noticed(name: str, file: str, old: str, new: str) -> bool:
    """Whether the tests of `file` fail on a copy of the repository with this mutation in it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{name}: {file} has its text {text.count(old)} times: bring this list up to date")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache")
        shutil.copytree(ROOT, copy, ignore=ignore)
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        test = f"tests/{TESTS[file]}.py"
        return red(test, copy)


def main() -> int:
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or any(text in m[0] for text in sys.argv[1:])]
    survivors = []
    for test in sorted({f"tests/{TESTS[file]}.py" for _, file, *_ in wanted}):
        if red(test, ROOT):
            sys.exit(f"{test} fails as it is: what it would notice says nothing")
    for mutation in wanted:
        began = time.time()
        seen = noticed(*mutation)
        print(f"{'noticed' if seen else 'SURVIVED':<9} {mutation[0]} ({time.time() - began:.0f} s)", flush=True)
        survivors += [] if seen else [mutation[0]]
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
