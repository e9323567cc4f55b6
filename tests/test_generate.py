"""generate.py against transformers' greedy continuations, and the promise that a completion does
not depend on the batch it was made in."""

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file

from nanogsm import generate as g
from nanogsm.data import Problem, Prompt
from nanogsm.fast import cpu
from nanogsm.logprob import token_logprobs

FAMILIES = ["gemma1", "gemma2", "gemma3", "llama32", "llama30"]
NEVER = frozenset()


def prompts(n=9):
    """Rows of 1 to 17 ids, so that prefill pads and some rows exceed the window of 8."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1 + (7 * i) % 17 for i in range(n)]
    return [[2] + torch.randint(7, 380, (k,), generator=generator).tolist() for k in lengths]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(gemma, name):
    model, _ = gemma(name)
    want = load_file(FIXTURES / name / "expected.safetensors")
    done = g.generate(model, [want["prompt"].tolist()], NEVER, 12)
    assert done[0].ids == want["continuation"].tolist() and done[0].truncated


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_do_not_depend_on_the_batch_size(gemma, name, temperature):
    """Some rows stop early, so places are refilled and the tail is compacted on the way."""
    model, _ = gemma(name)
    stops = frozenset(range(7, 60))
    alone = g.generate(model, prompts(), stops, 11, 1, temperature, seed=5)
    lengths = {len(c.ids) for c in alone}
    assert len(lengths) > 2 and {c.truncated for c in alone} == {True, False}
    for batch_size in (2, 4, 9, 64):
        assert g.generate(model, prompts(), stops, 11, batch_size, temperature, seed=5) == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looking_at_the_tokens_less_often_changes_nothing(gemma, monkeypatch, temperature):
    """As on a GPU: rows run on past their end until the next look, and the rest is cut."""
    model, _ = gemma("gemma3")
    stops = frozenset(range(7, 60))
    every_step = g.generate(model, prompts(), stops, 11, 4, temperature, seed=5)
    monkeypatch.setitem(g.STEPS_PER_LOOK, "cpu", 5)
    assert g.generate(model, prompts(), stops, 11, 4, temperature, seed=5) == every_step


@pytest.mark.parametrize("together", [1, 2, 3])
def test_rows_that_attend_in_groups_say_the_same(gemma, monkeypatch, together):
    """Even groups and uneven ones, with idle places in them, and fewer as rows come to their
    end."""
    model, _ = gemma("gemma3")
    stops, used = frozenset(range(7, 60)), set()
    at_once = g.generate(model, prompts(), stops, 11, 7, 1.0, seed=5)
    monkeypatch.setitem(g.ROWS_PER_GROUP, "cpu", together)
    attend_next = g.KVCache.attend_next
    seen = lambda cache, at, slots: used.add(len(slots)) or attend_next(cache, at, slots)  # noqa: E731
    monkeypatch.setattr(g.KVCache, "attend_next", seen)
    assert g.generate(model, prompts(), stops, 11, 7, 1.0, seed=5) == at_once
    assert max(used) == -(-7 // together)


def test_prompts_taken_in_by_groups_give_the_same(gemma, monkeypatch):
    """Groups of one to three prompts, ones shorter than the limit and ones beyond it."""
    model, _ = gemma("gemma3")
    at_once = g.generate(model, prompts(), NEVER, 6, 9)
    monkeypatch.setitem(g.PREFILL_TOKENS, "cpu", 16)
    assert g.generate(model, prompts(), NEVER, 6, 9) == at_once


def test_a_stop_token_ends_the_row_and_is_part_of_it(gemma):
    model, _ = gemma("gemma3")
    want = load_file(FIXTURES / "gemma3/expected.safetensors")
    row, ids = want["prompt"].tolist(), want["continuation"].tolist()
    for stops in ({ids[4], 383}, {383, ids[4], ids[9]}):  # whichever of several comes first
        done = g.generate(model, [row], frozenset(stops), 12)[0]
        assert done.ids == ids[: ids.index(ids[4]) + 1] and not done.truncated
    at_the_limit = g.generate(model, [row], frozenset({ids[4]}), ids.index(ids[4]) + 1)[0]
    assert not at_the_limit.truncated  # a stop token as the last one allowed is a proper end


def test_is_over_ends_a_row_without_calling_it_truncated(gemma):
    model, _ = gemma("gemma3")
    done = g.generate(model, prompts(3), NEVER, 12, is_over=lambda ids: len(ids) == 5)
    assert [len(c.ids) for c in done] == [5, 5, 5] and not any(c.truncated for c in done)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_plain_choice_of_a_token_gives_the_same_answers(gemma, monkeypatch, name, temperature):
    model, _ = gemma(name)
    packed = g.generate(model, prompts(), NEVER, 8, 4, temperature, seed=5)
    monkeypatch.setattr(cpu, "can_pack", lambda *kind: False)
    assert g.generate(model, prompts(), NEVER, 8, 4, temperature, seed=5) == packed


def test_one_new_token_and_no_prompts(gemma):
    model, _ = gemma("gemma3")
    assert [len(c.ids) for c in g.generate(model, prompts(5), NEVER, 1, 2)] == [1] * 5
    assert g.generate(model, [], NEVER, 5) == []


def test_greedy_ignores_the_seed_and_sampling_follows_it(gemma):
    model, _ = gemma("gemma3")
    sample = lambda t, seed: g.generate(model, prompts(4), NEVER, 8, 4, t, seed)  # noqa: E731
    assert sample(0.0, 1) == sample(0.0, 2)
    assert sample(1.0, 1) == sample(1.0, 1) != sample(1.0, 2)


def test_first_tokens_of_one_prompt_follow_its_distribution(gemma):
    """4,000 requests of one prompt, temperature 2: shares within 4 standard errors, float64."""
    model, _ = gemma("gemma3")
    row, n = prompts(3)[2], 4000
    done = g.generate(model, [row] * n, NEVER, 1, 500, temperature=2.0, seed=0)
    seen = torch.bincount(torch.tensor([c.ids[0] for c in done]), minlength=384).double() / n
    with torch.no_grad():
        p = (model.logits(model(torch.tensor([row])))[0, -1].double() / 2).softmax(-1)
    assert ((seen - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_sampled_answers_are_as_probable_as_training_says(gemma):
    """What PPO's ratio rests on: over many answers of four tokens, the mean of token_logprobs at
    each of the four is minus the mean entropy there, within 4 standard errors; at another
    temperature than the one they were drawn at it is not."""
    model, _ = gemma("gemma3")
    n, length = 2000, 4
    done = g.generate(model, [prompts(3)[2]] * n, NEVER, length, 500, temperature=1.5, seed=0)
    start = len(prompts(3)[2])
    ids = torch.tensor([prompts(3)[2] + c.ids for c in done])
    with torch.no_grad():
        hidden = model(ids)[:, start - 1 : -1]
    mask = torch.ones(n, length, dtype=torch.bool)

    def surprise(temperature: float):
        """Standard errors by which logp exceeds its expectation, at each of the four tokens."""
        with torch.no_grad():
            logp, entropy = token_logprobs(
                model.vocabulary, hidden, ids[:, start:], mask, temperature, True
            )
        excess = (logp + entropy).double()
        return excess.mean(0) / (excess.std(0) / n**0.5)

    assert surprise(1.5).abs().max() < 4 < surprise(1.0).abs().min()


@pytest.mark.parametrize("width", [1, 3, 4])  # of the blocks the logits come in
def test_inverse_cdf_by_hand(width):
    """p = 0.2, 0, 0.5, 0.3: uniform numbers up to 0.2, 0.7 and 1 fall on tokens 0, 2 and 3."""
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(7, 4)
    uniform = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.999, 1.0])
    for temperature in (1.0, 0.5):
        blocks = (logits * temperature).split(width, -1)
        assert cpu.inverse_cdf(blocks, temperature, uniform).tolist() == [0, 0, 2, 2, 3, 3, 3]
        assert g.inverse_cdf(logits * temperature, temperature, uniform).tolist() == [
            0,
            0,
            2,
            2,
            3,
            3,
            3,
        ]
    impossible_first = torch.tensor([[0.0, 1.0]]).log()
    for blocks in ([impossible_first], impossible_first.split(1, -1)):
        assert cpu.inverse_cdf(blocks, 1.0, torch.zeros(1)).tolist() == [1]
    assert g.inverse_cdf(impossible_first, 1.0, torch.zeros(1)).tolist() == [1]


def test_even_of_nonsense_a_token_of_the_vocabulary_is_drawn():
    """What a diverged model says: the next lookup must not be the place where it shows."""
    nonsense = torch.full((1, 5), torch.nan).split(2, -1)
    assert cpu.inverse_cdf(nonsense, 1.0, torch.tensor([0.5])).item() < 5
    assert g.inverse_cdf(torch.cat(nonsense, -1), 1.0, torch.tensor([0.5])).item() < 5


@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_a_token_does_not_depend_on_the_blocks(width):
    """Against a cumulative sum over the whole vocabulary, in float64."""
    torch.manual_seed(0)
    logits, uniform = 5 * torch.randn(500, 100), torch.rand(500)
    probabilities = (logits.double() / 0.7).softmax(-1)
    token = cpu.inverse_cdf(logits.split(width, -1), 0.7, uniform)
    assert (token != g.inverse_cdf(logits, 0.7, uniform)).sum() <= 1  # where rounding decides
    upto = probabilities.cumsum(-1).gather(-1, token[:, None])[:, 0]
    its_own = probabilities.gather(-1, token[:, None])[:, 0]
    assert (uniform <= upto + 1e-6).all() and (uniform >= upto - its_own - 1e-6).all()
    assert torch.equal(cpu.most_likely(logits.split(width, -1)), logits.argmax(-1))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_first_of_equal_tokens_is_the_most_likely(width):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert cpu.most_likely(logits.split(width, -1)).tolist() == [1, 0]


def test_sampling_under_bfloat16_autocast_runs(gemma):
    model, _ = gemma("gemma3")
    with torch.autocast("cpu", torch.bfloat16):
        done = g.generate(model, prompts(3), NEVER, 4, 2, temperature=1.0)
    assert [len(c.ids) for c in done] == [4, 4, 4]


def test_exact_match_rows_are_in_the_order_of_the_problems(gemma):
    model, tokenizer = gemma("gemma3")
    problems = [Problem(f"{'How ' * i}many?", f"#### {i}", 10 + i) for i in range(4)]
    rows = g.answer_and_mark(model, tokenizer, problems, Prompt(), 3, 2, 1.0, samples=2)
    assert [r["index"] for r in rows] == [10, 10, 11, 11, 12, 12, 13, 13]
    assert [r["gold"] for r in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(r["tokens"] <= 3 and r["truncated"] == (r["tokens"] == 3) for r in rows)


def test_exact_match_ends_a_completion_that_starts_a_new_question(gemma, monkeypatch):
    """The model is made to say a text: its answer, then a question of its own."""
    model, tokenizer = gemma("gemma3")
    said = tokenizer.encode(" 7\n#### 7\n\nQuestion: What? #### 8")
    steps = iter(said)
    one_hot = lambda i: torch.nn.functional.one_hot(torch.tensor([i]), 384).float()  # noqa: E731
    monkeypatch.setattr(cpu, "can_pack", lambda *kind: False)
    monkeypatch.setattr(model, "logits", lambda hidden: one_hot(next(steps)))
    row = g.answer_and_mark(model, tokenizer, [Problem("?", "#### 7", 0)], Prompt(), 99)[0]
    assert row["correct"] and row["flexible"] and not row["truncated"]
    assert row["tokens"] < len(said) and row["completion"].endswith("Question:")
