# SPDX-License-Identifier: Apache-2.0
"""Which tokens a draw may take and how likely each is; that it depends on nothing but seed, prompt and step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa_jax.config import Config, freeze, to_dict
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.sampling import Sampling, prompt_keys
from llm_jepa_jax.resolve import resolve

SETTINGS = [
    (0.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.3, 0, 0.8),
    (0.5, 20, 0.6),
    (2.0, 40, 0.95),
    (1.0, 900, 0.3),
    (1.0, 0, 1e-6),
]


def some_logits(rows=16, size=60, forbidden=7):
    logits = 3 * np.random.default_rng(0).standard_normal((rows, size)).astype(np.float32)
    logits[:, :forbidden] = -np.inf
    return logits


def oracle(logits_V, temperature, top_k, top_p):
    """Probabilities of one distribution in float64, by adding up the most probable tokens one after the other."""
    scaled = logits_V.astype(np.float64) / temperature
    falling = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k:
        falling = [i for i in falling if scaled[i] >= scaled[falling[min(top_k, len(falling)) - 1]]]
    weights = np.exp(scaled - scaled.max())
    total, kept = weights[falling].sum(), []
    for i in falling:
        if kept and top_p < 1 and weights[kept].sum() >= top_p * total * (1 - 1e-12) and scaled[i] < scaled[kept[-1]]:
            break
        kept.append(i)
    probabilities = np.zeros(len(scaled))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=24, max_size=24),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.integers(0, 30),
    st.sampled_from([0.05, 0.31, 0.77, 0.9, 1.0]),
)
def test_what_is_kept_is_what_an_oracle_keeps(whole, temperature, top_k, top_p):
    """Ties too: they stay or go together."""
    logits = np.array(whole, np.float32) / 8
    expected = oracle(logits, temperature, top_k, top_p)
    reached = np.cumsum(np.sort(oracle(logits, temperature, top_k, 1.0))[::-1])
    if np.abs(reached - top_p).min() < 1e-5 < 1 - top_p:
        return  # rounding decides
    found = np.asarray(jax.nn.softmax(Sampling(temperature, top_k, top_p).filtered(logits[None])))[0]
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_have_the_filtered_distribution(setting):
    """20,000 draws of one distribution: each token's share within 5 standard deviations, and none that is left out."""
    logits, count = some_logits(1), 20000
    expected = oracle(logits[0], *setting)
    prompts = [(i,) for i in range(count)]
    choose = jax.jit(lambda logits, keys: Sampling(*setting).choose(logits, keys, 3))
    drawn = np.asarray(choose(jnp.broadcast_to(logits, (count, logits.shape[1])), prompt_keys(0, prompts)))
    shares = np.bincount(drawn, minlength=logits.shape[1]) / count
    assert not shares[expected == 0].any()
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_a_draw_is_of_seed_prompt_repetition_and_step_alone():
    prompts = [(1, 2), (3,), (1, 2), (4, 5, 6)]
    keys = prompt_keys(0, prompts)
    assert len({tuple(key) for key in keys.tolist()}) == 4
    order = [3, 0, 1, 2]
    np.testing.assert_array_equal(prompt_keys(0, [prompts[i] for i in order]), keys[order])
    assert not (prompt_keys(1, prompts) == keys).all(axis=1).any()
    sampling, logits = Sampling(1.0), np.zeros((4, 500), np.float32)
    drawn = np.stack([sampling.choose(logits, keys, step) for step in range(20)])
    assert len({tuple(row) for row in drawn.T.tolist()}) == 4 and len(set(drawn[:, 0].tolist())) > 15
    np.testing.assert_array_equal(sampling.choose(logits[:2], keys[1:3], 7), drawn[7, 1:3])
    # Rows behind the vocabulary, which differ by mesh, change no draw.
    wider = np.pad(logits, ((0, 0), (0, 12)), constant_values=-np.inf)
    np.testing.assert_array_equal(sampling.choose(wider, keys, 7), drawn[7])


def test_temperature_0_is_the_most_probable_token():
    logits = some_logits()
    np.testing.assert_array_equal(Sampling().choose(logits, prompt_keys(0, [(1,)] * 16), 0), logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.5}, "temperature`=-0.5 is no temperature; use 0 (greedy) or a number above it"),
        ({"temperature": float("nan")}, "temperature`=nan is no temperature"),
        ({"temperature": 1.0, "top_k": -1}, "top_k`=-1 is no number of tokens; use 0 (off)"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p`=0.0 is no share to draw from; use a number above 0, up to 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p`=1.5 is no share"),
        ({"top_k": 5}, "top_k`=5 has no effect with temperature 0 (greedy); leave it at 0, or set a temperature"),
        ({"top_p": 0.9}, "top_p`=0.9 has no effect with temperature 0 (greedy); leave it at 1"),
        ({"batch_size": -1}, "batch_size`=-1 must not be negative"),
    ],
)
def test_contradictions_are_one_line(values, words):
    config = freeze(to_dict(Config()) | {"eval": values})
    with pytest.raises(UserError) as caught:
        resolve(config, {})
    assert f"config: `eval.{words}" in str(caught.value) and "\n" not in str(caught.value)
    if "batch_size" not in values:
        with pytest.raises(UserError, match="^" + words.split("`")[0]):
            Sampling(**values)


@pytest.mark.parity
@pytest.mark.parametrize("setting", SETTINGS)
def test_filters_are_those_of_transformers(setting):
    """The kept sets and the distributions, of its warpers in the order in which it builds them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    temperature, top_k, top_p = setting
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "do_sample": True}
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, scores = transformers.LlamaForCausalLM(config), torch.tensor(some_logits())
    warpers = model._get_logits_processor(transformers.GenerationConfig(**settings), device="cpu")
    names = [type(warper).__name__ for warper in warpers]
    wanted = [("Temperature", temperature != 1), ("TopK", top_k), ("TopP", top_p < 1)]
    assert names == [f"{name}LogitsWarper" for name, on in wanted if on]
    theirs = torch.softmax(warpers(torch.zeros((16, 1), dtype=torch.long), scores), dim=-1).numpy()
    ours = np.asarray(jax.nn.softmax(Sampling(*setting).filtered(some_logits())))
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
