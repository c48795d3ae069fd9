# SPDX-License-Identifier: Apache-2.0
"""Answers of the recorded miniature to real prompts against `transformers`, which is asked one prompt at a time."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.eval import generate
from llm_jepa_jax.eval.generate import make_generator
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.text.chat import render_prompt

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
NEW, COUNT, CLEAR = 16, 24, 1e-4


@pytest.fixture(scope="module")
def miniature(shared_dir):
    return shared_dir / "goldens" / "tiny_llama"


@pytest.fixture(scope="module")
def asked(shared_dir, miniature):
    """Questions of NL-RX behind the published system turn and two solved ones, by the miniature's own template."""
    source, tokenizer = JsonlSource(shared_dir / "data" / "synth_test.jsonl"), lj.load(miniature).tokenizer
    system, *_ = source[0].messages
    solved = [turn for i in (COUNT, COUNT + 1) for turn in source[i].messages[1:]]
    return [render_prompt(tokenizer, [system, *solved, source[i].messages[1]]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def expected(miniature, asked):
    """Greedy answers up to the first choice that leads by less than rounding may move it; most have none."""
    model = transformers.AutoModelForCausalLM.from_pretrained(miniature).eval()
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        best_Tx2 = np.stack([torch.topk(scores[0], 2).values.numpy() for scores in out.scores])
        close = np.flatnonzero(best_Tx2[:, 0] - best_Tx2[:, 1] < CLEAR)
        answers.append(out.sequences[0, len(prompt) :].tolist()[: close[0] if len(close) else NEW])
    assert sum(len(answer) == NEW for answer in answers) > COUNT * 3 // 4
    return answers


@pytest.mark.parametrize(
    ("devices", "sizes", "batch_size"),
    [(1, {}, 1), (1, {}, 5), (1, {}, 0), (8, {}, 0), (8, {"fsdp": 4, "tensor": 2, "data": 1}, 8)],
)
def test_answers_are_those_of_transformers(miniature, asked, expected, monkeypatch, caplog, devices, sizes, batch_size):
    """Token for token in batches of every size, in another order, on other meshes, with what all share read once."""
    caplog.set_level(logging.INFO, "llm_jepa_jax")
    monkeypatch.setattr(generate, "SHARED_PAYS", 32)
    run = lj.load(miniature).run
    keys = dataclasses.replace(run.config.eval, max_new_tokens=NEW, batch_size=batch_size)
    vocabulary = generate.Vocabulary(run.config.model.vocab_size, ())
    mesh, order = make_mesh(MeshConfig(**sizes), jax.devices()[:devices]), np.random.default_rng(1).permutation(COUNT)
    make = make_generator(dataclasses.replace(run.config, eval=keys), vocabulary, mesh)
    found = make(jax.device_get(run.params), [asked[i] for i in order])
    for i, (answer, _) in zip(order, found, strict=True):
        assert len(answer) == NEW and answer[: len(expected[i])] == expected[i]
    assert "tokens that all prompts begin with are encoded once" in caplog.text
