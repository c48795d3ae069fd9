# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import MeshConfig, ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import encode
from llm_jepa_jax.eval.generate import Generator
from llm_jepa_jax.models.transformer import forward, head_kernel, init_params
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.parallel.mesh import make_mesh
from tests.conftest import SMALL_MODEL

CONFIG = ModelConfig(**SMALL_MODEL | {"init_std": 0.15})
NEW = 12


@functools.cache
def weights():
    """Made by the first test that wants them, not by every process that reads this file."""
    return jax.jit(lambda key: init_params(key, CONFIG, jnp.float32))(jax.random.key(3))


def generator(tokenizer, devices=1, batch_size=8, new=NEW, mesh_config=None):
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
    return Generator(CONFIG, tokenizer, mesh, new, batch_size, jnp.float32)


def prompts(tokenizer, count=7):
    texts = ["lines", "lines with a digit", "a much longer description of the word 'moon' and of a vowel"]
    return [[tokenizer.bos_id, *tokenizer.encode(texts[i % 3] + " x" * i)] for i in range(count)]


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Greedy answers by whole forward passes, one token and one prompt at a time."""
    head, places = np.asarray(head_kernel(weights(), CONFIG)), np.arange(96)[None]
    states = jax.jit(lambda tokens, segments: forward(weights(), CONFIG, tokens, places, segments, dtype=jnp.float32))
    allowed = np.array([i == tokenizer.end_of_turn_id or not tokenizer.is_control(i) for i in range(512)])
    answers = []
    for prompt in prompts(tokenizer):
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW:
            padded = np.zeros((1, 96), np.int32)
            padded[0, : len(ids)] = ids
            segments = (np.arange(96) < len(ids))[None].astype(np.int32)
            logits = np.where(allowed, np.asarray(states(padded, segments))[0, len(ids) - 1] @ head, -np.inf)
            best = int(logits.argmax())
            if best == tokenizer.end_of_turn_id:
                break
            ids.append(best)
        answers.append((ids[len(prompt) :], len(ids) < len(prompt) + NEW))
    return answers


@pytest.mark.parametrize(
    ("devices", "batch_size", "mesh"),
    [(1, 1, {}), (1, 3, {}), (1, 8, {}), (8, 8, {}), (8, 3, {"fsdp": 4, "tensor": 2, "data": 1})],
)
def test_answers_equal_step_by_step_greedy_whatever_the_batch(tokenizer, expected, devices, batch_size, mesh):
    generate = generator(tokenizer, devices, batch_size, mesh_config=MeshConfig(**mesh))
    assert generate(weights(), prompts(tokenizer)) == expected


def test_answers_end_at_the_end_token(tokenizer, expected):
    """With the end token made the most likely, every answer is empty and ended."""
    assert not all(ended for _, ended in expected)
    hidden = np.asarray(
        encode(
            weights(), CONFIG, JepaConfig(), prompts(tokenizer), make_mesh(MeshConfig(), jax.devices()[:1]), jnp.float32
        )
    )
    embedding = weights()["embedding"].at[tokenizer.end_of_turn_id].set(100 * hidden.mean(0))
    assert all(
        answer == ([], True)
        for answer in generator(tokenizer)(weights() | {"embedding": embedding}, prompts(tokenizer))
    )


def test_too_long_prompts_are_refused(tokenizer):
    with pytest.raises(UserError, match="exceed model.max_positions=512"):
        generator(tokenizer)(weights(), [[5] * 501])


def test_embeddings_are_the_last_hidden_states_in_order(tokenizer):
    sequences, expected = prompts(tokenizer, 5), []
    for ids in sequences:
        array, ones = np.array([ids], np.int32), np.ones((1, len(ids)), np.int32)
        places = np.arange(len(ids))[None]
        states = jax.jit(lambda p, *row: forward(p, CONFIG, *row, dtype=jnp.float32))(weights(), array, places, ones)
        expected.append(states[0, -1])
    for devices in (1, 8):
        out = encode(
            weights(), CONFIG, JepaConfig(), sequences, make_mesh(MeshConfig(), jax.devices()[:devices]), jnp.float32
        )
        np.testing.assert_allclose(out, expected, atol=1e-5)
