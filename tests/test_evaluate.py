# SPDX-License-Identifier: Apache-2.0
"""Probabilities of given tokens, and evaluation of several tasks at once with a real model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import MeshConfig, ModelConfig
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.evaluate import Evaluator
from llm_jepa_jax.eval.likelihood import Question, log_probabilities
from llm_jepa_jax.eval.questions import merged
from llm_jepa_jax.models.transformer import forward, head_kernel, init_params
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.text.chat import render, render_prompt
from tests.conftest import SMALL_MODEL, small_config
from tests.databases import make_databases

CONFIG = ModelConfig(**SMALL_MODEL | {"init_std": 0.15, "logit_soft_cap": 3.0, "head_bias": True})


@functools.cache
def weights():
    """Made by the first test that wants them, not by every process that reads this file."""
    bias = jax.random.normal(jax.random.key(4), (CONFIG.vocab_size,))
    return jax.jit(lambda key: init_params(key, CONFIG, jnp.float32))(jax.random.key(3)) | {"head_bias": bias}


def mesh_of(devices, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def plain_log_probabilities(tokens):
    """float32 [L, V] of one sequence, by a forward pass of its own (padded, so that it is compiled once)."""
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(tokens)] = tokens
    segments = (np.arange(96) < len(tokens))[None].astype(np.int32)
    hidden = forward(weights(), CONFIG, padded, np.arange(96)[None], segments, dtype=jnp.float32)[0, : len(tokens)]
    logits = np.asarray(hidden @ head_kernel(weights(), CONFIG), np.float64) + np.asarray(weights()["head_bias"])
    logits = CONFIG.logit_soft_cap * np.tanh(logits / CONFIG.logit_soft_cap)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def questions():
    """Of several lengths and numbers of slots, some over more than one chunk, in no order."""
    rng = np.random.default_rng(0)
    made = []
    for length, slots in [(5, 1), (90, 12), (3, 4), (70, 9), (30, 3), (1, 1), (31, 0)]:
        places = rng.integers(0, length, slots).tolist()
        wanted = tuple(zip(places, rng.integers(0, 512, slots).tolist(), strict=True))
        made.append(Question(tuple(rng.integers(0, 512, length).tolist()), wanted))
    return made


@pytest.fixture(scope="module")
def expected(questions):
    every = [plain_log_probabilities(question.tokens) for question in questions]
    return [[table[slot] for slot in question.slots] for table, question in zip(every, questions, strict=True)]


@pytest.mark.parametrize(
    ("devices", "batch_size", "sizes"),
    [(1, 1, {}), (1, 3, {}), (8, 8, {}), (8, 3, {"fsdp": 2, "tensor": 2, "data": 2})],
)
def test_probabilities_are_those_of_one_sequence_alone(questions, expected, devices, batch_size, sizes):
    """Whatever the batch, the order and the devices; the most probable token is the same one too."""
    order = np.random.default_rng(batch_size).permutation(len(questions))
    done = []
    found = log_probabilities(
        weights(),
        CONFIG,
        [questions[i] for i in order],
        mesh_of(devices, **sizes),
        jnp.float32,
        batch_size,
        done.append,
    )
    assert done[-1] == len(questions) and done == sorted(done)
    for i, values in zip(order, found, strict=True):
        assert values.dtype == np.float32 and len(values) == len(expected[i])
        np.testing.assert_allclose(values, expected[i], rtol=1e-5, atol=1e-5)
        assert not len(values) or values.argmax() == np.argmax(expected[i])


def test_padding_of_the_vocabulary_has_no_probability():
    few = dataclasses.replace(CONFIG, vocab_size=300)
    junk = {name: few.padded_vocab_size - 300 for name in ("embedding", "head_bias")}
    params = weights() | {name: weights()[name][: few.padded_vocab_size] for name in junk}
    question = Question((1, 2, 3), tuple((place, token) for place in range(3) for token in (0, 7, 299)))
    (found,) = log_probabilities(params, few, [question], mesh_of(1), jnp.float32, 1)
    alone = dataclasses.replace(few, vocab_multiple=1)
    cut = weights() | {name: weights()[name][:300] for name in junk}
    (expected,) = log_probabilities(cut, alone, [question], mesh_of(1), jnp.float32, 1)
    assert junk["embedding"] == 84 and np.abs(np.asarray(params["embedding"][300:])).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_sequences_are_one_forward_pass():
    two = [Question((1, 2), ((1, 5),)), Question((1, 2), ((1, 6), (1, 5))), Question((1, 3), ((1, 5),))]
    assert merged(two) == [Question((1, 2), ((1, 5), (1, 6))), Question((1, 3), ((1, 5),))]


OPTIONS = "Which word?\nA) moon\nB) river\nC) dog"
RECORDS = [
    {"messages": [{"role": "user", "content": OPTIONS}, {"role": "assistant", "content": "B"}]},
    {"text": "lines with a digit", "code": ".*[0-9].*"},
    {"text": "lines with a digit", "code": "(.*)([0-9])(.*)"},
    {"text": "lines that are 'dog'", "code": "dog\\d"},
    {"text": "Plain text that says something about a moon."},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "eval.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return JsonlSource(path)


def evaluator(tokenizer, source, tmp_path, tasks, **changes):
    model = SMALL_MODEL | {"init_std": 0.15, "logit_soft_cap": 3.0, "head_bias": True}
    config = small_config(tmp_path, model=model, eval={"tasks": tasks, "max_new_tokens": 8} | changes)
    return Evaluator(config, mesh_of(1), tokenizer, source)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_share_answers_and_every_record_is_accounted_for(tokenizer, source, tmp_path):
    tasks = "semantic_match,hellaswag,exact_match,perplexity,perplexity_all"
    asked = evaluator(tokenizer, source, tmp_path, tasks)
    done = []
    metrics = asked(weights(), 0, lambda task: tmp_path / "eval" / f"{task}-7.jsonl", done.append)
    # Three different prompts for two tasks, one sequence for the options, and five records of which one is that too.
    assert asked.size(0) == done[-1] == 3 + 1 + 5
    files = {name: lines_of(tmp_path / "eval" / f"{name}-7.jsonl") for name in tasks.split(",")}
    assert {name: len(lines) for name, lines in files.items()} == {
        "semantic_match": 4, "hellaswag": 4, "exact_match": 4, "perplexity": 5, "perplexity_all": 5,
    }  # fmt: skip
    assert [line["verdict"] for line in files["semantic_match"]][3:] == ["skipped"]
    assert [line["answer"] for line in files["exact_match"]][1] == files["semantic_match"][1]["answer"]
    assert files["exact_match"][3]["record"].endswith("eval.jsonl:4") and files["exact_match"][3]["target"] == "dog\\d"
    assert set(files["exact_match"][0]) == {
        "record", "prompt", "answer", "ended", "target", "verdict", "credit", "reason",
    }  # fmt: skip
    assert [line["reason"] for line in files["hellaswag"][1:]] == ["the question has no lines `A) …`, `B) …`"] * 3
    assert metrics["hellaswag_asked"] == 1 and metrics["hellaswag_skipped"] == 3 and metrics["eval_examples"] == 5
    assert metrics["semantic_match_skipped"] == 1 and metrics["perplexity_asked"] == 5
    summary = json.loads((tmp_path / "eval" / "semantic_match-7.json").read_text())
    assert summary["skipped"] == {"the target is not in the dialect": 1} and summary["asked"] == 3
    assert asked.quality(metrics) == metrics["semantic_match"]


def test_choices_and_perplexities_are_those_of_plain_forward_passes(tokenizer, source, tmp_path):
    asked = evaluator(tokenizer, source, tmp_path, "perplexity,perplexity_all,hellaswag")
    metrics = asked(weights(), 0, lambda task: tmp_path / f"{task}-7.jsonl")
    losses, every = [], []
    for index in range(3):
        rendered = render(tokenizer, source[index].messages)
        table = plain_log_probabilities(rendered.tokens)
        loss = [-table[i - 1, rendered.tokens[i]] for i in range(1, len(rendered.tokens))]
        every += loss
        losses += [value for value, wanted in zip(loss, rendered.assistant_target[1:], strict=True) if wanted]
    head = evaluator(tokenizer, source, tmp_path, "perplexity,perplexity_all")
    lines = {name: lines_of(tmp_path / f"{name}-7.jsonl")[:3] for name in ("perplexity", "perplexity_all")}
    for name, values in (("perplexity", losses), ("perplexity_all", every)):
        assert sum(line["tokens"] for line in lines[name]) == len(values)
        assert sum(line["loss"] for line in lines[name]) == pytest.approx(sum(values), rel=1e-5)
    whole = lines_of(tmp_path / "perplexity-7.jsonl")
    mean = sum(line["loss"] for line in whole) / sum(line["tokens"] for line in whole)
    assert metrics["perplexity"] == pytest.approx(np.exp(mean)) and head.quality(metrics) == -metrics["perplexity"]
    assert head.quality({}) is None and head.quality({"perplexity": "inf"}) == -np.inf
    prompt = render_prompt(tokenizer, source[0].messages[:-1])
    (line, *_) = lines_of(tmp_path / "hellaswag-7.jsonl")
    letters = {}
    for letter in "ABC":
        message = source[0].messages[-1].__class__("assistant", letter)
        tokens, turns = tokenizer.turns([*source[0].messages[:-1], message])
        first, end = turns[-1].content
        assert tokens[:first] == prompt[:first]
        table = plain_log_probabilities(tokens)
        letters[letter] = sum(table[i - 1, tokens[i]] for i in range(first, end))
    assert line["log_probabilities"] == pytest.approx(letters, rel=1e-5)
    assert line["answer"] == max(letters, key=letters.get)


def test_plain_text_is_asked_nothing_but_its_probability(tokenizer, tmp_path, caplog):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"text": "Only text. Nothing is asked."}\n')
    asked = evaluator(tokenizer, JsonlSource(path), tmp_path, "exact_match,perplexity")
    assert [task.name for task in asked.tasks] == ["perplexity"]
    assert "no evaluation record has a conversation: exact_match is skipped" in caplog.text
    assert asked(weights(), 0, lambda task: tmp_path / f"{task}-1.jsonl")["perplexity"] > 1


def test_what_a_task_lacks_is_said_before_it_is_asked(tokenizer, source, tmp_path):
    spider = tmp_path / "spider.jsonl"
    line = '{"text": "For db_id:[%s]\\n\\nHow many?", "code": "SELECT count(*) FROM singer"}\n'
    spider.write_text(line % "concerts" + line % "concerts" + line % "planes")
    databases = make_databases(tmp_path / "databases")
    (databases / "text").mkdir()
    (databases / "text" / "text.sqlite").write_text("no database")
    named = JsonlSource(spider)
    for records, changes, words in [
        (source, {"tasks": "gsm8k"}, r"names gsm8k, which can ask none of 4 records \(the target has no number behind"),
        (named, {"tasks": "spider"}, "`eval.databases` is empty; spider needs the directory"),
        (source, {"tasks": "spider", "databases": str(databases)}, "names spider, which can ask none of 4 records"),
        (
            named,
            {"tasks": "spider", "databases": str(databases)},
            r"spider.jsonl:3: needs the database .*planes.sqlite",
        ),
        (source, {"tasks": "spidr"}, "names 'spidr'; use some of"),
        (
            source,
            {"tasks": "exact_match", "max_new_tokens": 500},
            r"eval.jsonl:1: its prompt of \d+ tokens and `eval.max",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            evaluator(tokenizer, records, tmp_path, **changes)
    spider.write_text(line % "text")
    with pytest.raises(UserError, match="text.sqlite: is no SQLite database"):
        evaluator(tokenizer, JsonlSource(spider), tmp_path, "spider", databases=str(databases))


def test_spider_is_judged_with_real_databases(tokenizer, tmp_path):
    """A model that has learnt nothing answers no SQL; a target that fails is counted as skipped."""
    spider = tmp_path / "spider.jsonl"
    line = '{"text": "For db_id:[concerts]\\n\\nWhich?", "code": "SELECT %s FROM singer"}\n'
    spider.write_text(line % "name" + line % "nme")
    databases = make_databases(tmp_path / "databases")
    asked = evaluator(tokenizer, JsonlSource(spider), tmp_path, "spider,spider_published", databases=str(databases))
    metrics = asked(weights(), 0, lambda task: tmp_path / f"{task}-1.jsonl")
    assert asked.size(0) == 1 and metrics["spider_asked"] == 1 and metrics["spider_skipped"] == 1
    lines = lines_of(tmp_path / "spider-1.jsonl")
    assert lines[1]["reason"] == "the target's query gives no result: no such column: nme"
    assert lines[0]["verdict"] in ("unparsed", "wrong") and metrics["spider_published_asked"] == 2
