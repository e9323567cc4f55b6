"""A process reward model: is everything right so far, at the end of each step of an answer?

    python -m experiments.label runs/ppo-full-main         # labels for the model's own answers
    python train_prm.py --model runs/ppo-full-main --data runs/labels-ppo-full-main.jsonl
    python train_prm.py ... --outcome                      # learns the last label alone
    python evaluate.py runs/ppo-full-main --samples 8 --temperature 1 --rerank PRM_RUN

The network of a language model gets one more output, the head: one number at every token. At the
end of a step its sigmoid is the probability that everything so far is right. The loss is binary
cross-entropy with the step's label, which may be a share (Lightman et al. 2023, arXiv 2305.20050;
Wang et al. 2023, arXiv 2312.08935). An answer of three steps. Here column t stands under token t;
train_ppo.py draws it under token t + 1, which it is about:

    column      0    1    2    3    4    5    6    7
    ids         p0   p1   s1   nl   s2   nl   s3   eos      prompt, steps, nl: a line break
    mask[1:]    0    0    0    1    0    1    1             1 where the next token follows a step
    label                      1        .5    0             of steps 1, 2 and 3
    logit[t]                   the head's output, from the tokens 0 .. t

A label made by sampling estimates a value: how often this model is right in the end. So the head
learns what PPO's critic learns, from more samples. A step that is wrong and can be repaired has a
label above 0.
"""

import math
from collections.abc import Callable
from shlex import join

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogsm import data, distributed
from nanogsm.model import read_config, save_trained
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import console, prm, start
from nanogsm.run.loop import Run, check_finite
from nanogsm.run.machine import autocast_of
from nanogsm.steps import Example, examples_of
from nanogsm.transformer import Transformer
from train_sft import examples_of_step, load_trainable

RIGHT = 0.5  # labels and probabilities of at least this mean that a step is right

# --------------------------------------------------------------------------------------- the loss


def step_logits(
    model: Transformer, head: nn.Linear, examples: list[Example], pad_id: int, autocast: Callable
) -> Tensor:
    """The head's output at every label of a micro-batch: (labels,), answer by answer."""
    ids, mask, lengths = data.collate(examples, pad_id, model.device)  # (B, T)
    with autocast():
        hidden = model(ids, lengths)[:, :-1]  # (B, T - 1, D)
    where = tuple(i.to(model.device) for i in mask[:, 1:].nonzero(as_tuple=True))
    # A sum, not a matrix product, so that it is float32 under autocast, as PPO's values are.
    return (hidden[where].float() * head.weight[0]).sum(-1) + head.bias


def loss_sum(logits: Tensor, examples: list[Example]) -> Tensor:
    """Binary cross-entropy with the labels, in nats, added up. A label between 0 and 1 counts as
    that share of a right step, and the rest of a wrong one."""
    labels = torch.tensor([label for example in examples for label in example.labels])
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")


def backward_step(model, head, examples: list, micro_batch: int, pad_id: int, autocast) -> Tensor:
    """Add the gradient of one step's loss to .grad. Returns the loss (), in nats per label."""
    count = data.supervised_tokens(examples)  # the labels of the whole step, as in train_sft.py
    loss = torch.zeros((), device=model.device)
    for rows in distributed.deal(data.micro_batches(examples, micro_batch), model, backward=True):
        part = loss_sum(step_logits(model, head, rows, pad_id, autocast), rows) / count
        part.backward()
        loss += part.detach()
    distributed.add_up(loss)
    return loss


# --------------------------------------------------------------------------------- the validation


@torch.no_grad()
def predict(model, head, examples: list, micro_batch: int, pad_id: int, autocast) -> list[list]:
    """The logits at the labels of each answer."""
    found, batches = [], data.micro_batches(examples, micro_batch)
    for i in distributed.deal([*range(len(batches))], model):
        logits = step_logits(model, head, batches[i], pad_id, autocast)
        sizes = [len(example.labels) for example in batches[i]]
        found.append((i, [part.tolist() for part in logits.split(sizes)]))
    everything = [pair for part in distributed.gathered(found) for pair in part]
    return [row for _, rows in sorted(everything) for row in rows]


def auc(scores: list[float], right: list[bool]) -> float:
    """The probability that a right step has a higher score than a wrong one, a tie counting half.
    NaN without both. (It is the Mann-Whitney statistic, from ranks.)"""
    order, ranks = sorted(range(len(scores)), key=scores.__getitem__), [0.0] * len(scores)
    i = 0
    while i < len(order):
        end = i
        while end < len(order) and scores[order[end]] == scores[order[i]]:
            end += 1
        for place in order[i:end]:
            ranks[place] = (i + end + 1) / 2  # the mean of the ranks i + 1 .. end
        i = end
    n = sum(right)
    pairs = n * (len(right) - n)
    above = sum(rank for rank, is_right in zip(ranks, right) if is_right) - n * (n + 1) / 2
    return above / pairs if pairs else math.nan


def first_below(values: list[float], limit: float) -> int | None:
    """The place of the first value below the limit; None if there is none."""
    return next((i for i, value in enumerate(values) if value < limit), None)


def share_of(hits: list[float]) -> float:
    return sum(hits) / len(hits) if hits else math.nan


def best_of(examples: list[Example], scores: list[float]) -> tuple[float, float, float]:
    """Three shares: answers that are right; problems whose top-scored answer is right; pairs of a
    right and a wrong answer to one problem in which the right one scores higher, a tie counting
    half. An answer is right if its last step is. One whose last step has no label is left out."""
    answers: dict[int, list[tuple[float, bool]]] = {}
    for example, score in zip(examples, scores):
        if example.mask[-1]:  # the end token, which follows the last step
            answers.setdefault(example.index, []).append((score, example.labels[-1] >= RIGHT))
    groups = answers.values()
    chosen = [max(group, key=lambda answer: answer[0])[1] for group in groups]
    ordered = [(a > b) + (a == b) / 2 for group in groups for a, right in group if right
               for b, also in group if not also]  # fmt: skip
    everything = [right for group in groups for _, right in group]
    return share_of(everything), share_of(chosen), share_of(ordered)


def validation_metrics(examples: list[Example], logits: list[list[float]], answers: bool) -> dict:
    """What a validation logs. answers: whether whole answers were sampled, so that their last step
    says whether they are right."""
    everything = torch.tensor([logit for row in logits for logit in row])
    count = data.supervised_tokens(examples)
    labels = [label for example in examples for label in example.labels]
    metrics = {
        "val_loss": loss_sum(everything, examples).item() / count,
        "val_auc": auc(everything.tolist(), [label >= RIGHT for label in labels]),
    }
    first = [first_below(example.labels, RIGHT) for example in examples]
    said = [first_below(row, math.log(RIGHT / (1 - RIGHT))) for row in logits]
    pairs = [*zip(first, said)]
    # Of the answers with a wrong step: is the first one the first that is said to be wrong? Of the
    # others: is none said to be wrong?
    metrics["val_first_wrong"] = share_of([a == b for a, b in pairs if a is not None])
    metrics["val_all_right"] = share_of([b is None for a, b in pairs if a is None])
    if answers:
        sampled, best, ordered = best_of(examples, [row[-1] for row in logits])
        metrics |= {"val_pairs": ordered, "val_sampled": sampled, "val_best_last": best}
        metrics["val_best_least"] = best_of(examples, [min(row) for row in logits])[1]
    return metrics


# ---------------------------------------------------------------------------------------- the run


def train(args, folder, found, examples: list, held_out: list, steps: int) -> int | None:
    """Train from the start or the last checkpoint. Returns the exit status if it stops early."""
    model, tokenizer = load_trainable(args, found)
    head = nn.Linear(model.config.hidden_size, 1, device=model.device)
    nn.init.zeros_(head.weight)  # as PPO's: at first every probability is one half
    nn.init.zeros_(head.bias)
    autocast = autocast_of(args.device, args.precision)
    bits = 8 if args.optim == "adamw8bit" else 32
    peaks = {"trunk/": args.lr, "head/": args.head_lr}
    # The output head is not used. Where it is not tied, it gets no gradient.
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("lm_head")]
    optimizers = {"trunk/": AdamW(named, args.lr, bits=bits)}
    optimizers["head/"] = AdamW(head.named_parameters(), args.head_lr, bits=32)
    run = Run(folder, steps, optimizers, args, len(held_out), {"loss": "loss"})

    def validate() -> None:
        size = 4 * args.micro_batch  # without gradients more fit
        logits = predict(model, head, held_out, size, tokenizer.pad_id, autocast)
        run.record_validation(validation_metrics(held_out, logits, args.source == "labels"))

    # The schedule is that of SFT's tuned recipe, and has no flags.
    size, warmup = args.micro_batch * args.accumulation, round(0.03 * steps)
    with run:  # continues from the last checkpoint; Ctrl-C saves the last whole step
        for step in range(run.first, steps):
            if run.validation_due():
                validate()
            batch = examples_of_step(examples, step, size, args.seed)
            loss = backward_step(model, head, batch, args.micro_batch, tokenizer.pad_id, autocast)
            norms = []
            for prefix, optimizer in optimizers.items():
                distributed.add_up_gradients(optimizer.params.values())
                norms.append(optimizer.grad_norm())
                peak = peaks[prefix]
                optimizer.lr = cosine_with_min_lr(step, steps, peak, 0.1 * peak, warmup)
            loss, norm, head_norm = torch.stack((loss, *norms)).tolist()
            indices = [example.index for example in batch]
            check_finite(step, indices, "--lr", loss=loss, gradient_norm=norm, of_head=head_norm)
            for gradient_norm, optimizer in zip(norms, optimizers.values()):
                optimizer.step(gradient_norm, args.max_grad_norm)
                optimizer.zero_grad()
            run.end_step({
                "loss": loss,
                "lr": optimizers["trunk/"].lr,
                "grad_norm": norm,
                "head_grad_norm": head_norm,
                "labels": data.supervised_tokens(batch),
                "tokens": sum(len(example.ids) for example in batch),
            })  # fmt: skip

        save_trained(model, tokenizer, folder.path, found.name)
        prm.save_prm(folder, head, found, args.lora)
        if run.validation_due():
            validate()
        run.finish({"loss": run.metrics["loss"]} | run.validated)
    return run.status


def main(argv: list[str] | None = None) -> int:
    args = console.same_command(prm.prm_args(argv))
    prompt = prm.prompt_for(args)
    found = start.find_start(args, "model")
    start.set_rank(args, found)
    config, tokenizer = read_config(found.base), data.Tokenizer(found.base)
    solutions, held_out = prm.load_solutions(args)
    limit = args.max_seq_length
    examples = examples_of(tokenizer, prompt, solutions, limit, args.outcome)
    # Validation looks at all steps, for an outcome model, too.
    held_out_examples = examples_of(tokenizer, prompt, held_out, limit, of="held-out ")
    steps = prm.steps_in(examples, args)
    prm.settle(args, found, config, examples, held_out_examples, steps)
    if args.dry_run:
        return 0
    with start.open_folder(args, "model", found, prompt, solutions + held_out) as folder:
        if folder.finished:
            print(folder.already_finished())
        elif status := train(args, folder, found, examples, held_out_examples, steps):
            return status
    sampled = ["evaluate.py", args.model, "--samples", "8", "--temperature", "1"]
    print(f"the result is in {args.out}; next: python {join([*sampled, '--rerank', args.out])}")
    return 0


if __name__ == "__main__":
    console.entry(main)
