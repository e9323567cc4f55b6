"""data.py: answers from a table, prompts against hand-written text, ids and masks against the raw
tokenizer library and transformers' chat template, and every way a user's own file can be wrong.

The last two tests read real files. They run if these variables name them:

    NANOGSM_DATA_DIR=gsm8k NANOGSM_GEMMA=folder-of-tokenizer.json pytest tests/test_data.py
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import tokenizers
import torch

from nanogsm import UserError, data
from nanogsm.data import (
    Example,
    Problem,
    Prompt,
    Tokenizer,
    collate,
    cut,
    digest,
    encode,
    extract_answer,
    is_correct,
    is_correct_flexible,
    last_number,
    load_problems,
    micro_batches,
    read_jsonl,
    same_number,
    split_validation,
    subset,
)
from nanogsm.store import hub

FIXTURES = Path(__file__).parent / "fixtures"
GEMMA = FIXTURES / "gemma3"
PAD, EOS, BOS, START, END = 0, 1, 2, 5, 6  # tests/fixtures/README.md

PROMPTS = [
    Prompt(style, shots, instruction)
    for style in ("plain", "chat")
    for shots in (0, 1)
    for instruction in (False, True)
]
every_prompt = pytest.mark.parametrize("prompt", PROMPTS, ids=str)

QUESTION = "Tom has 3 boxes of 12 eggs. How many eggs?"
ANSWER = "Tom has 3*12 = <<3*12=36>>36 eggs.\n#### 36"
PAIRS = [
    (QUESTION, ANSWER),
    ("Half of $1,234.50?", "1,234.50/2 = $617.25\n#### 617.25"),
    ("Two lines\nand  two spaces", "- a list\n- of things\n#### -3"),
    ("café – 東京 🍎?", "🍎 costs €5\n#### 5"),
]
# Copied by hand
INSTRUCTION = (
    "You are a helpful math assistant. Please provide a step-by-step derivation and end your "
    "answer with the final numerical result in the format '#### <number>'."
)
NATALIA = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?"
)
NATALIA_SOLVED = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n"
    "#### 72"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GEMMA)


@pytest.fixture(scope="module")
def raw() -> tokenizers.Tokenizer:
    """The library itself, which reads "<bos>" in a text as the token."""
    return tokenizers.Tokenizer.from_file(str(GEMMA / "tokenizer.json"))


def whole_text(raw, ids) -> str:
    return raw.decode(ids, skip_special_tokens=False)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def row(question="How many?", answer="#### 3") -> str:
    return json.dumps({"question": question, "answer": answer})


def problems(n: int) -> list[Problem]:
    return [Problem(f"question {i}", f"#### {i}", i) for i in range(n)]


# Answers


@pytest.mark.parametrize(
    "text, number",
    [
        # the rules
        ("#### 72.", 72),
        ("#### $72", 72),
        ("#### 72.00", 72),
        ("####72", 72),
        ("####  72", 72),
        ("#### 72 dollars", 72),
        ("#### 1,234", 1234),
        ("#### -3", -3),
        ("#### 70 then I looked again\n#### 72", 70),
        ("The answer is 72.", None),
        ("#### none", None),
        # signs, currency, decimals
        ("#### -$72", -72),
        ("#### $-72", -72),
        ("#### $ 72", 72),
        ("#### - 3", -3),
        ("#### -\t$ 3", -3),
        ("#### $ - 3", -3),
        ("#### $\n72", 72),
        ("#### 0", 0),
        ("#### 007", 7),
        ("#### 0.5", 0.5),
        ("#### .5", 0.5),
        ("#### 72%", 72),
        ("#### 3-5", None),
        # commas are part of a number only between thousands
        ("#### 1,234,567.50", 1234567.5),
        ("#### 1,234, or so", 1234),
        ("#### 1,5", None),
        ("#### 1,2345", None),
        ("#### 12,34", None),
        ("#### 3 5", None),
        ("#### 3, 5", None),
        ("#### 1234,567", None),
        ("#### ,", None),
        ("#### ,234", None),
        ("#### -", None),
        ("#### $", None),
        # white space and other text around the number
        ("####\n72", 72),
        ("####\t72", 72),
        ("6 * 12 = 72\n#### 72\n\nDone: 100", 72),
        ("12 #### 72", 72),
        # only the number right after the marker counts
        ("#### the answer is 72", None),
        ("#### x\n#### 72", None),
        ("", None),
        ("####", None),
        ("### 72", None),
        ("# # # # 72", None),
        # float() or \d would accept these
        ("#### ٧٢", None),
        ("#### ７２", None),
        ("#### 1_000", None),
        ("#### nan", None),
        ("#### inf", None),
        ("#### " + "9" * 400, None),
        ("#### -" + "9" * 400, None),
    ],
)
def test_extracted_answer(text, number):
    assert extract_answer(text) == number


@pytest.mark.parametrize(
    "text, number",
    [
        ("He has 5 apples and 7 pears.", 7),
        ("#### 70 ... #### 72", 72),
        ("so it is $1,234.", 1234),
        ("it lost -3", -3),
        ("it lost -$3.50 today", -3.5),
        # a minus is a sign, except after a digit, where it subtracts
        ("is -3", -3),
        ("-3", -3),
        ("(-3)", -3),
        ("x=-3", -3),
        ("10-3", 3),
        ("$10-$3", 3),
        ("10 - 3", 3),
        ("10--3", -3),
        ("between 3, 5", 5),
        ("1,5", 5),
        ("1,2345", 2345),
        ("2 + 2 = 4\n", 4),
        ("no number", None),
        ("", None),
        ("٧٢", None),
        ("9" * 400, None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


LONG = 20_000  # characters; quadratic time would be seconds, linear time is milliseconds


@pytest.mark.parametrize(
    "run, extracted, last",
    [
        (" " * LONG, None, None),
        ("\n" * LONG, None, None),
        ("-" * LONG, None, None),
        ("$" * LONG, None, None),
        ("- $" * LONG, None, None),
        (" " * LONG + "72", 72, 72),
        ("1" + ",234" * LONG + "5", None, 2345),  # the whole is too large to be a float
        ("1," * LONG, None, 1),
        ("7" * LONG, None, None),
    ],
    ids=["spaces", "lines", "minus", "dollars", "mixed", "number", "groups", "commas", "digits"],
)
def test_answers_take_time_in_proportion_to_the_text(run, extracted, last):
    began = time.process_time()  # other processes on the machine do not count
    found = extract_answer("#### " + run), last_number("#### " + run)
    assert time.process_time() - began < 0.5
    assert found == (extracted, last)


def test_numbers_are_compared_with_a_small_tolerance():
    assert same_number(72.0, 72.0)
    assert same_number(0.1 + 0.2, 0.3)  # not equal as floats
    assert same_number(72.0, 72.0 + 5e-7) and same_number(72.0 + 5e-7, 72.0)
    assert not same_number(72.0, 72.0 + 2e-6) and not same_number(72.0 + 2e-6, 72.0)
    assert not same_number(3.0, -3.0)


def test_no_number_equals_nothing():
    assert not same_number(None, 72.0)
    assert not same_number(72.0, None)
    assert not same_number(None, None)


def test_completion_is_cut_where_it_asks_a_new_question():
    assert cut(" 3*12=36\n#### 36\n\nQuestion: and 4?\nAnswer: #### 48") == "3*12=36\n#### 36"
    assert cut("Question: again") == ""
    assert cut(" a question of 36 \n") == "a question of 36"


GOLD = Problem("?", "Half of 144 is 72.\n#### 72", 0)


@pytest.mark.parametrize(
    "completion, strict, flexible",
    [
        ("Half is 72.\n#### 72", True, True),
        (" #### 72.0", True, True),
        ("#### $72 dollars", True, True),
        ("The answer is 72", False, True),
        ("#### 70, no: 72", False, True),
        ("#### 72, not 70", True, False),
        ("#### 73", False, False),
        ("#### -72", False, False),
        ("nothing", False, False),
        ("", False, False),
        ("I do not know.\n\nQuestion: ?\nAnswer: #### 72", False, False),
        ("#### 72\n\nQuestion: ?\nAnswer: #### 5", True, True),
    ],
)
def test_strict_needs_the_marker_and_flexible_takes_the_last_number(completion, strict, flexible):
    assert is_correct(completion, GOLD) is strict
    assert is_correct_flexible(completion, GOLD) is flexible


def test_flexible_is_held_against_the_number_after_the_marker():
    problem = Problem("?", "#### 72 (and not 70)", 0)
    assert is_correct_flexible("72", problem)
    assert not is_correct_flexible("70", problem)


# Prompts, as text


def test_instruction_and_one_shot_are_those_of_the_original_study():
    assert data.INSTRUCTION == INSTRUCTION
    assert data.ONE_SHOT == Problem(NATALIA, NATALIA_SOLVED, 0)


# Each of these is followed by the answer and the end token.
PLAIN = {
    (0, False): f"<bos>Question: {QUESTION}\nAnswer:",
    (0, True): f"<bos>{INSTRUCTION}\n\nQuestion: {QUESTION}\nAnswer:",
    (1, False): f"<bos>Question: {NATALIA}\nAnswer: {NATALIA_SOLVED}\n\n"
    f"Question: {QUESTION}\nAnswer:",
    (1, True): f"<bos>{INSTRUCTION}\n\nQuestion: {NATALIA}\nAnswer: {NATALIA_SOLVED}\n\n"
    f"Question: {QUESTION}\nAnswer:",
}
CHAT = {
    (0, False): f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
    (0, True): f"<bos><start_of_turn>user\n{INSTRUCTION}\n\n{QUESTION}<end_of_turn>\n"
    "<start_of_turn>model\n",
    (1, False): f"<bos><start_of_turn>user\n{NATALIA}<end_of_turn>\n"
    f"<start_of_turn>model\n{NATALIA_SOLVED}<end_of_turn>\n"
    f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
    (1, True): f"<bos><start_of_turn>user\n{INSTRUCTION}\n\n{NATALIA}<end_of_turn>\n"
    f"<start_of_turn>model\n{NATALIA_SOLVED}<end_of_turn>\n"
    f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
}


def by_hand(prompt: Prompt) -> str:
    return {"plain": PLAIN, "chat": CHAT}[prompt.style][prompt.shots, prompt.instruction]


@every_prompt
def test_prompt_and_training_text_are_as_worked_by_hand(tokenizer, raw, prompt):
    asked = by_hand(prompt)
    target = f" {ANSWER}<eos>" if prompt.style == "plain" else f"{ANSWER}<end_of_turn>"
    assert whole_text(raw, encode(tokenizer, prompt, QUESTION)[0]) == asked
    assert whole_text(raw, encode(tokenizer, prompt, QUESTION, ANSWER)[0]) == asked + target


def test_prompt_names_its_strategy():
    assert str(Prompt()) == "plain, zero-shot"
    assert str(Prompt("plain", 1, True)) == "plain, one-shot, instruction"
    assert str(Prompt("chat", 1)) == "chat, one-shot"


# Ids and masks


@every_prompt
@pytest.mark.parametrize("question, answer", PAIRS)
def test_prompt_ids_are_a_prefix_of_training_ids(tokenizer, prompt, question, answer):
    asked, mask = encode(tokenizer, prompt, question)
    ids, _ = encode(tokenizer, prompt, question, answer)
    assert len(ids) > len(asked) and ids[: len(asked)] == asked
    assert mask == [0] * len(asked)


@every_prompt
@pytest.mark.parametrize("question, answer", PAIRS)
def test_exactly_one_bos_and_it_is_first(tokenizer, prompt, question, answer):
    for ids, _ in (
        encode(tokenizer, prompt, question),
        encode(tokenizer, prompt, question, answer),
    ):
        assert ids[0] == BOS and ids.count(BOS) == 1


@every_prompt
def test_end_token_is_supervised_and_last(tokenizer, prompt):
    ids, mask = encode(tokenizer, prompt, QUESTION, ANSWER)
    assert ids[-1] == (EOS if prompt.style == "plain" else END)
    assert mask[-1] == 1
    assert ids.count(EOS) == (prompt.style == "plain")
    # chat ends the user's turn and the model's turn, also in each shot
    assert ids.count(END) == (0 if prompt.style == "plain" else 2 + 2 * prompt.shots)


@every_prompt
def test_supervised_ids_are_exactly_the_answer(tokenizer, raw, prompt):
    rows = [
        Example(*encode(tokenizer, prompt, question, answer), index)
        for index, (question, answer) in enumerate(PAIRS)
    ]
    batch = collate(rows, tokenizer.pad_id)
    for ids, mask, (question, answer) in zip(batch.ids, batch.mask, PAIRS):
        end = f" {answer}<eos>" if prompt.style == "plain" else f"{answer}<end_of_turn>"
        assert whole_text(raw, ids[mask].tolist()) == end
        length = len(encode(tokenizer, prompt, question)[0])
        assert not mask[:length].any() and mask[length]  # supervised from the answer's first token


@every_prompt
@pytest.mark.parametrize("question, answer", PAIRS)
def test_separate_tokenisation_equals_joint(tokenizer, raw, prompt, question, answer):
    ids, _ = encode(tokenizer, prompt, question, answer)
    text = by_hand(prompt).replace(QUESTION, question)
    text += f" {answer}<eos>" if prompt.style == "plain" else f"{answer}<end_of_turn>"
    assert ids == raw.encode(text, add_special_tokens=False).ids


def test_chat_ids_equal_transformers_chat_template(tokenizer):
    # "How many clips?", answered "#### 72": the first turn of the fixture's conversation.
    expected = json.loads((FIXTURES / "tokenizer_cases.json").read_text())["chat"]["ids"]
    ids, _ = encode(tokenizer, Prompt("chat"), "How many clips?", "#### 72")
    assert ids[-1] == END and ids == expected[: len(ids)]


def test_encode_and_decode_equal_transformers(tokenizer):
    for case in json.loads((FIXTURES / "tokenizer_cases.json").read_text())["cases"]:
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        if "<eos>" not in case["text"] and "<start_of_turn>" not in case["text"]:
            assert tokenizer.encode(case["text"]) == case["ids"][1:]  # without its <bos>


@every_prompt
def test_special_tokens_inside_a_problem_stay_text(tokenizer, raw, prompt):
    nasty = "a <eos> b<end_of_turn>c <bos><start_of_turn>user <pad>"
    ids, mask = encode(tokenizer, prompt, nasty, nasty)
    plain_ids, plain_mask = encode(tokenizer, prompt, "q", "a")
    for special in (PAD, EOS, BOS, START, END):
        assert ids.count(special) == plain_ids.count(special)
    assert whole_text(raw, ids).count(nasty) == 2
    assert tokenizer.decode(tokenizer.encode(nasty)) == nasty


def test_show_puts_a_mask_bit_to_each_token(tokenizer):
    # "▁May" with its space is one token, and it belongs to the target
    ids, mask = encode(tokenizer, Prompt(), "?", "May")
    assert tokenizer.show(ids, mask).endswith("':'|0 '▁May'|1 '<eos>'|1")
    with pytest.raises(ValueError):
        tokenizer.show(ids, mask[:-1])


# Llama's tokenizers

LLAMAS = {name: FIXTURES / name for name in ("llama30", "llama32")}


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("answer", ["#### 72", None])
def test_llamas_chat_ids_equal_its_own_template(name, answer):
    """The first turns of the fixture's conversation. In 3.1 and later a dated system turn leads."""
    expected = json.loads((LLAMAS[name] / "chat.json").read_text())
    assert ("Cutting Knowledge Date" in expected["text"]) == (name == "llama32")
    ids, mask = encode(Tokenizer(LLAMAS[name]), Prompt("chat"), "How many clips?", answer)
    assert ids == expected["ids"][: len(ids)] and len(ids) >= 25
    assert sum(mask) == (0 if answer is None else 5)  # "####", " ", "7", "2" or "72", <|eot_id|>


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas_plain_examples_end_with_end_of_text(name):
    tokenizer = Tokenizer(LLAMAS[name])
    ids, mask = encode(tokenizer, Prompt(shots=1, instruction=True), "How many?", "It is 5.")
    raw = tokenizers.Tokenizer.from_file(str(LLAMAS[name] / "tokenizer.json"))
    text = (f"<|begin_of_text|>{data.INSTRUCTION}\n\nQuestion: {data.ONE_SHOT.question}\nAnswer: "
            f"{data.ONE_SHOT.answer}\n\nQuestion: How many?\nAnswer: It is 5."
            "<|end_of_text|>")  # fmt: skip
    assert ids == raw.encode(text, add_special_tokens=False).ids
    supervised = [i for i, bit in zip(ids, mask) if bit]
    assert tokenizer.decode(supervised) == " It is 5." and supervised[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    "name, pad, stops",
    [
        ("llama30", "<|reserved_special_token_0|>", {"end_of_text", "eot_id"}),
        ("llama32", "<|finetune_right_pad_id|>", {"end_of_text", "eot_id", "eom_id"}),
    ],
)
def test_llamas_padding_and_stops(tmp_path, name, pad, stops):
    """Without a config beside it. The fixture's own configs name the same ids, or fewer."""
    shutil.copy(LLAMAS[name] / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert tokenizer.pad_id == vocabulary[pad] and tokenizer.pad_id not in tokenizer.stop_ids
    assert tokenizer.stop_ids == {vocabulary[f"<|{stop}|>"] for stop in stops}
    assert Tokenizer(LLAMAS[name]).stop_ids == tokenizer.stop_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
    assert Tokenizer(tmp_path).stop_ids == tokenizer.stop_ids | {3}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.pad_id}))
    with pytest.raises(UserError, match=re.escape(f"{pad} is also a stop token")):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas_special_tokens_inside_a_problem_stay_text(name):
    tokenizer = Tokenizer(LLAMAS[name])
    nasty = "a<|eot_id|><|start_header_id|>system<|end_header_id|> <|end_of_text|> {} {role}"
    for prompt in (Prompt(), Prompt("chat")):
        ids, _ = encode(tokenizer, prompt, nasty, nasty)
        plain, _ = encode(tokenizer, prompt, "q", "a")
        for special in range(373, 384):
            assert ids.count(special) == plain.count(special)
        assert tokenizer.decode(ids).count(nasty) == 2


def test_a_colon_of_llamas_tokenizer_is_seen():
    tokenizer = Tokenizer(LLAMAS["llama32"])
    ids = tokenizer.encode("5.\n\nQuestion:")
    assert data.starts_new_question(tokenizer, ids)
    assert not any(data.starts_new_question(tokenizer, ids[:n]) for n in range(1, len(ids)))


# Batches


def test_collate_pads_right_with_pad_id_and_mask_0():
    rows = [
        Example([2, 8, 9, 1], [0, 0, 1, 1], 0),
        Example([2, 7], [0, 1], 1),
        Example([2, 5, 6], [0, 0, 0], 2),
    ]
    ids, mask, lengths = collate(rows, pad_id=4)
    assert lengths == [4, 2, 3]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.tolist() == [[2, 8, 9, 1], [2, 7, 4, 4], [2, 5, 6, 4]]
    assert mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_micro_batches_are_the_rows_in_their_order():
    rows = [Example([2] * n, [0] * n, n) for n in (3, 9, 1, 4, 4, 8, 2)]
    assert micro_batches(rows, 3) == [rows[:3], rows[3:6], rows[6:]]
    assert micro_batches(rows, 7) == micro_batches(rows, 99) == [rows]


# The tokenizer's folder


def tokenizer_folder(folder: Path, change=lambda t: None, **configs) -> Path:
    content = json.loads((GEMMA / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, eos in configs.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


def test_special_ids_are_those_of_the_fixture(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (PAD, BOS, EOS)
    assert tokenizer.turn("user", "Hi")[0] == START and tokenizer.end_of_turn_id == END


@pytest.mark.parametrize(
    "configs, stops",
    [
        ({}, {1, 6}),
        ({"config": 1}, {1, 6}),
        ({"config": 7}, {1, 6, 7}),
        ({"generation_config": [8, 9]}, {1, 6, 8, 9}),
        ({"config": [7], "generation_config": [1, 8]}, {1, 6, 7, 8}),
        ({"config": None, "generation_config": ["<eos>", True, 8]}, {1, 6, 8}),
    ],
)
def test_stop_ids_are_the_union_of_both_configs_and_the_literals(tmp_path, configs, stops):
    assert Tokenizer(tokenizer_folder(tmp_path, **configs)).stop_ids == stops


def test_unreadable_generation_config_leaves_the_literals(tmp_path):
    tokenizer_folder(tmp_path)
    for content in ("{", "[1]", "\xff"):
        (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
        assert Tokenizer(tmp_path).stop_ids == {1, 6}


def test_a_files_own_truncation_and_padding_are_switched_off(tmp_path):
    def change(content):
        content["truncation"] = {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        content["padding"] = {
            "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
        }  # fmt: skip

    ids = Tokenizer(tokenizer_folder(tmp_path, change)).encode("1234567890")
    assert ids == [266, 267, 268, 269, 270, 271, 272, 273, 274, 265]  # tokenizer_cases.json


def rename(old, new):
    def change(content):
        for token in content["added_tokens"]:
            if token["content"] == old:
                token["content"] = new
        content["model"]["vocab"][new] = content["model"]["vocab"].pop(old)

    return change


@pytest.mark.parametrize("token", ["<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
def test_tokenizer_without_a_special_token_is_refused_by_name(tmp_path, token):
    with pytest.raises(UserError, match=f"has no {token}"):
        Tokenizer(tokenizer_folder(tmp_path, rename(token, "<other>")))


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage", b"\xff\xfe", b"[]", None])
def test_garbage_or_missing_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("config", ["config", "generation_config"])
def test_padding_that_is_also_a_stop_token_is_refused(tmp_path, config):
    with pytest.raises(UserError, match="<pad> is also a stop token"):
        Tokenizer(tokenizer_folder(tmp_path, **{config: [1, PAD]}))


# Files


def test_rows_are_read_in_order_and_stripped(tmp_path):
    path = write(tmp_path, row(" How many? ", "One.\n#### 1\n") + "\n" + row("é?", "#### 2"))
    assert read_jsonl(path) == [Problem("How many?", "One.\n#### 1", 0), Problem("é?", "#### 2", 1)]


def test_blank_lines_are_allowed_and_not_counted_as_problems(tmp_path):
    path = write(tmp_path, f"\n{row('a')}\n\n  \n{row('b')}\n\n")
    assert [(p.question, p.index) for p in read_jsonl(path)] == [("a", 0), ("b", 1)]


def test_windows_line_ends_are_allowed(tmp_path):
    path = write(tmp_path, f"{row('a')}\r\n\r\n{row('b')}\r\n")
    assert [p.question for p in read_jsonl(path)] == ["a", "b"]


def test_utf8_byte_order_mark_is_allowed_where_windows_editors_put_it(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + f"{row('a')}\n{row('b')}\n".encode())
    assert [p.question for p in read_jsonl(path)] == ["a", "b"]
    path = write(tmp_path, f"{row('a')}\n\ufeff{row('b')}\n")  # two files joined
    with pytest.raises(UserError, match="line 2: not a JSON object"):
        read_jsonl(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separators_inside_a_text_end_no_line(tmp_path, character):
    question = f"one{character}two"
    line = json.dumps({"question": question, "answer": "#### 2"}, ensure_ascii=False)
    assert [p.question for p in read_jsonl(write(tmp_path, line + "\n"))] == [question]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "not json",
        "[]",
        "3",
        "null",
        '"text"',
        '{"question": "a"}',
        '{"answer": "#### 1"}',
        '{"question": 3, "answer": "#### 1"}',
        '{"question": "a", "answer": 1}',
        '{"question": "a", "answer": null}',
        '{"question": ["a"], "answer": "#### 1"}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_problem_is_named_by_number(tmp_path, bad):
    path = write(tmp_path, f"{row()}\n\n{bad}\n{row()}\n")  # the blank line counts
    with pytest.raises(UserError, match='line 3: not a JSON object with "question" and "answer"'):
        read_jsonl(path)


def test_a_misspelt_field_is_named(tmp_path):
    path = write(tmp_path, '{"question": "1?", "answr": "#### 1"}\n')
    with pytest.raises(UserError, match="one object per line; 'answer' is missing"):
        read_jsonl(path)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = write(tmp_path, r'{"question": "\ud83c\udf4e?", "answer": "#### 1"}')
    assert read_jsonl(path)[0].question == "\U0001f34e?"


@pytest.mark.parametrize(
    "bad, half",
    [
        (r'{"question": "half a pair: \ud83c", "answer": "#### 1"}', r"\ud83c"),
        (r'{"question": "a", "answer": "\udf4e #### 1"}', r"\udf4e"),
        (r'{"question": "a\ud83c", "answer": "\udf4e #### 1"}', r"\ud83c"),  # across two texts
    ],
)
def test_half_a_surrogate_pair_is_named(tmp_path, bad, half):
    """The texts are there, and are JSON. But no tokenizer takes them."""
    path = write(tmp_path, f"{row()}\n\n{bad}\n")
    with pytest.raises(UserError, match=f"line 3: {re.escape(half)} is half of a character"):
        read_jsonl(path)


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_an_empty_question_is_named_by_line(tmp_path, question):
    path = write(tmp_path, f"{row()}\n\n{row(question)}\n")
    with pytest.raises(UserError, match="line 3: the question is empty"):
        read_jsonl(path)
    path = write(tmp_path, f"{row()}\n\n{row(answer=question)}\n")
    with pytest.raises(UserError, match="line 3: the answer is empty"):
        read_jsonl(path, unscored=True)


@pytest.mark.parametrize("answer", ["72", "#### ", "#### many", "### 72"])
def test_an_answer_without_a_number_after_the_marker_is_named_by_line(tmp_path, answer):
    path = write(tmp_path, f"{row()}\n{row(answer=answer)}\n")
    with pytest.raises(UserError, match='line 2: the answer has no "#### number" and no .boxed{} .--unscored'):
        read_jsonl(path)


ASKED, SAID = {"role": "user", "content": " 2 + 3? "}, {"role": "assistant", "content": "#### 5\n"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}


@pytest.mark.parametrize(
    "line, question",
    [({"prompt": " 2 + 3? ", "completion": "#### 5\n", "id": 1}, "2 + 3?"),
     ({"messages": [ASKED, SAID], "source": "x"}, "2 + 3?"),
     ({"messages": [SYSTEM, ASKED, SAID]}, "Be brief.\n\n2 + 3?")],
)  # fmt: skip
def test_other_names_of_question_and_answer(tmp_path, line, question):
    path = write(tmp_path, f"{row()}\n{json.dumps(line)}\n")
    assert read_jsonl(path)[1] == (question, "#### 5", 1)


@pytest.mark.parametrize(
    "turns, says",
    [([ASKED, SAID, ASKED, SAID], "not user, assistant, user, assistant"), ([ASKED], "not user"),
     ([SAID, ASKED], "not assistant, user"), ([], "not none"), ([ASKED, SYSTEM, SAID], "turn"),
     ([{"role": ["x"] * 99, "content": ""}], "not ['x', 'x'"),
     ("text", "must be a list of objects"),
     ([3, 4], "must be a list of objects"), ({"role": "user"}, "must be a list of objects"),
     (None, "must be a list of objects"), (7, "must be a list of objects"),
     ([{"content": "5"}, SAID], "not a turn without a role, assistant"),
     ([ASKED, {"role": "assistant"}], "the content of the assistant turn is missing"),
     ([ASKED, {"role": "assistant", "content": [{"text": "5"}]}],
      "the content of the assistant turn is a list of parts: join"),
     ([{"role": "user", "content": None}, SAID], "content of the user turn is null, not a text"),
     ([{"role": "user", "content": {"a": "b" * 99}}, SAID], 'turn is {"a": "bbb'),
     ([{"role": "user", "content": ""}, SAID], "the question is empty")],
)  # fmt: skip
def test_other_chats_are_refused_with_their_line(tmp_path, turns, says):
    path = write(tmp_path, f"{row()}\n{json.dumps({'messages': turns})}\n")
    with pytest.raises(UserError, match=f"line 2: .*{re.escape(says)}") as caught:
        read_jsonl(path)
    assert len(str(caught.value)) < 400


def test_unscored_answers_need_no_number(tmp_path):
    path = write(tmp_path, row(answer="A cat."))
    assert read_jsonl(path, unscored=True)[0].answer == "A cat."
    with pytest.raises(UserError, match="--unscored"):
        read_jsonl(path)


def test_a_new_question_is_seen_though_it_comes_a_character_at_a_time():
    tokenizer = data.Tokenizer(hub.EMBEDDED)
    ids = [i for letter in "x Question:" for i in tokenizer.encode(letter)]
    assert len(ids) >= 11 and data.starts_new_question(tokenizer, ids)
    assert not data.starts_new_question(tokenizer, ids[:-1])


def test_an_answer_that_nothing_could_match_is_refused(tmp_path):
    """A completion is cut at "Question:", even inside a word, so this answer itself would fail."""
    path = write(tmp_path, row(answer="Sub-Question: 2 + 3? 5\n#### 5"))
    said = 'line 1: the answer has no "#### number" before "Question:"'
    with pytest.raises(UserError, match=said):
        read_jsonl(path)


@pytest.mark.parametrize(
    "end",
    ["1/2", "5 - 10", "1,5", "10:30", "2^3", "1e6", "3, 4", "1.23.45", "2*(3+4)", "5 apples", "5%",
     "5, as said", "1 000", "1\u00a0000", "1\u202f000", "12 345,50", "1.234,5", "1'234",
     "1\u2019234", "1_234", "½", "1½", "1 1/2", "5-6", "5\u20136", "5 or 6",
     "2 x 10^5", "1 million", "2k",
     "\u0667\u0662", "\uff17\uff12", "5\u0662", "1. Add", "Step 1"],
)  # fmt: skip
def test_an_answer_that_goes_on_after_its_number_is_refused(tmp_path, end):
    path = write(tmp_path, row(answer=f"So\n#### {end}"))
    said = f'line 1: what follows the first "####" is not one number and nothing else: {end!r}'
    with pytest.raises(UserError, match=re.escape(said)):
        read_jsonl(path)


@pytest.mark.parametrize(
    "end", ["5", "-5", "$1,234.50", "5.", "5\n\n", "\u22125", "-$5", ".5", "0"]
)
def test_an_answer_of_one_number_is_taken(tmp_path, end):
    assert len(read_jsonl(write(tmp_path, row(answer=f"So\n#### {end}")))) == 1


@pytest.mark.parametrize("answer", ["#### 1. Add\n2+2=4\n#### 8", "#### 7\n#### 8", "####\n#### 8"])
def test_an_answer_with_a_second_marker_is_refused(tmp_path, answer):
    with pytest.raises(UserError, match='line 1: what follows the first "####" is not one number'):
        read_jsonl(write(tmp_path, row(answer=answer)))


@pytest.mark.parametrize(
    "completion, right",
    [
        ("18/1", False), ("18-0", False), ("18 000", False), ("18e2", False),
        ("18\u00a0000", False), ("18\u202f000", False), ("18'000", False), ("18_000", False),
        ("18½", False),
        ("18 1/2", False), ("18 or 19", False), ("18 to 20", False), ("18\u201320", False),
        ("18 million", False), ("18k", False), ("18 x 2", False), ("18.5", False), ("180", False),
        ("\u221218", False), ("-18", False), ("18\u0662", False),
        ("18", True), ("18.", True), ("18.00", True), ("$18.00", True), ("18 apples", True),
        ("18%", True), ("18 kg", True), ("18 (in all)", True), ("18, I think", True),
        ("18 to go", True), ("18\n5 left", True), ("18...", True),
    ],
)  # fmt: skip
def test_a_completion_earns_credit_for_the_number_it_states_and_no_other(completion, right):
    problem = Problem("How many?", "So\n#### 18", 0)
    assert data.is_correct(f"So\n#### {completion}", problem) == right


def test_a_minus_sign_of_unicode_is_a_minus():
    assert data.is_correct("#### \u22125", Problem("?", "#### -5", 0))


def test_missing_folder_empty_and_not_utf8_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path)
    for empty in ("", "\n \n"):
        with pytest.raises(UserError, match="has no problems"):
            read_jsonl(write(tmp_path, empty))
    with pytest.raises(UserError, match="not UTF-8 text .* at byte 14"):
        read_jsonl(write(tmp_path, b'{"question": "\xe9", "answer": "#### 1"}'))


def test_data_names_a_gsm8k_file_or_ones_own(tmp_path, monkeypatch):
    asked, own = [], write(tmp_path, row())

    def data_file(name, data_dir):
        asked.append((name, data_dir))
        return own

    monkeypatch.setattr(data.hub, "data_file", data_file)
    for which in ("main", "socratic"):
        for split in ("train", "test"):
            load_problems(which, split, "there")
    assert asked == [
        ("train.jsonl", "there"),
        ("test.jsonl", "there"),
        ("train_socratic.jsonl", "there"),
        ("test_socratic.jsonl", "there"),
    ]
    for split in ("train", "test"):
        assert load_problems(str(own), split) == [Problem("How many?", "#### 3", 0)]
    assert len(asked) == 4
    with pytest.raises(UserError, match="--data mian: give main, socratic, math or a file"):
        load_problems("mian", "train")


def test_tilde_in_a_files_name_is_the_home_folder(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    write(tmp_path, row())
    assert load_problems("~/mine.jsonl", "train") == [Problem("How many?", "#### 3", 0)]
    with pytest.raises(UserError, match="cannot read .*none.jsonl: No such file"):
        load_problems("~/none.jsonl", "train")


# Fixed samples


def test_split_validation_is_disjoint_and_complete():
    everything = problems(30)
    rest, held_out = split_validation(everything, 5)
    assert len(held_out) == 5 and len(rest) == 25
    assert sorted(rest + held_out, key=lambda p: p.index) == everything
    assert rest == sorted(rest, key=lambda p: p.index)
    assert held_out == sorted(held_out, key=lambda p: p.index)


def test_problem_0_is_never_held_out():
    everything = problems(30)
    for n in range(30):
        assert split_validation(everything, n)[0][0] == everything[0]
    assert split_validation(everything, 29)[0] == everything[:1]


def test_no_validation_leaves_all():
    assert split_validation(problems(3), 0) == (problems(3), [])


@pytest.mark.parametrize("n", [-1, 30, 31])
def test_a_validation_slice_that_leaves_nothing_is_refused(n):
    with pytest.raises(UserError, match=f"--val-examples {n} of 30"):
        split_validation(problems(30), n)


def test_samples_are_the_same_in_every_run_and_release():
    # Recorded once. With another sample, results of two releases could not be compared.
    assert [p.index for p in split_validation(problems(30), 5)[1]] == [5, 7, 8, 12, 13]
    assert [p.index for p in subset(problems(30), 5)] == [4, 6, 7, 11, 12]
    chosen = [p.index for p in subset(problems(1319), 256)]
    assert chosen[:5] == [6, 9, 13, 24, 27]


def test_samples_neither_depend_on_the_global_seed_nor_move_it():
    found = []
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate()
        found.append((split_validation(problems(99), 9), subset(problems(99), 9)))
        assert random.getstate() == before
    assert found[0] == found[1]


def test_subset_is_sorted_without_repeats_and_at_most_all():
    everything = problems(50)
    indices = [p.index for p in subset(everything, 20)]
    assert len(indices) == 20 and indices == sorted(set(indices))
    assert indices != list(range(20))  # a sample, not simply the first ones
    assert subset(everything, 50) == subset(everything, 51) == everything


def test_digest_changes_with_a_character_and_with_the_order():
    original = problems(3)
    assert digest(original) == digest(problems(3))
    changed = [
        [original[0]._replace(question="question 0."), *original[1:]],
        [*original[:2], original[2]._replace(answer="#### 3")],
        [p._replace(index=i) for i, p in enumerate(original[::-1])],  # another order in the file
        original[:2],
        # the same characters, divided differently
        [Problem("question 0#", "### 0", 0), *original[1:]],
    ]
    assert len({digest(p) for p in [original, *changed]}) == 1 + len(changed)
    assert digest(original[::-1]) == digest(original)  # the order in the list does not count


# Real data, if there is any

DATA_DIR = os.environ.get("NANOGSM_DATA_DIR")
MATH = os.environ.get("NANOGSM_MATH")  # a JSONL file with "problem" and "solution"
# Folders with a real tokenizer.json each, separated as in PATH
REAL = {
    name: os.environ.get(f"NANOGSM_{name.upper()}", "").split(os.pathsep)
    for name in ("gemma", "llama")
}
real_tokenizers = pytest.mark.parametrize(
    "folder", [folder for folders in REAL.values() for folder in folders if folder] or [None]
)


@pytest.mark.skipif(not DATA_DIR, reason="NANOGSM_DATA_DIR is not set")
def test_gsm8k_has_integer_answers_disjoint_splits_and_passes_its_own_check():
    train, test = (load_problems("main", split, DATA_DIR) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0] == data.ONE_SHOT
    for problem in train + test:
        assert extract_answer(problem.answer).is_integer(), problem
        assert is_correct(problem.answer, problem)  # so no answer is cut at a "Question:"
    assert not {p.question for p in train} & {p.question for p in test}


@pytest.mark.skipif(not DATA_DIR, reason="NANOGSM_DATA_DIR is not set")
def test_the_digests_of_gsm8ks_rows_are_those_of_its_files():
    there = [name for name in data.hub.DATA_FILES if (Path(DATA_DIR) / name).exists()]
    for name in there:
        pairs = [[p.question, p.answer] for p in read_jsonl(Path(DATA_DIR) / name)]
        found = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        assert data.hub.DATA_FILES[name].rows_sha256 in (found, None), name
    assert there


def test_several_worked_examples_come_in_their_order(tmp_path):
    tokenizer = Tokenizer(data.hub.EMBEDDED)
    shots = tuple(Problem(f"{i} + 1?", f"#### {i + 1}", i) for i in range(3))
    for style in ("plain", "chat"):
        prompt = Prompt(style, 2, True, examples=shots)
        text = tokenizer.decode(encode(tokenizer, prompt, "8 + 1?")[0])
        order = ["format '#### <number>'.", "0 + 1?", "#### 1", "1 + 1?", "#### 2", "8 + 1?"]
        assert [text.count(part) for part in order] == [1] * 6 and "2 + 1?" not in text
        assert sorted(order, key=text.index) == order
        alone = encode(tokenizer, prompt._replace(shots=0), "8 + 1?")[0]
        assert encode(tokenizer, prompt._replace(shots=0, examples=()), "8 + 1?")[0] == alone
    assert str(Prompt("plain", 5)) == "plain, 5-shot"
    assert Prompt("plain", 5).settings() == {"style": "plain", "shots": 5, "instruction": False}


def longest_of(folder, pairs, styles=("plain", "chat")) -> int:
    """Checks that every pair is encoded as its whole text would be, the prompt a prefix. Returns
    the length of the longest example in plain style."""
    tokenizer, longest = Tokenizer(folder), 0
    raw, family = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json"), tokenizer.family
    header = "".join(family.header)
    before = "".join((header.format("system"), family.system, family.end_of_turn, family.after))
    for question, answer in pairs:
        asks = f"{header.format('user')}{question}{family.end_of_turn}{family.after}"
        whole = {
            "plain": f"Question: {question}\nAnswer: {answer}{family.eos}",
            "chat": f"{before if family.system else ''}{asks}{header.format(family.model)}"
                    f"{answer}{family.end_of_turn}",
        }  # fmt: skip
        for style in styles:
            asked, _ = encode(tokenizer, Prompt(style), question)
            ids, mask = encode(tokenizer, Prompt(style), question, answer)
            assert ids[: len(asked)] == asked
            assert mask == [0] * len(asked) + [1] * (len(ids) - len(asked))
            assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
            assert [i in tokenizer.stop_ids for i in ids[len(asked) :]].index(True) == sum(mask) - 1
            assert ids == raw.encode(family.bos + whole[style], add_special_tokens=False).ids
            longest = max(longest, len(ids)) if style == "plain" else longest
    return longest


@pytest.mark.skipif(not DATA_DIR, reason="NANOGSM_DATA_DIR is not set")
@real_tokenizers
def test_gsm8k_by_a_real_tokenizer(folder):
    if folder is None:
        pytest.skip("NANOGSM_GEMMA and NANOGSM_LLAMA are not set")
    problems = load_problems("main", "train", DATA_DIR) + load_problems("main", "test", DATA_DIR)
    longest = longest_of(folder, [(p.question, p.answer) for p in problems])
    print(f"{folder}: {len(problems)} problems, the longest has {longest} tokens")
    assert 400 < longest <= 768  # train_sft.py's --max-seq-length leaves nothing out


@pytest.mark.skipif(not MATH, reason="NANOGSM_MATH is not set")
@real_tokenizers
def test_math_by_a_real_tokenizer(folder):
    if folder is None:
        pytest.skip("NANOGSM_GEMMA and NANOGSM_LLAMA are not set")
    rows = [json.loads(line) for line in Path(MATH).read_text("utf-8").splitlines()]
    longest = longest_of(folder, [(row["problem"], row["solution"]) for row in rows])
    print(f"{folder}: {len(rows)} problems, the longest has {longest} tokens")


def test_a_permutation_follows_from_seed_and_epoch_alone():
    orders = {
        (seed, epoch): data.permutation(50, seed, epoch) for seed in range(3) for epoch in range(3)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert data.permutation(50, 2, 1) == orders[2, 1]


def test_a_files_ending_may_be_in_capitals(tmp_path):
    path = tmp_path / "MINE.JSONL"
    path.write_text(row() + "\n")
    assert len(data.load_problems(str(path), "train")) == 1
