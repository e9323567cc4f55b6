"""One PPO step by nanogsm against the same step through transformers: rollout, scoring, update.

    python -m benchmarks.ppo_speed --data tiny --rollout-batch 256 --micro-batch 64 --accumulation 4
    python -m benchmarks.ppo_speed --model PATH --data-dir DIR --lora --rollouts 64 --checkpointing light

Ours is what train_ppo does between two rows of its metrics. The peer does the same with transformers'
generate() and models (and peft's adapters), written as one would who has read trl's trainers:

- rollout: generate() on batches of prompts sorted by length and padded on the left; temperature 1;
- scoring: micro-batches of prompts padded on the left and answers on the right, so that only the
  answer's columns are projected onto the vocabulary, and an update's answers sorted by length; actor,
  reference and value head; the reference is a second model, or the actor with its adapters switched off;
- update: the same micro-batches, loss, clipping at 1 and AdamW with 32-bit moments.

The two sample with different random numbers, so each rollout is timed on its own, and for scoring
and update the peer is given ours's answers: log-probs and losses must then agree, and do. Whole steps
are compared at the same number of answers; the peer may have more or fewer tokens to score than it
sampled, by the few percent that are printed. The rewards and advantages (train_ppo's own functions, on both
sides) cost next to nothing. Each side is a process of its own; they take turns (sides.py).
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
from benchmarks.sides import Side, Turns, compete, matrix_rate, now, products
from nanogsm import UserError, data
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.model import load_model, save_adapter
from nanogsm.optim import AdamW
from nanogsm.run import console
from nanogsm.store import files, hub

PACKAGES = ("torch", "transformers", "peft")
PHASES = ("rollout", "scoring", "update")
AGREE = ("mean log-prob", "KL a token", "value loss")  # ours and the peer's
CLIP = 1.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("Time a PPO step: nanogsm against transformers.")
    p.add_argument("--model", default="runs/tiny/sft-full-main", help="run or folder of a whole model")
    p.add_argument("--data", default="main", help="main, tiny or a .jsonl file of your own")
    console.add_data_dir_flag(p)
    p.add_argument("--lora", action="store_true", help="adapters for the actor, not all weights")
    p.add_argument("--rollouts", type=int, default=512, help="answers a step")
    p.add_argument("--rollout-batch", type=int, default=64, help="... sampled at once")
    p.add_argument("--micro-batch", type=int, default=16)
    p.add_argument("--accumulation", type=int, default=8)
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    p.add_argument("--checkpointing", choices=CHECKPOINTING, default="none",
                   help="ours; the peer's is full or none")  # fmt: skip
    p.add_argument("--rounds", type=int, default=2, help="counted steps of each side")
    p.add_argument("--json", help="write all figures there")
    console.add_compute_flags(p)
    p.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    p.add_argument("--scratch", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    numbers = ("rollouts", "rollout_batch", "micro_batch", "accumulation", "max_new_tokens", "rounds")
    console.check_numbers(args, dict.fromkeys(numbers, 1))
    args.device, args.precision = console.pick_compute(args.device, args.precision)
    return args


def settings(args) -> argparse.Namespace:
    """train_ppo's arguments: the tuned recipe with what is given here."""
    flags = ["--recipe", "tuned", "--init", args.model, "--optim", "adamw", "--val-examples", "0"]
    for name in ("rollouts", "rollout_batch", "micro_batch", "accumulation", "max_new_tokens"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    flags += ["--device", args.device, "--precision", args.precision, *["--lora"] * args.lora]
    return train_ppo.parse_args([*flags, "--checkpointing", args.checkpointing])


# ----------------------------------------------------------------------------------- the workers


def ours(args, turns: Turns) -> None:
    ppo, bf16 = settings(args), args.precision == "bf16"
    kind = torch.device(args.device).type
    autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)  # noqa: E731
    base, tokenizer = load_model(args.model, None if args.lora and bf16 else torch.float32, args.device)
    models = train_ppo.build(base, ppo)
    if args.lora:
        save_adapter(models.actor, Path(args.scratch) / "adapter", args.model)  # the peer's start
    weights = (models.policy_weights(), ppo.lr), (models.value_weights(), ppo.value_lr)
    optimizers = [AdamW(w.items(), lr, bits=32) for w, lr in weights]
    problems = data.load_problems(args.data, "train", args.data_dir)
    matrices = torch.bfloat16 if bf16 else torch.float32
    turns.ready(matrix_rate=matrix_rate(args.device, matrices))
    for step in range(args.rounds + 1):
        chosen = train_ppo.problems_of_step(problems, step, args.rollouts, ppo.seed)
        turns.begin()
        start = now(args.device)
        with autocast():
            rows = train_ppo.answer(models, tokenizer, data.Prompt(), chosen, ppo, step, lambda *_: None)
        sampled = now(args.device)
        rollout, figures = train_ppo.assess(models, rows, tokenizer.pad_id, ppo, autocast)
        scored = now(args.device)
        # The peer scores these very answers, and learns from them.
        given = [(r["example"].ids, sum(r["example"].mask), r["score"]) for r in rows]
        files.write_json(Path(args.scratch) / f"rollout-{step}.json", {"rows": given})
        start_update = now(args.device)
        learnt = train_ppo.update(models, rollout, optimizers, ppo, autocast, step)
        done = now(args.device)
        turns.end(
            phases=dict(zip(PHASES, (sampled - start, scored - sampled, done - start_update))),
            sampled=int(rollout.mask.sum()), scored=int(rollout.mask.sum()),
            products=products_of(base, rollout, ppo),
            agree=[rollout.logp[rollout.mask].mean().item(), figures["kl"], learnt["value_loss"]],
        )  # fmt: skip
    turns.rest()


def products_of(model, rollout: train_ppo.Rollout, ppo) -> dict[str, int]:
    """Operations of the products with weights in each phase, adapters' left out, for all tokens but the
    answers' last, from which nothing is predicted: sampling is one pass; scoring is one of the actor and one
    of the reference; the update's are forward, the gradient of what comes in and, with full fine-tuning, of
    the weights."""
    tokens, actions = sum(rollout.lengths) - len(rollout.lengths), int(rollout.mask.sum())
    passes = ppo.epochs * (2 if ppo.lora else 3)
    return {
        "rollout": products(model, tokens, actions),
        "scoring": products(model, 2 * tokens, 2 * actions),
        "update": products(model, passes * tokens, passes * actions),
    }


class Peer:
    """Actor, reference and critic of transformers, and what is asked of them."""

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
        self.head = nn.Linear(self.actor.config.hidden_size, 1, device=args.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.weights = [p for p in self.actor.parameters() if p.requires_grad]
        self.optimizers = [
            torch.optim.AdamW(w, lr, weight_decay=0.0)
            for w, lr in ((self.weights, ppo.lr), (list(self.head.parameters()), ppo.value_lr))
        ]
        self.autocast = lambda: torch.autocast(args.device, torch.bfloat16, enabled=bf16)

    def answers(self, prompts: list[list[int]], stop_ids) -> int:
        """Sample an answer to each prompt; the number of tokens up to the stop tokens."""
        self.actor.eval()
        made = 0
        order = sorted(prompts, key=len, reverse=True)
        for start in range(0, len(order), self.args.rollout_batch):
            part = order[start : start + self.args.rollout_batch]
            ids, attention, _ = self.batch([(p, 0) for p in part])
            with self.autocast():
                out = self.actor.generate(
                    input_ids=ids, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0,
                    top_p=1.0, max_new_tokens=self.args.max_new_tokens, pad_token_id=self.pad,
                    eos_token_id=sorted(stop_ids),
                )[:, ids.shape[1] :]  # fmt: skip
            for row in out.tolist():
                made += next((k + 1 for k, token in enumerate(row) if token in stop_ids), len(row))
        self.actor.train()
        return made

    def batch(self, rows: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, attention mask, answer mask): of (ids, answer tokens, ...), the prompts padded on
        the left and the answers on the right."""
        P, A = max(len(r[0]) - r[1] for r in rows), max(r[1] for r in rows)
        put = lambda r, x: [0] * (P - len(r[0]) + r[1]) + x + [0] * (A - r[1])  # noqa: E731
        ids = torch.tensor([put(r, list(r[0])) for r in rows])  # 0 is Gemma's <pad>
        attention = torch.tensor([put(r, [1] * len(r[0])) for r in rows])
        mask = torch.tensor([[1] * r[1] + [0] * (A - r[1]) for r in rows], dtype=torch.bool)
        return ids.to(self.args.device), attention.to(self.args.device), mask.to(self.args.device)

    def score(self, model, rows: list, entropy: bool):
        """log-probs of the answers' tokens (B, A), entropies, values, mask."""
        ids, attention, mask = self.batch(rows)
        A = mask.shape[1]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with self.autocast():
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            hidden = base.model(ids, attention_mask=attention, position_ids=positions, use_cache=False)
            hidden = hidden.last_hidden_state[:, -A - 1 : -1]  # these predict the answer's tokens
            logits = base.lm_head(hidden).float()
        total = logits.logsumexp(-1)
        logp = logits.gather(-1, ids[:, -A:, None])[..., 0] - total
        spread = total - (logits.softmax(-1) * logits).sum(-1) if entropy else None
        return logp, spread, self.head(hidden.float())[..., 0], mask


def peer(args, turns: Turns) -> None:
    ppo, tokenizer = settings(args), data.Tokenizer(hub.find_model(args.model).base)
    side = Peer(args, ppo, tokenizer)
    problems = data.load_problems(args.data, "train", args.data_dir)
    m, size = args.micro_batch, args.micro_batch * args.accumulation
    turns.ready()
    for step in range(args.rounds + 1):
        chosen = train_ppo.problems_of_step(problems, step, args.rollouts, ppo.seed)
        turns.begin()
        start = now(args.device)
        prompts = [data.encode(tokenizer, data.Prompt(), p.question)[0] for p in chosen]
        sampled_tokens = side.answers(prompts, tokenizer.stop_ids)
        sampled = now(args.device)

        rows = json.loads((Path(args.scratch) / f"rollout-{step}.json").read_text())["rows"]
        length = lambda row: -len(row[0])  # noqa: E731
        parts = [sorted(rows[i : i + size], key=length) for i in range(0, len(rows), size)]
        rows = [row for part in parts for row in part]
        A = max(row[1] for row in rows)
        logp, ref_logp, values = (torch.zeros(len(rows), A, device=args.device) for _ in range(3))
        mask = torch.zeros(len(rows), A, dtype=torch.bool, device=args.device)
        with torch.no_grad():
            for at, part in pieces(rows, parts, m):
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

        losses, cuts = [], list(pieces(rows, parts, m))
        generator = torch.Generator().manual_seed((ppo.seed * 1_000_003 + step) * 1009)
        for i in torch.randperm(len(parts), generator=generator).tolist():
            mine = [(at, part) for at, part in cuts if i * size <= at.start < (i + 1) * size]
            count = sum(mask[at].sum() for at, _ in mine)
            total = 0.0
            for at, part in mine:
                here = (at, slice(max(row[1] for row in part)))
                new, _, guess, _ = side.score(side.actor, part, False)
                mean = lambda x: train_ppo.masked_mean(x, mask[here], count)  # noqa: B023, E731
                p_loss, _ = train_ppo.policy_loss(new, logp[here], advantages[here], ppo.clip)
                v_loss, _ = train_ppo.value_loss(guess, values[here], returns[here], ppo.value_clip)
                (mean(p_loss) + ppo.value_coef * mean(v_loss)).backward()
                total += mean(v_loss).item()
            losses.append(total)
            for optimizer in side.optimizers:
                weights = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(weights, CLIP).item()
                optimizer.step()
                optimizer.zero_grad()
        done = now(args.device)
        turns.end(
            phases=dict(zip(PHASES, (sampled - start, scored - sampled, done - scored))),
            sampled=sampled_tokens, scored=int(mask.sum()),
            agree=[logp[mask].mean().item(), k3[mask].mean().item(), statistics.fmean(losses)],
        )  # fmt: skip
    turns.rest()


def pieces(rows: list, parts: list, m: int):
    """(slice of rows, those rows) of every micro-batch; none crosses from one update to the next."""
    start = 0
    for part in parts:
        for i in range(start, start + len(part), m):
            at = slice(i, min(i + m, start + len(part)))
            yield at, rows[at]
        start += len(part)


# ------------------------------------------------------------------------------------ the parent


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if hub.find_model(args.model).adapter:
        raise UserError(f"{args.model} is an adapter: give a run or folder of a whole model")
    if args.worker:
        return {"ours": ours, "peer": peer}[args.worker](args, Turns(args.device))
    packages = PACKAGES if args.lora else PACKAGES[:-1]
    sides = compete("benchmarks.ppo_speed", argv, packages, args.rounds)
    figures = summary(args, sides)
    show(args, figures)
    if args.json:
        files.write_json(args.json, figures)


def summary(args, sides: dict[str, Side]) -> dict:
    """Everything reported, the warm-up round left out."""
    f = {"arguments": vars(args), "environment": console.environment(), "sides": {}}
    f["versions"] = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    for name, side in sides.items():
        rounds = side.rounds[1:]
        mean = {phase: statistics.fmean(r["phases"][phase] for r in rounds) for phase in PHASES}
        sampled, scored = (statistics.fmean(r[k] for r in rounds) for k in ("sampled", "scored"))
        f["sides"][name] = {
            "seconds": mean, "step_s": sum(mean.values()), "sampled": sampled, "scored": scored,
            "tokens_per_s": {"rollout": sampled / mean["rollout"], "scoring": scored / mean["scoring"],
                             "update": scored / mean["update"]},
            "peak_memory": side.rounds[-1]["memory"], "agree": [r["agree"] for r in rounds],
            "rounds": [r["phases"] for r in rounds],
        }  # fmt: skip
    f["matrix_rate"] = sides["ours"].about["matrix_rate"]
    f["products_s"] = {  # at that rate
        phase: statistics.fmean(r["products"][phase] for r in sides["ours"].rounds[1:]) / f["matrix_rate"]
        for phase in PHASES
    }
    if "peer" in sides:
        pairs = [[sum(r["phases"].values()) for r in sides[name].rounds[1:]] for name in ("ours", "peer")]
        f["ratios"] = [theirs / mine for mine, theirs in zip(*pairs)]
        f["ratio"] = statistics.median(f["ratios"])
        a, b = f["sides"]["ours"], f["sides"]["peer"]
        f["phase_ratios"] = {k: a["tokens_per_s"][k] / b["tokens_per_s"][k] for k in PHASES}
    return f


def show(args, f: dict) -> None:
    size = args.micro_batch * args.accumulation
    print(f"\n{'LoRA' if args.lora else 'full'}, {args.device}, {args.precision}, {args.rollouts} answers a "
          f"step, {args.rollout_batch} at once; micro-batches of {args.micro_batch}, {size} an update; "
          f"{f['environment']['threads']} threads")  # fmt: skip
    print("          s/step   rollout   scoring    update  (seconds; answer tokens/s)            peak GiB")
    for name, s in f["sides"].items():
        seconds = "".join(f"{s['seconds'][phase]:10.2f}" for phase in PHASES)
        rates = " ".join(f"{s['tokens_per_s'][phase]:8,.0f}" for phase in PHASES)
        print(f"{name:<6}{s['step_s']:10.2f}{seconds}  {rates}  {s['peak_memory'] / 2**30:10.2f}")
    bound = f["products_s"]
    seconds = "".join(f"{bound[phase]:10.2f}" for phase in PHASES)
    print(f"bound {sum(bound.values()):10.2f}{seconds}  products with weights, each once, at the measured "
          f"{f['matrix_rate'] / 1e9:,.0f} GFLOP/s")  # fmt: skip
    if "ratio" in f:
        phases = ", ".join(f"{phase} {f['phase_ratios'][phase]:.2f}" for phase in PHASES)
        low, high = min(f["ratios"]), max(f["ratios"])
        print(f"ours / peer: {f['ratio']:.2f} x the steps (rounds {low:.2f} to {high:.2f}); tokens/s by "
              f"phase: {phases}")  # fmt: skip
        for mine, theirs in zip(*(f["sides"][name]["agree"] for name in ("ours", "peer"))):
            said = ", ".join(f"{k} {x:.6f} and {y:.6f}" for k, x, y in zip(AGREE, mine, theirs))
            print(f"agreement of a round: {said}")


if __name__ == "__main__":
    console.entry(main)
