"""One PPO step by nanogsm against the same step through transformers: rollout, scoring, update.

    python -m benchmarks.ppo_speed --data tiny --rollout-batch 256 --micro-batch 64 --accumulation 4
    python -m benchmarks.ppo_speed --model PATH --lora --rollouts 64 --checkpointing light

Our side does what train_ppo.py does between two rows of its metrics. The peer does the same with
transformers' generate() and models, and with peft's adapters. It is written as somebody would write
it who has read trl's trainers:

- Rollout: generate() on batches of prompts, sorted by length, padded on the left; temperature 1.
- Scoring: prompts are padded on the left and answers on the right, so that only the answers'
  columns are projected onto the vocabulary. The answers of an update are sorted by length. The
  reference is a second model, or the actor without its adapters. Values come from a value head.
- Update: the same micro-batches, the same loss, gradients scaled down to norm 1, and AdamW with
  32-bit moments.

The two sides sample with different random numbers, so each rollout is timed on its own. For scoring
and update the peer gets our answers, and its log-probs and losses must then agree with ours. Whole
steps are compared at the same number of answers. The peer may have sampled a few percent more or
fewer tokens than it scores; both numbers are recorded. Rewards and advantages are computed by
train_ppo's own functions on both sides and take almost no time. Each side is a process of its own,
and they take turns (sides.py).
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import train_ppo
from benchmarks.sides import Side, Turns, check, compete, matrices_of, matrix_rate, now
from nanogsm import data
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.model import save_adapter
from nanogsm.run import card, console, flags, machine
from nanogsm.store import files, hub

PACKAGES = ("torch", "transformers", "peft")
PHASES = ("rollout", "scoring", "update")
AGREE = ("mean log-prob", "KL per token", "value loss")  # what both sides must agree on
MAX_GRAD_NORM = 1.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Time a PPO step: nanogsm against transformers.")
    add = p.add_argument
    add("--model", default="runs/tiny/sft-full-main", help="Run or folder of a whole model.")
    add("--data", default="main", help="main, socratic, tiny or a .jsonl file of your own.")
    flags.add_data_dir_flag(p)
    add("--lora", action="store_true", help="Train adapters of the actor, not all weights.")
    add("--rollouts", type=int, default=512, help="Answers sampled per step.")
    add("--rollout-batch", type=int, default=64, help="Answers sampled per batch.")
    add("--micro-batch", type=int, default=16, help="Answers that go through the model at once.")
    add("--accumulation", type=int, default=8, help="Micro-batches per update.")
    add("--max-new-tokens", type=int, default=128, help="Longest answer, in tokens.")
    add("--checkpointing", choices=CHECKPOINTING, default="none", help="What our backward computes "
        "again. The peer's computes every block again, or nothing.")  # fmt: skip
    add("--rounds", type=int, default=2, help="Counted steps of each side.")
    add("--json", help="File for all results.")
    flags.add_compute_flags(p)
    add("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    add("--scratch", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    numbers = ("rollouts", "rollout_batch", "micro_batch", "accumulation", "max_new_tokens")
    flags.check_numbers(args, dict.fromkeys((*numbers, "rounds"), 1))
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    return args


def ppo_args(args) -> argparse.Namespace:
    """train_ppo's arguments: the tuned recipe, and what the command line gives."""
    given = ["--recipe", "tuned", "--init", args.model, "--optim", "adamw", "--val-examples", "0"]
    names = ("rollouts", "rollout_batch", "micro_batch", "accumulation", "max_new_tokens")
    for name in (*names, "device", "precision", "checkpointing"):
        given += [flags.flag_of(name), str(getattr(args, name))]
    return train_ppo.parse_args(given + ["--lora"] * args.lora)


# ----------------------------------------------------------------------------------- the workers


def ours(args, turns: Turns) -> None:
    ppo = ppo_args(args)
    setup = train_ppo.set_up(ppo, hub.find_model(args.model), data.Prompt(), train_ppo.reward)
    if args.lora:  # the peer starts from the same adapters
        save_adapter(setup.models.actor, Path(args.scratch) / "adapter", args.model)
    problems = data.load_problems(args.data, "train", args.data_dir)
    dtype = machine.dtype_of(args.precision)
    turns.ready(matrix_rate=matrix_rate(args.device, dtype))
    for step in range(args.rounds + 1):
        chosen = data.problems_of_step(problems, step, args.rollouts, ppo.seed)
        turns.begin()
        start = now(args.device)
        answers = train_ppo.sample(setup, chosen, step, lambda finished, tokens: None)
        sampled = now(args.device)
        rollout = train_ppo.score(setup, answers)
        mask = rollout.mask
        rewards = train_ppo.token_rewards(
            rollout.scores, rollout.logp, rollout.ref_logp, mask, ppo.kl_coef
        )
        advantages, returns = train_ppo.gae(rewards, rollout.values, mask, ppo.gamma, ppo.lam)
        metrics = train_ppo.rollout_metrics(answers, rollout, rewards, returns, ppo)
        advantages = train_ppo.whiten(advantages, mask)
        scored = now(args.device)
        # The peer scores these answers, and learns from them.
        given = [(a["example"].ids, sum(a["example"].mask), a["score"]) for a in answers]
        files.write_json(Path(args.scratch) / f"rollout-{step}.json", {"rows": given})
        start_update = now(args.device)
        metrics |= train_ppo.update(setup, rollout, advantages, returns, step)
        done = now(args.device)
        seconds = sampled - start, scored - sampled, done - start_update
        turns.end(
            phases=dict(zip(PHASES, seconds)),
            sampled=int(mask.sum()),
            scored=int(mask.sum()),
            products=products_of(setup.models, rollout, ppo),
            agree=[rollout.logp[mask].mean().item(), metrics["kl"], metrics["value_loss"]],
        )
    turns.rest()


def products_of(models: train_ppo.Models, rollout: train_ppo.Rollout, ppo) -> dict[str, int]:
    """Operations of the products with weights in each phase, each done once (run/card.py).

    The last token of an answer is left out, because nothing is predicted from it. Sampling is one
    pass over the tokens. Scoring is one pass of the actor and one of the reference.
    """
    lengths = rollout.batch.lengths
    tokens, actions = sum(lengths) - len(lengths), int(rollout.mask.sum())
    actor = matrices_of(models.actor)
    one_pass = card.forward_flops(actor, tokens, actions)
    reference = card.forward_flops(matrices_of(models.reference), tokens, actions)
    return {
        "rollout": one_pass,
        "scoring": one_pass + reference,
        "update": ppo.epochs * card.update_flops(actor, tokens, actions, "none"),
    }


class Peer:
    """Actor and reference of transformers, and a value head."""

    def __init__(self, args, ppo, tokenizer):
        import transformers

        self.args, self.pad = args, tokenizer.pad_id
        bf16 = args.precision == "bf16"
        dtype = torch.bfloat16 if args.lora and bf16 else torch.float32
        folder = hub.find_model(args.model).base
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(  # noqa: E731
            folder, dtype=dtype, attn_implementation="sdpa"
        ).to(args.device)
        self.actor, self.reference = load(), None
        if args.checkpointing != "none":
            self.actor.gradient_checkpointing_enable({"use_reentrant": False})
        if args.lora:
            import peft

            adapter = Path(args.scratch) / "adapter"
            self.actor = peft.PeftModel.from_pretrained(self.actor, adapter, is_trainable=True)
        else:
            self.reference = load().requires_grad_(False).eval()
        self.value_head = nn.Linear(self.actor.config.hidden_size, 1, device=args.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        weights = [p for p in self.actor.parameters() if p.requires_grad]
        self.optimizers = [
            torch.optim.AdamW(weights, ppo.lr, weight_decay=0.0),
            torch.optim.AdamW(self.value_head.parameters(), ppo.value_lr, weight_decay=0.0),
        ]
        self.autocast = machine.autocast_of(args.device, args.precision)

    def answers(self, prompts: list[list[int]], stop_ids) -> int:
        """Sample an answer to each prompt. Returns their tokens, each counted to its stop token."""
        self.actor.eval()
        total = 0
        order = sorted(prompts, key=len, reverse=True)
        for start in range(0, len(order), self.args.rollout_batch):
            part = order[start : start + self.args.rollout_batch]
            ids, attention, _ = self.batch([(p, 0) for p in part])
            with self.autocast():
                out = self.actor.generate(
                    input_ids=ids, attention_mask=attention, do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, max_new_tokens=self.args.max_new_tokens,
                    pad_token_id=self.pad, eos_token_id=sorted(stop_ids),
                )[:, ids.shape[1] :]  # fmt: skip
            for row in out.tolist():
                ends = [k + 1 for k, token in enumerate(row) if token in stop_ids]
                total += min(ends, default=len(row))
        self.actor.train()
        return total

    def batch(self, rows: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, attention mask, answer mask) of rows (ids, answer tokens, ...). Prompts (P columns)
        are padded on the left, answers (A columns) on the right."""
        P, A = max(len(row[0]) - row[1] for row in rows), max(row[1] for row in rows)

        def padded(row, values: list[int]) -> list[int]:
            return [0] * (P - len(row[0]) + row[1]) + values + [0] * (A - row[1])

        ids = torch.tensor([padded(row, list(row[0])) for row in rows])  # 0 is Gemma's <pad>
        attention = torch.tensor([padded(row, [1] * len(row[0])) for row in rows])
        mask = torch.tensor([[1] * row[1] + [0] * (A - row[1]) for row in rows], dtype=torch.bool)
        return tuple(x.to(self.args.device) for x in (ids, attention, mask))

    def score(self, model, rows: list, entropy: bool):
        """Log-probs of the answers' tokens, entropies, values and mask, (B, A) each."""
        ids, attention, mask = self.batch(rows)
        A = mask.shape[1]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with self.autocast():
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            hidden = base.model(
                ids, attention_mask=attention, position_ids=positions, use_cache=False
            )
            hidden = hidden.last_hidden_state[:, -A - 1 : -1]  # (B, A, D): predict the answer
            logits = base.lm_head(hidden).float()  # (B, A, V)
        total = logits.logsumexp(-1)
        logp = logits.gather(-1, ids[:, -A:, None])[..., 0] - total
        spread = total - (logits.softmax(-1) * logits).sum(-1) if entropy else None
        return logp, spread, self.value_head(hidden.float())[..., 0], mask


def peer(args, turns: Turns) -> None:
    ppo, tokenizer = ppo_args(args), data.Tokenizer(hub.find_model(args.model).base)
    side = Peer(args, ppo, tokenizer)
    problems = data.load_problems(args.data, "train", args.data_dir)
    turns.ready()
    for step in range(args.rounds + 1):
        chosen = data.problems_of_step(problems, step, args.rollouts, ppo.seed)
        turns.begin()
        start = now(args.device)
        prompts = [data.encode(tokenizer, data.Prompt(), p.question)[0] for p in chosen]
        sampled_tokens = side.answers(prompts, tokenizer.stop_ids)
        sampled = now(args.device)

        rows = json.loads((Path(args.scratch) / f"rollout-{step}.json").read_text())["rows"]
        size = args.micro_batch * args.accumulation
        by_length = lambda row: -len(row[0])  # noqa: E731
        updates = [sorted(rows[i : i + size], key=by_length) for i in range(0, len(rows), size)]
        rows = [row for update in updates for row in update]
        A = max(row[1] for row in rows)
        logp, ref_logp, values = (torch.zeros(len(rows), A, device=args.device) for _ in range(3))
        mask = torch.zeros(len(rows), A, dtype=torch.bool, device=args.device)
        micro_batches = micro_batches_of(rows, updates, args.micro_batch)
        with torch.no_grad():
            for at, part in micro_batches:
                here = (at, slice(max(row[1] for row in part)))
                logp[here], _, values[here], mask[here] = side.score(side.actor, part, True)
                if args.lora:
                    with side.actor.disable_adapter():
                        ref_logp[here] = side.score(side.actor, part, False)[0]
                else:
                    ref_logp[here] = side.score(side.reference, part, False)[0]
        logp, ref_logp, values = (torch.where(mask, x, 0.0) for x in (logp, ref_logp, values))
        score = torch.tensor([float(row[2]) for row in rows], device=args.device)
        rewards = train_ppo.token_rewards(score, logp, ref_logp, mask, ppo.kl_coef)
        advantages, returns = train_ppo.gae(rewards, values, mask, ppo.gamma, ppo.lam)
        advantages = train_ppo.whiten(advantages, mask)
        _, k3 = train_ppo.kl_estimates(logp, ref_logp)
        scored = now(args.device)

        losses = []
        generator = torch.Generator().manual_seed((ppo.seed * 1_000_003 + step) * 1009)
        for i in torch.randperm(len(updates), generator=generator).tolist():
            own = [(at, part) for at, part in micro_batches if at.start // size == i]
            count = sum(mask[at].sum() for at, _ in own)
            value_loss = 0.0
            for at, part in own:
                here = (at, slice(max(row[1] for row in part)))
                new, _, value, _ = side.score(side.actor, part, False)
                mean = lambda x: train_ppo.masked_share(x, mask[here], count)  # noqa: B023, E731
                p_loss, _ = train_ppo.policy_loss(new, logp[here], advantages[here], ppo.clip)
                v_loss, _ = train_ppo.value_loss(value, values[here], returns[here], ppo.value_clip)
                (mean(p_loss) + ppo.value_coef * mean(v_loss)).backward()
                value_loss += mean(v_loss).item()
            losses.append(value_loss)
            for optimizer in side.optimizers:
                weights = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM).item()
                optimizer.step()
                optimizer.zero_grad()
        done = now(args.device)
        turns.end(
            phases=dict(zip(PHASES, (sampled - start, scored - sampled, done - scored))),
            sampled=sampled_tokens,
            scored=int(mask.sum()),
            agree=[logp[mask].mean().item(), k3[mask].mean().item(), statistics.fmean(losses)],
        )
    turns.rest()


def micro_batches_of(rows: list, updates: list, micro_batch: int) -> list[tuple[slice, list]]:
    """(slice of rows, those rows) of every micro-batch. None has rows of two updates."""
    found, start = [], 0
    for update in updates:
        end = start + len(update)
        for i in range(start, end, micro_batch):
            at = slice(i, min(i + micro_batch, end))
            found.append((at, rows[at]))
        start = end
    return found


# ------------------------------------------------------------------------------------ the parent


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    check(args)
    if args.worker:
        return {"ours": ours, "peer": peer}[args.worker](args, Turns(args.device))
    packages = PACKAGES if args.lora else PACKAGES[:-1]
    sides = compete("benchmarks.ppo_speed", argv, packages, args.rounds)
    results = summary(args, sides)
    show(args, results)
    if args.json:
        files.write_json(args.json, results)


def summary(args, sides: dict[str, Side]) -> dict:
    """All results, without the warm-up round."""
    packages = importlib.metadata.distributions()
    f = {"arguments": vars(args), "environment": machine.environment(), "sides": {}}
    f["versions"] = {d.name: d.version for d in packages if d.name in PACKAGES}
    for name, side in sides.items():
        rounds = side.rounds[1:]
        seconds = {phase: statistics.fmean(r["phases"][phase] for r in rounds) for phase in PHASES}
        sampled, scored = (statistics.fmean(r[k] for r in rounds) for k in ("sampled", "scored"))
        tokens = {"rollout": sampled, "scoring": scored, "update": scored}
        f["sides"][name] = {
            "seconds": seconds,
            "step_s": sum(seconds.values()),
            "sampled": sampled,
            "scored": scored,
            "tokens_per_s": {phase: tokens[phase] / seconds[phase] for phase in PHASES},
            "peak_memory": side.rounds[-1]["memory"],
            "agree": [r["agree"] for r in rounds],
            "rounds": [r["phases"] for r in rounds],
        }
    rate = sides["ours"].about["matrix_rate"]
    ours = sides["ours"].rounds[1:]
    f["matrix_rate"] = rate
    f["products_s"] = {  # what the products would take at that rate
        phase: statistics.fmean(r["products"][phase] for r in ours) / rate for phase in PHASES
    }
    if "peer" in sides:
        mine, theirs = (
            [sum(r["phases"].values()) for r in sides[name].rounds[1:]] for name in ("ours", "peer")
        )
        f["ratios"] = [theirs_s / mine_s for mine_s, theirs_s in zip(mine, theirs)]
        f["ratio"] = statistics.median(f["ratios"])
        a, b = (f["sides"][name]["tokens_per_s"] for name in ("ours", "peer"))
        f["phase_ratios"] = {phase: a[phase] / b[phase] for phase in PHASES}
    return f


def show(args, f: dict) -> None:
    """Print the results as a small table."""
    method, size = "LoRA" if args.lora else "full", args.micro_batch * args.accumulation
    print(
        f"\n{method}, {args.device}, {args.precision}, {args.rollouts} answers per step, "
        f"{args.rollout_batch} at once; micro-batches of {args.micro_batch}, {size} answers per "
        f"update; {f['environment']['threads']} threads"
    )
    heads = "".join(f"{head:>10}" for head in ("s/step", *PHASES))
    print(f"      {heads}  (seconds; answer tokens/s)            peak GiB")
    for name, side in f["sides"].items():
        seconds = "".join(f"{side['seconds'][phase]:10.2f}" for phase in PHASES)
        rates = " ".join(f"{side['tokens_per_s'][phase]:8,.0f}" for phase in PHASES)
        memory = side["peak_memory"] / 2**30
        print(f"{name:<6}{side['step_s']:10.2f}{seconds}  {rates}  {memory:10.2f}")
    bound = f["products_s"]
    seconds = "".join(f"{bound[phase]:10.2f}" for phase in PHASES)
    print(
        f"bound {sum(bound.values()):10.2f}{seconds}  products with weights, each done once, "
        f"at the measured {f['matrix_rate'] / 1e9:,.0f} GFLOP/s"
    )
    if "ratio" in f:
        phases = ", ".join(f"{phase} {f['phase_ratios'][phase]:.2f}" for phase in PHASES)
        low, high = min(f["ratios"]), max(f["ratios"])
        print(
            f"ours / peer: {f['ratio']:.2f} x the steps (rounds {low:.2f} to {high:.2f}); "
            f"tokens/s by phase: {phases}"
        )
        for mine, theirs in zip(*(f["sides"][name]["agree"] for name in ("ours", "peer"))):
            pairs = [f"{k} {x:.6f} and {y:.6f}" for k, x, y in zip(AGREE, mine, theirs)]
            print(f"agreement of a round: {', '.join(pairs)}")


if __name__ == "__main__":
    console.entry(main)
