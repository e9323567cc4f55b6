"""Writes docs/reading.md: one problem's way through the code, with its numbers.

    python -m docs.make_reading

The numbers of its nine numbered sections come from running the shipped functions on the embedded
model. This takes less than a minute. A test compares the committed page with a fresh one. The
sections that follow are prose about results/.
"""

import contextlib
import re
import textwrap
from pathlib import Path

import torch

import train_ppo
import train_sft
from nanogsm import data, generate, lora
from nanogsm.logprob import next_token_logprobs
from nanogsm.model import load_model
from nanogsm.optim import AdamW
from nanogsm.run import console, flags, start
from nanogsm.store import files

PAGE = Path(__file__).with_name("reading.md")
WIDTH = 100  # of the page's prose
PROMPT = data.Prompt()
plain = contextlib.nullcontext  # no autocast: float32

# ---------------------------------------------------------------------------------------- markdown


def wrapped(text: str) -> str:
    """Fill the paragraphs and list items of a page. Headings, tables and code blocks stay."""
    blocks, in_code = [], False
    for block in text.strip().split("\n\n"):
        was_code, in_code = in_code, in_code ^ (block.count("```") % 2 == 1)
        if not (was_code or block.startswith(("```", "#", "|"))):
            items = re.split(r"\n(?=- )", block)
            block = "\n".join(filled(item) for item in items)
        blocks.append(block)
    return "\n\n".join(blocks)


def filled(text: str) -> str:
    # No code span is broken, and no line begins with "+ 1" or "1. ", which would be a list.
    text = " ".join(text.split())
    text = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), text)
    text = re.sub(r"(?<=\S) (?=([-+*#>|]|\d+[.)]) )", "\0", text)
    indent = "  " * text.startswith("- ")
    how = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(text, WIDTH, **how).replace("\0", " ")


def code(text: str) -> str:
    return "```\n" + text.rstrip() + "\n```"


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table. The first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def token_table(columns: dict[str, list]) -> str:
    """Columns of equal length as aligned text, numbers with three decimals."""
    show = lambda x: x if isinstance(x, str) else f"{x:.3f}"  # noqa: E731
    cells = [[name, *map(show, values)] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    rows = zip(*cells)
    return code("\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in rows))


def piece(tokenizer, i: int) -> str:
    return "<eos>" if i in tokenizer.stop_ids else repr(tokenizer.decode([i]))


# ------------------------------------------------------------------------------ the numbered parts


def sections() -> list[str]:
    """The parts of the page, in order."""
    torch.manual_seed(0)
    model, tokenizer = load_model("tiny", torch.float32)
    problems = data.load_problems("tiny", "train")[:2]
    examples = [
        data.Example(*data.encode(tokenizer, PROMPT, p.question, p.answer), p.index)
        for p in problems
    ]
    batch = data.collate(examples, tokenizer.pad_id)
    with torch.no_grad():
        hidden = model(batch.ids, batch.lengths)  # (B, T, D)
        logp, _ = next_token_logprobs(model.vocabulary, hidden, batch.ids, batch.mask)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    parts = [
        HEAD,
        problem_part(problems[0]),
        prompt_part(tokenizer, examples[0]),
        batch_part(examples, batch),
        hidden_part(model.config, batch),
        logprob_part(model, tokenizer, batch, hidden, logp),
        loss_part(model, tokenizer, examples, logp, optimizer),
        lora_part(tokenizer, examples),
        answer_part(model, tokenizer, problems[0], examples[0], optimizer),
        TERMS,
        ppo_part(tokenizer, problems[0]),
        TAIL,
    ]
    return [wrapped(part) + "\n" for part in parts]


def problem_part(problem: data.Problem) -> str:
    answer = problem.answer.replace("\n", "\n          ")
    text = f"question  {problem.question}\nanswer    {answer}"
    return f"""## 1. A problem

[data.py](../nanogsm/data.py), `Problem` and `load_problems`. A line of a JSONL file becomes a
question, an answer and an index, which is its position in the file. GSM8K's answers explain every
step and annotate every calculation as `<<expression=result>>`. They end with `####` and the number
that counts.

{code(text)}
"""


def prompt_part(tokenizer, example: data.Example) -> str:
    ids, mask, _ = example
    shown = f"{tokenizer.show(ids[:10], mask[:10])} ...\n"
    shown += f"... {tokenizer.show(ids[-12:], mask[-12:])}"
    return f"""## 2. Prompt, ids, mask

`Prompt` and `encode`. The question becomes `Question: ... Answer:`, and the tokenizer turns text
into ids. The mask says which ids are learned: those of the answer and the end token `<eos>` after
it. **EOS is learned here.** A model that never sees a supervised `<eos>` does not learn to stop.
This example has {len(ids)} ids, of which {sum(mask)} are supervised. `Tokenizer.show` prints each
token with its mask. The beginning and the end of the example:

{code(shown)}

The space after `Answer:` belongs to the answer, because the tokenizer joins a space to the word
that follows it. A prompt that ended in a space would end in a lone space token, which the model
never sees there in training.
"""


def batch_part(examples: list[data.Example], batch: data.Batch) -> str:
    B, T = batch.ids.shape
    return f"""## 3. A batch

`micro_batches` and `collate`. Rows are padded on the right. Problem 0 has {batch.lengths[0]} ids
and problem 1 has {batch.lengths[1]}, so together they are `ids` and `mask` of shape ({B}, {T}).

Right padding needs no attention mask. The causal mask already hides what comes later, and nobody
uses the hidden states at padding. Padding on the left would break four things: positions that count
from 0, attention without a mask, the `lengths` with which the model leaves padding out, and a KV
cache whose slot is the token's position.

In training, padding costs nothing: given the `lengths`, the model takes padding out before its
first layer and puts it back after the last one (`end_to_end` in
[transformer.py](../nanogsm/transformer.py)).
"""


def hidden_part(c, batch: data.Batch) -> str:
    B, T = batch.ids.shape
    return f"""## 4. Hidden states

[transformer.py](../nanogsm/transformer.py), `Transformer.forward`. Each id becomes a vector of
{c.hidden_size} numbers, multiplied by sqrt({c.hidden_size}). Each of {c.num_hidden_layers} blocks
adds the outputs of attention ({c.num_attention_heads} query heads, {c.num_key_value_heads} key and
value head) and of an MLP ({c.intermediate_size} wide) to it. After a last norm the model returns
`hidden`, of shape ({B}, {T}, {c.hidden_size}). Position t has seen tokens 0 to t, and it predicts
token `t + 1`.

Nothing is projected onto the {c.vocab_size} entries of the vocabulary yet. Gemma 1's vocabulary has
256,000 entries, and the logits of a whole batch would take gigabytes.
"""


def logprob_part(model, tokenizer, batch: data.Batch, hidden, logp) -> str:
    ids, first = batch.ids[0], batch.mask[0].nonzero()[0].item()
    at = range(first, first + 9)
    with torch.no_grad():
        p = model.logits(hidden[0]).softmax(-1)  # (T, V)
    tokens = token_table({
        "token": [piece(tokenizer, ids[i].item()) for i in at],
        "log p": [logp[0, i - 1].item() for i in at],
        "p": [logp[0, i - 1].exp().item() for i in at],
        "most likely": [piece(tokenizer, p[i - 1].argmax().item()) for i in at],
        "its p": [p[i - 1].max().item() for i in at],
    })  # fmt: skip
    return f"""## 5. Log-probabilities

[logprob.py](../nanogsm/logprob.py). `definition` says what is computed: project a hidden state onto
the vocabulary, take the log-softmax, and pick the log-probability of the token that came next.
`next_token_logprobs` makes the shift: hidden state t is scored against token `t + 1`, as drawn in
[train_ppo.py](../train_ppo.py). Only supervised positions are projected.
[fast/head.py](../nanogsm/fast/head.py) gives the same numbers one block of the vocabulary at a
time, so that the logits are never all in memory. The answer's first nine tokens, by the untuned
model:

{tokens}

The untuned model expects a bare number at once, because the answers in its pretraining text look
like that.
"""


def train_step(model, tokenizer, examples: list, optimizer: AdamW) -> tuple[float, float]:
    """One step as train_sft.train makes it: (loss, norm of the gradient)."""
    loss = train_sft.backward_step(model, examples, len(examples), tokenizer.pad_id, plain)
    norm = optimizer.grad_norm()
    optimizer.step(norm, 1.0)
    optimizer.zero_grad()
    return loss.item(), norm.item()


def loss_part(model, tokenizer, examples: list, logp, optimizer: AdamW) -> str:
    alone = train_sft.backward_step(model, examples[:1], 1, tokenizer.pad_id, plain)
    model.zero_grad()
    supervised = data.supervised_tokens(examples)
    loss, norm = train_step(model, tokenizer, examples, optimizer)
    after = train_sft.mean_loss(model, examples, 2, tokenizer.pad_id, plain)
    return f"""## 6. A loss, a gradient, an update

[train_sft.py](../train_sft.py), `backward_step` and the loop in `train`. **The loss is divided by
the number of supervised tokens of the whole step**, not of one example or one micro-batch. It is
the sum of `-log p` over these tokens, divided by their number: here {-logp.sum().item():.3f} /
{supervised} = {loss:.4f} nats per token. The loss of problem 0 alone is {alone:.4f}. The mean of
the two examples' means would be a different number, and it would give the tokens of short answers a
larger weight.

The norm of the gradient is {norm:.2f}, so the gradient is scaled down to a norm of 1.0. AdamW
([optim.py](../nanogsm/optim.py)) makes an update with a learning rate of 0.001. After the update
the loss of the same two examples is {after:.4f}.
"""


def lora_part(tokenizer, examples: list) -> str:
    base, _ = load_model("tiny", torch.float32)
    total = sum(p.numel() for p in base.parameters())
    names = lora.add_lora(base, 16, 32.0)
    adapters = [p for p in base.parameters() if p.requires_grad]
    count = sum(p.numel() for p in adapters)
    loss = train_sft.backward_step(base, examples, 2, tokenizer.pad_id, plain)
    moved = sum((p.grad.abs().max() > 0).item() for p in adapters)
    return f"""## 7. The same with LoRA

[lora.py](../nanogsm/lora.py). Each of the {len(names)} linear layers of the blocks gets two narrow
matrices, A and B, of rank r = 16. They change the layer's output from `W x` to
`W x + (alpha / r) B A x`. **The scale alpha / r** is 32 / 16 = 2 here. `LoRALinear.forward`
multiplies the output of A by it, because that output has only r numbers per token. {count:,}
parameters are trained, and {total:,} are frozen. For gemma-2b the trained share is much smaller,
0.8% of the model.

B starts at zero, so the loss is still {loss:.4f}. At the first step only {moved} of the
{len(adapters)} matrices get a gradient, the Bs. The gradient of A is a product with B, so it is
zero.
"""


def greedy(model, tokenizer, problem: data.Problem) -> str:
    ids, _ = data.encode(tokenizer, PROMPT, problem.question)
    [completion] = generate.generate(model, [ids], tokenizer.stop_ids, 80)
    return tokenizer.decode(completion.ids).strip()


def answer_part(model, tokenizer, problem: data.Problem, example, optimizer: AdamW) -> str:
    untuned = greedy(load_model("tiny", torch.float32)[0], tokenizer, problem)
    optimizer.lr = 3e-3
    for _ in range(30):
        loss, _ = train_step(model, tokenizer, [example], optimizer)
    learned = greedy(model, tokenizer, problem)
    found, right = data.extract_answer(learned), data.extract_answer(problem.answer)
    return f"""## 8. An answer

[generate.py](../nanogsm/generate.py), `generate`. The prompt goes through the model once and leaves
its keys and values in a cache. After that, the model adds one token at a time, each row at its own
position. An answer ends with `<eos>`, or where the model begins a new `Question:`. An answer that
reaches the token limit first is called truncated. The untuned model's greedy answer is

{code(untuned)}

After 30 more steps on problem 0 alone the loss is {loss:.4f} and the answer is

{code(learned)}

The model has learned it by heart, which is all that 30 steps on one example can do.
`extract_answer` takes the number after the first `####`, here {found:g}. The problem's own number
is {right:g}, so exact match counts the answer as right.
"""


# ------------------------------------------------------------------------------------------- PPO


def sft_steps(model, tokenizer, steps: int) -> None:
    """The first steps of train_sft.py --tiny, at a constant learning rate of 0.001."""
    problems = data.load_problems("tiny", "train")[: 16 * steps]
    examples = start.encode_all(tokenizer, problems, PROMPT, 768)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    for step in range(steps):
        batch = train_sft.examples_of_step(examples, step, 16, seed=0)
        train_step(model, tokenizer, batch, optimizer)


def marked(tokenizer, problem: data.Problem, completion: str) -> dict:
    """An answer to the problem, as train_ppo.sample returns it."""
    ids, mask = data.encode(tokenizer, PROMPT, problem.question, completion)
    score = train_ppo.reward(completion, problem, truncated=False)
    return {
        "example": data.Example(ids, mask, problem.index),
        "score": score,
        "correct": score == 1.0,
        "truncated": False,
        "question": problem.question,
        "completion": completion,
    }


def ppo_setup(model, tokenizer) -> train_ppo.Setup:
    args = train_ppo.parse_args(
        "--tiny --recipe tuned --init tiny --rollouts 2 --micro-batch 2 --accumulation 1 "
        "--val-examples 0 --device cpu".split()
    )
    models = train_ppo.build(model, args)
    policy = AdamW(models.policy_weights().items(), args.lr)
    value = AdamW(models.value_weights().items(), args.value_lr)
    return train_ppo.Setup(models, policy, value, tokenizer, PROMPT, args, plain)


def ppo_part(tokenizer, problem: data.Problem) -> str:
    """A right and a wrong answer to a problem, through the steps of the loop in train_ppo.train."""
    model, _ = load_model("tiny", torch.float32)
    sft_steps(model, tokenizer, 40)
    setup = ppo_setup(model, tokenizer)
    args = setup.args
    completions = problem.answer, "The answer is 4.\n#### 4"
    answers = [marked(tokenizer, problem, completion) for completion in completions]

    rollout = train_ppo.score(setup, answers)
    mask = rollout.mask
    rewards = train_ppo.token_rewards(
        rollout.scores, rollout.logp, rollout.ref_logp, mask, args.kl_coef
    )
    advantages, returns = train_ppo.gae(rewards, rollout.values, mask, args.gamma, args.lam)
    advantages = train_ppo.whiten(advantages, mask)
    metrics = train_ppo.update(setup, rollout, advantages, returns, 0)

    after = train_ppo.score(setup, answers)
    change = torch.where(mask, after.logp - rollout.logp, 0.0)  # (2, T - 1)
    right, wrong = change.sum(1).tolist()
    kl = train_ppo.masked_mean(train_ppo.kl_estimates(after.logp, after.ref_logp)[1], mask).item()
    ratio = change.exp()

    def actions(row: int) -> str:
        at = mask[row].nonzero()[:, 0].tolist()
        at = at[:5] + at[-2:]
        token = lambda t: piece(tokenizer, rollout.batch.ids[row, t + 1].item())  # noqa: E731
        columns = {"log p": rollout.logp, "value": rollout.values, "reward": rewards,
                   "return": returns, "advantage": advantages, "ratio": ratio}  # fmt: skip
        numbers = {name: [x[row, t].item() for t in at] for name, x in columns.items()}
        return token_table({"action": [token(t) for t in at], **numbers})

    return f"""## 9. A better answer: PPO

[train_ppo.py](../train_ppo.py), from top to bottom. Take the model after 40 steps of SFT. Suppose
that it answered problem 0 twice: once with the right answer above, and once with `The answer is 4.`
and `#### 4`. The steps are those of the loop in `train`.

- **Rewards** (`token_rewards`). The score of an answer, here 1 and 0, is the reward of its last
  action, which is `<eos>` here. From the reward of every action the KL penalty is subtracted:
  `kl_coef (log p - log p_ref)`. It is 0 here, because policy and reference are still the same.
- **A truncated answer earns 0.** `reward` gives it this score, because an answer that never ended
  earns nothing: the policy has to learn to end. `gae` treats its last
  action like the last action of any answer.
- **Advantages and returns** (`gae`). **At the last action GAE returns `A = r - V` and `R = r`**,
  because the value after it is 0. At earlier actions both also contain what came later. The value
  head starts at zero, so all values are 0 here. With gamma and lambda 1 the return is then the
  answer's score at every action.
- **Whitening** (`whiten`) subtracts the mean over all actions of both answers and divides by their
  standard deviation. All actions of the right answer get the same positive advantage, and all
  actions of the wrong answer the same negative one: nothing tells yet which of them mattered.
- **Update** (`update`). **The first ratio is exactly 1.** `score` computes the old log-probs with
  the forward pass, the weights and the micro-batches of the first update. (Those that sampling
  computed on the way would differ by rounding, and are not kept.) The largest difference from 1 is
  {metrics["first_ratio_error"]:g} here.

The table shows the right answer's first five actions and its last two. The column `ratio` is the
ratio after the update:

{actions(0)}

The same for the wrong answer:

{actions(1)}

The right answer's log-probability has changed by {right:+.3f} in all, the wrong answer's by
{wrong:+.3f}. An update on two answers is noisy, and single tokens may go the other way. On a real
model an update averages over 16 answers (recipe `original`) or 128 (`tuned`). The policy is now
{kl:.5f} nats per token (k3) from its reference, and from the next step on its rewards include the
penalty for that.
"""


# -------------------------------------------------------------------------------- prose, no numbers

HEAD = """# Reading nanogsm

One problem becomes a prompt, ids, a mask, hidden states, log-probabilities, a loss, a gradient and
a better answer. This page follows it through the code in that order. Open the files next to it. The
page is made by `python -m docs.make_reading`: the numbers in sections 1 to 9 are those of the
embedded model on its first training problem.
"""

TERMS = """## Terms

Section 9 and [metrics.md](metrics.md) use these terms.

- **Logits**: one number for each entry of the vocabulary; their softmax is the distribution of the
  next token.
- **Nat**: the unit of log-probabilities with the natural logarithm; a fair coin toss is worth 0.69
  nats.
- **Entropy**: how undecided the model is about the next token, in nats; 0 means that it always
  picks the same one.
- **Exact match**: the share of answers with the right number after the first `####`.
- **Policy** (or actor): the model that is trained and samples the answers.
- **Reference**: a frozen copy of the policy's start.
- **KL divergence**: the mean of `log p - log q` over samples from p, a measure of how far p is from
  q.
- **k1 and k3**: two estimates of the KL divergence from one sample, with `d = log p - log q`:
  `k1 = d` may be negative, `k3 = exp(-d) - 1 + d` never is.
- **Action**: a sampled token; `<eos>` is one, too.
- **Reward**: what an action earns at once.
- **Return**: the sum of the rewards from an action to the end of the answer, discounted by
  gamma; in the code, the target that the value should predict.
- **Value**: a prediction of the return from the tokens before the action.
- **Critic**: the part of the model that predicts values; its last layer is the value head.
- **Advantage**: how much better an action turned out than its value predicted.
- **GAE** (generalized advantage estimation): the advantage as a sum of the critic's one-step errors
  from an action on, weighted by gamma and lambda.
- **Whitening**: shifting and scaling the advantages to mean 0 and variance 1.
- **Ratio**: the probability of an action now, divided by its probability when it was sampled.
- **Clipping**: taking away an action's gradient once its ratio has moved far enough in the wanted
  direction.
- **Wilson interval**: a confidence interval of a share that also holds near 0% and 100%.
- **McNemar test**: a test of two models on the same problems; it counts only problems on which they
  disagree.
"""

CLAIMS = (
    ("the original study", "here", "what we measured"),
    (
        "full SFT 31%, LoRA 20%, at one learning rate",
        "`SFT` in [flags.py](../nanogsm/run/flags.py)",
        "on the embedded model LoRA is 12 points behind full fine-tuning at the same rate; with "
        "`tuned`, where its rate is 7 times that of full fine-tuning, it is 1.6 points behind",
    ),
    (
        "socratic answers score lower than main ones (23% and 11%)",
        "`--data socratic`",
        "hardly so on the embedded model (+1.0 and +1.0 points over three seeds); not run on real "
        "Gemma, because the training file was not available; "
        "[below](#socratic-answers-a-lower-loss-and-what-it-says)",
    ),
    (
        "8-bit AdamW saves memory and costs nothing",
        "[optim.py](../nanogsm/optim.py)",
        "the moments take a quarter of the memory ([results/adam8bit.md](../results/adam8bit.md)); "
        "the losses of a whole run differ by 0.002 ([results/tiny](../results/tiny/README.md))",
    ),
    (
        "gradient checkpointing, bfloat16 autocast",
        "`Transformer.forward`, `train`",
        "[benchmarks](../benchmarks/README.md)",
    ),
    (
        "PPO with gamma 0.99, lambda 0.95, KL 0.05 goes from 31% to 28%",
        "`PPO` in [flags.py](../nanogsm/run/flags.py)",
        "[below](#ppo-in-the-original-study)",
    ),
    (
        "the number after the first `####` counts",
        "`extract_answer` in [data.py](../nanogsm/data.py)",
        '"flexible" counts the last number, wherever it is, and is shown next to it',
    ),
)

TAIL = f"""## What the original study says, and where it is here

*The original study* is the unpublished study that this project implements: gemma-2b-it, one GPU,
exact match on 256 test problems. [recipes.md](recipes.md) has its settings.

{table(*CLAIMS)}

## Socratic answers: a lower loss, and what it says

In the original study the socratic runs have the lower training loss and the lower accuracy. On the
embedded model full fine-tuning's held-out loss is lower, too: 0.083 nats per token against 0.119
for main (three seeds). But a socratic training answer has 51.7 supervised tokens and a main one
36.7 (the `data` line of each run's plan), so an answer costs 4.3 or 4.4 nats either way. The
questions between the steps are almost determined by the text before them. They lower the mean per
token and teach nothing about the numbers. So the loss per token cannot compare two kinds of answer.
Exact match can, and there the two hardly differ (28.9% and 27.9%). With LoRA the loss of socratic
answers is the higher one, 0.416 against 0.316: at that learning rate the form of the questions is
not yet learned at the end of the run.

Can truncated answers explain the study's 23% against 31%? This table has the share of GSM8K's own
test answers that are longer than a limit, encoded by `data.encode` with Gemma 3's tokenizer:

| tokens | 128 | 192 | 256 | 320 | 512 |
|---|---|---|---|---|---|
| main, mean length 127 | 42.5% | 11.7% | 2.3% | 0.5% | 0% |
| socratic, mean length 166 | 66.3% | 30.4% | 10.4% | 2.9% | 0% |

With a limit of 256 tokens, a model that solves three problems in ten would lose two or three
points, not eight, and it tends to get the long problems wrong anyway. With a limit of 128 or 192,
truncation could explain all of it. The study does not say its limit. Here the limit for socratic
answers is 512, which truncates none of GSM8K's own answers, and the share of truncated answers is
shown next to every score.

## PPO in the original study

PPO selects habits that pay. It does not teach new ones. Half of the embedded model's training
answers are terse, so the model guesses where it could have worked the problem out. PPO finds
that showing the work pays. It goes from 28% to 69% (`tuned`) or 51% (`original`) on the 1,319 test
problems; one pass over nothing but worked answers reaches 76%. The 270M model gains nothing: about
one in a hundred of its sampled answers is right. Where every answer earns the same, whitening
scales the noise of the KL penalty up to a full step, and nothing is learned from it.

Which settings hold the original study's PPO back?
[recipes.md](recipes.md#which-ppo-settings-matter-most) ranks them by what they are worth, with the
evidence and the reasons. It also says why the study's fall from 31% to 28% may be no fall at all.
"""


def main(argv: list[str] | None = None) -> None:
    flags.Parser("Write docs/reading.md again.").parse_args(argv)
    files.replace_file(PAGE, "\n".join(sections()).encode())
    print(f"written to {PAGE}")


if __name__ == "__main__":
    console.entry(main)
