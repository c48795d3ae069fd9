# SPDX-License-Identifier: Apache-2.0
"""Answers with thoughts and without: Qwen 3 keeps the last thought of a conversation, DeepSeek R1 none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.judging import judge
from llm_jepa_jax.eval.questions import Asked, Item
from llm_jepa_jax.eval.task import all_tasks
from llm_jepa_jax.text.chat import Message, render, render_prompt, render_view
from llm_jepa_jax.text.thoughts import split_thought, without_thought
from llm_jepa_jax.text.tokenizer import load_tokenizer
from tests.chat_families import write_family

ASKED, AGAIN = Message("user", "lines with a digit?"), Message("user", " and the word 'moon'")
PLAIN = Message("assistant", ".*[0-9].*")
THOUGHT = Message("assistant", "<think>\nA digit is [0-9].\n\nSo:\n</think>\n\n.*[0-9].*")
TIGHT = Message("assistant", "<think>so</think>yes ")
UNOPENED = Message("assistant", "so then\n</think>\n\nyes")
EMPTY = Message("assistant", "<think>\n\n</think>\n\nyes")
CASES = {
    "without": [ASKED, PLAIN], "twice without": [ASKED, PLAIN, AGAIN, PLAIN], "last": [ASKED, PLAIN, AGAIN, THOUGHT],
    "earlier": [ASKED, THOUGHT, AGAIN, PLAIN], "both": [ASKED, THOUGHT, AGAIN, TIGHT], "unopened": [ASKED, UNOPENED],
    "empty": [ASKED, EMPTY], "earlier empty": [ASKED, EMPTY, AGAIN, PLAIN],
    "system": [Message("system", "Be brief."), ASKED, THOUGHT, AGAIN, PLAIN],
}  # fmt: skip
KEPT = {
    "last": "<think>\nA digit is [0-9].\n\nSo:\n</think>\n\n.*[0-9].*", "both": "<think>\nso\n</think>\n\nyes ",
    "unopened": "<think>\nso then\n</think>\n\nyes",
}  # fmt: skip
"""How Qwen 3 lays the last answer's thought; of the other cases the last content is the answer alone."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("thinking")
    return {name: load_tokenizer(write_family(name, directory)) for name in ("qwen3", "deepseek_r1")}


def shown(tokenizer, ids):
    return "".join(tokenizer.piece(int(index)) for index in ids)


def contents(tokenizer, rendered):
    return [shown(tokenizer, rendered.tokens[before + 1 : last + 1]) for before, last in rendered.contents]


@pytest.mark.parametrize("case", CASES)
def test_qwen_3_keeps_the_last_thought(loaded, case):
    """It is part of the content and of the targets; earlier ones are left out, and the contents are the answers."""
    tokenizer, turns = loaded["qwen3"], CASES[case]
    rendered = render(tokenizer, turns)
    found = contents(tokenizer, rendered)
    for turn, content in zip(turns[:-1], found[:-1], strict=True):
        assert content == (without_thought(turn.content) if turn.role == "assistant" else turn.content)
    expected = KEPT.get(case, without_thought(turns[-1].content))
    assert found[-1] == expected
    targets = shown(tokenizer, rendered.tokens[rendered.assistant_target])
    assert targets.endswith(expected + "<|im_end|>") and targets.count("<think>") == (case in KEPT)
    assert shown(tokenizer, rendered.tokens).count("<think>") == 1, "the template puts an empty one where there is none"


@pytest.mark.parametrize("case", ["without", "twice without", "earlier", "earlier empty", "empty", "system"])
def test_deepseek_r1_takes_answers_without_thoughts(loaded, case):
    """Its prompts open a thought that no conversation of its template holds, so prompts end as conversations do."""
    tokenizer, turns = loaded["deepseek_r1"], CASES[case]
    rendered = render(tokenizer, turns)
    for turn, content in zip(turns, contents(tokenizer, rendered), strict=True):
        assert content == (without_thought(turn.content) if turn.role == "assistant" else turn.content)
    assert "think" not in shown(tokenizer, rendered.tokens)
    targets = shown(tokenizer, rendered.tokens[rendered.assistant_target])
    assert targets.endswith(without_thought(turns[-1].content) + "<｜end▁of▁sentence｜>")
    prompt = render_prompt(tokenizer, turns[:-1])
    assert rendered.tokens[: len(prompt)].tolist() == prompt
    assert shown(tokenizer, prompt).endswith("<｜Assistant｜>")


@pytest.mark.parametrize("case", ["last", "both", "unopened"])
def test_a_thought_that_would_be_lost_is_refused(loaded, case):
    with pytest.raises(UserError, match=r"leaves out the thought of the last answer: .* with text.chat_template"):
        render(loaded["deepseek_r1"], CASES[case])


def test_what_is_left_out_is_said_once(loaded, caplog):
    from llm_jepa_jax.text import pretrained

    pretrained._say_dropped.cache_clear()
    caplog.set_level("INFO")
    for _ in range(2):
        render(loaded["qwen3"], CASES["earlier"])
    assert caplog.text.count("leaves thoughts out of answers before the last; they are not trained on") == 1


@pytest.mark.parametrize(
    "content", ["<think>a</think>b</think>c", "<think>a<think>b</think>c", "x <think>a</think>c", "<think>a</think>"]
)
def test_what_is_ambiguous_is_refused(loaded, content):
    """Two ends, two beginnings, text before the thought: the template would lose some of it."""
    turns = [ASKED, Message("assistant", content)]
    if content.endswith("</think>"):
        assert contents(loaded["qwen3"], render(loaded["qwen3"], turns))[-1] == "<think>\na\n</think>\n\n"
        return
    with pytest.raises(UserError, match=r"renders the content of turn 1 \(assistant\)"):
        render(loaded["qwen3"], turns)


def test_a_view_is_the_answer(loaded):
    """Alone, an answer is rendered without its thought: that is what a text predicts."""
    for tokenizer in loaded.values():
        tokens, header = render_view(tokenizer, "assistant", THOUGHT.content)
        assert tokenizer.decode(tokens[header:]) == ".*[0-9].*"


def test_answers_are_compared_without_thoughts():
    task, record = all_tasks()["exact_match"], Record((Message("user", "a digit"), THOUGHT))
    assert task.target(record) == ".*[0-9].*" and without_thought("a < b") == "a < b"
    for answer, verdict in (
        (THOUGHT.content, "right"),
        (".*[0-9].*", "right"),
        ("<think>.*[0-9].*</think> no", "wrong"),
    ):
        asked = Asked(task, [Item("a:1", record, task.target(record), prompt=(1,))], [])
        (line,), _ = judge(asked, {(1,): (answer, True)}, {}, EvalConfig())
        assert line["verdict"] == verdict and line["answer"] == answer


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "b c", "é"]), max_size=9).map("".join))
def test_parts_are_the_whole(content):
    parts = split_thought(content)
    if parts:
        assert "".join(parts) == content and parts.thought == parts.thought.strip()
        assert parts.answer == parts.answer.strip() and not parts.rest.strip()
        assert "<think>" not in parts.thought and "</think>" not in parts.thought + parts.answer


@pytest.mark.parity
@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_ids_equal_transformers(loaded, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = loaded[name]
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.files.origin)
    for case, turns in CASES.items():
        if name == "deepseek_r1" and case in KEPT:
            continue
        spelled = [{"role": turn.role, "content": turn.content} for turn in turns]
        ids = theirs.apply_chat_template(spelled, enable_thinking=False)["input_ids"]
        assert render(tokenizer, turns).tokens.tolist() == ids, case
