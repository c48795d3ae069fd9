# SPDX-License-Identifier: Apache-2.0
"""Every task against verdicts decided by hand, and its score's interval."""

import math
import re

import numpy as np
import pytest

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval import tasks
from llm_jepa_jax.eval.judging import judge
from llm_jepa_jax.eval.likelihood import Question
from llm_jepa_jax.eval.questions import Asked, Item
from llm_jepa_jax.eval.scores import bootstrap_ratio, judged, perplexity, wilson
from llm_jepa_jax.eval.task import (
    RIGHT,
    AnswerTask,
    LikelihoodTask,
    Skip,
    all_tasks,
    find_tasks,
    partly,
    undecided,
    wrong,
)
from llm_jepa_jax.text.chat import Message
from tests.conftest import REPOSITORY
from tests.databases import make_databases
from tests.task_cases import (
    CHOICES,
    CONCERTS,
    EXACT,
    GSM8K,
    LABELS,
    LIKELIHOODS,
    NQ_OPEN,
    PARAPHRASE,
    SEMANTIC,
    S,
)

TASKS = all_tasks()
IN_DATABASE = [(*case, "For db_id:[concerts]\n\nWhich?") for case in CONCERTS]
PLAIN = [(*case, "What?") for case in EXACT + SEMANTIC + GSM8K + NQ_OPEN + LABELS]
CASES = {
    name: [
        (answer, target, verdicts[name], given)
        for answer, target, verdicts, given in PLAIN + PARAPHRASE + IN_DATABASE
        if name in verdicts
    ]
    for name in TASKS
}


def record(given, target):
    return Record((Message("user", given), Message("assistant", target)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return EvalConfig(databases=str(make_databases(tmp_path_factory.mktemp("databases"))))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, AnswerTask)])
def test_answers_are_judged_as_by_hand(name, config):
    task, cases = TASKS[name], CASES[name]
    assert len(cases) >= 20
    records = [record(given, target) for _, target, _, given in cases]
    with task.session(config, records) as one:
        for (answer, target, expected, _), asked in zip(cases, records, strict=True):
            try:
                task.target(asked)
                verdict = one(asked, answer)
            except Skip as skip:
                assert expected == S and str(skip), (answer, target)
                continue
            found = verdict.credit if isinstance(expected, float) else verdict.word
            assert found == pytest.approx(expected), (answer, target, verdict)
            assert (verdict.credit == 1.0) == (verdict.word == "right")
            assert verdict.reason or verdict.word in ("right", "wrong")


def test_choices_are_judged_as_by_hand():
    """Options of one token and of two, whose log-probabilities add up."""
    task = TASKS["hellaswag"]
    assert len(CHOICES) >= 20
    for values, target, question, expected in CHOICES:
        asked = record(question, target)
        if expected == S:
            with pytest.raises(Skip):
                task.options(asked)
            continue
        options = task.options(asked)
        assert len(options) == len(values)
        for parts in (1, 2):
            questions = tuple(
                Question((number,), tuple((0, token) for token in range(parts))) for number in range(len(options))
            )
            slots = {(n,): {(0, token): value / parts for token in range(parts)} for n, value in enumerate(values)}
            item = Item("a:1", asked, target, options=options, questions=questions)
            (line,), score = judge(Asked(task, [item], []), {}, slots, EvalConfig())
            assert line["verdict"] == expected and score.value == (expected == "right"), (values, target)
            assert line["log_probabilities"] == pytest.approx(dict(zip(options, values, strict=True)))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, LikelihoodTask)])
def test_perplexities_are_those_by_hand(name):
    assert len(LIKELIHOODS) >= 20
    for losses, expected in LIKELIHOODS:
        items, slots = [], {}
        for number, tokens in enumerate(losses):
            places = tuple((place, 5) for place in range(len(tokens)))
            items.append(Item(f"a:{number}", record("a", "b"), "b", questions=(Question((number,), places),)))
            slots[number,] = dict(zip(places, [-loss for loss in tokens], strict=True))
        lines, score = judge(Asked(TASKS[name], items, []), {}, slots, EvalConfig())
        assert score.value == pytest.approx(expected, rel=1e-5) and not score.share
        assert [line["tokens"] for line in lines] == [len(tokens) for tokens in losses]
        assert [line["loss"] for line in lines] == pytest.approx([sum(tokens) for tokens in losses])


def test_scores_count_everything():
    verdicts = [RIGHT, RIGHT, wrong("x"), undecided("y")]
    score = judged("t", verdicts, {"no target": 3})
    assert (score.value, score.asked, score.words) == (0.5, 4, {"right": 2, "wrong": 1, "undecided": 1})
    assert (score.low, score.high) == pytest.approx((0.150036, 0.849964), abs=1e-5)
    metrics = score.metrics()
    assert metrics["t"] == 0.5 and metrics["t_skipped"] == 3 and metrics["t_undecided"] == 1 and metrics["t_asked"] == 4
    assert str(score) == "t 50.0% of 4 (95%: 15.0 to 85.0); 1 undecided; 3 skipped: no target"
    graded = judged("t", [partly(0.5)] * 10 + [RIGHT] * 10, {})
    assert graded.value == 0.75 and graded.low < 0.75 < graded.high and graded.high - graded.low < 0.3
    assert judged("t", [], {"none": 2}).asked == 0


def test_intervals_are_those_of_tables():
    """Wilson's of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, asked, low, high in [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ]:  # fmt: skip
        assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(30):
        sums, weights = rng.exponential(2.0, 80), rng.integers(1, 9, 80)
        low, high = bootstrap_ratio(sums * weights, weights)
        inside += low < 2.0 < high
    assert 24 <= inside <= 30
    assert bootstrap_ratio(np.array([3.0]), np.array([2])) == (1.5, 1.5)
    none = np.array([])
    assert (
        perplexity("p", np.array([4e3]), np.array([4]), {}).value == perplexity("p", none, none, {}).value == math.inf
    )


def test_names_of_tasks_are_checked():
    assert [task.name for task in find_tasks("spider, exact_match")] == ["spider", "exact_match"]
    for names, words in [("exact", "names 'exact'; use some of exact_match"), ("spider,spider", "twice"), ("", "''")]:
        with pytest.raises(UserError, match=words):
            find_tasks(names)
    assert all(task.name == name and task.summary for name, task in TASKS.items())


def test_a_task_is_one_file(tmp_path, monkeypatch):
    """The worked example of docs/tasks.md, found and judging."""
    page = (REPOSITORY / "docs" / "tasks.md").read_text()
    ((name, code),) = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(code)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    (task,) = find_tasks("json_match")
    with task.session(EvalConfig(), []) as one:
        verdicts = [one(record("?", '{"a": [1, 2]}'), answer).word for answer in ('{"a":[1,2.0]}', '{"a": []}', "{a}")]
    assert verdicts == ["right", "wrong", "unparsed"]
    with pytest.raises(Skip, match="the target is not JSON"):
        task.target(record("?", "{a}"))


def test_the_table_of_tasks_is_complete():
    page = (REPOSITORY / "docs" / "tasks.md").read_text()
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for cell in table for name in re.findall(r"`(\w+)`", cell)} == set(TASKS)
