# SPDX-License-Identifier: Apache-2.0
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.data.views import has_pair
from llm_jepa_jax.models.transformer import forward, head_kernel, init_params
from llm_jepa_jax.objectives import diagnostics
from llm_jepa_jax.objectives.distance import cosine
from llm_jepa_jax.objectives.term import Inputs
from llm_jepa_jax.objectives.total import term_scales, term_weights, total_loss
from llm_jepa_jax.objectives.vicreg import spread_loss
from llm_jepa_jax.train.step import gradients
from tests.conftest import host_batch, small_config, small_data

compiled = jax.jit(gradients, static_argnums=2)


def setting(tmp_path, tokenizer, **sections):
    config = small_config(tmp_path, **sections)
    data = small_data(config, tokenizer)
    params = init_params(jax.random.key(0), config.model, jnp.float32)
    return config, data, host_batch(data), params


def dense_terms(params, config, batch):
    """Both terms from whole logits and plain formulas."""
    hidden = forward(params, config.model, batch.tokens, batch.positions, batch.segments, dtype=jnp.float32)
    logits = hidden @ head_kernel(params, config.model)
    rows = np.arange(len(batch.tokens))[:, None]
    log_shares = jax.nn.log_softmax(logits, axis=-1)[rows, batch.target_index]
    picked = jnp.take_along_axis(log_shares, batch.targets[..., None], axis=-1)[..., 0]
    text, code = hidden[rows, batch.predictor_index], hidden[rows, batch.code_index]
    norms = jnp.linalg.norm(text, axis=-1) * jnp.linalg.norm(code, axis=-1)
    cosines = (text * code).sum(-1) / norms
    ntp = -(picked * batch.target_weight).sum() / batch.target_weight.sum()
    jepa = ((1 - cosines) * batch.pair_weight).sum() / batch.pair_weight.sum()
    return ntp, jepa


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_terms_and_gradients_equal_the_plain_formulas(tmp_path, tokenizer, chunk):
    objective = {"head_chunk": chunk, "ntp": {"weight": 0.7}, "jepa": {"weight": 1.3, "dropout": 0.3}}
    config, _, batch, params = setting(tmp_path, tokenizer, objective=objective)

    def dense(params):
        ntp, jepa = dense_terms(params, config, batch)
        return 0.7 * ntp + 1.3 * jepa

    expected, expected_grads = jax.jit(jax.value_and_grad(dense))(params)
    total, grads, aux, weights = compiled(params, batch, config)
    ntp, jepa = jax.jit(lambda params: dense_terms(params, config, batch))(params)
    np.testing.assert_allclose(aux["sums"]["ntp"] / weights["ntp"], ntp, rtol=1e-5)
    np.testing.assert_allclose(aux["sums"]["jepa"] / weights["jepa"], jepa, rtol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def hidden_gradient(config, batch, params, name):
    """Gradient of one term by the hidden states, [R, L, D]."""
    batch = jax.tree.map(jnp.asarray, batch)
    row = (batch.tokens, batch.positions, batch.segments)
    hidden = jax.jit(lambda params: forward(params, config.model, *row, dtype=jnp.float32))(params)
    head, layers = head_kernel(params, config.model), config.model.num_layers

    def term(hidden):
        weights, scales = term_weights(batch, config.objective), term_scales(config.objective, 0, 1)
        inputs = Inputs({(layers, True): hidden}, head, batch, config.objective, layers)
        return total_loss(inputs, weights, scales)[1][name]

    return np.asarray(jax.jit(jax.grad(term))(hidden))


def test_each_term_touches_its_own_places_only(tmp_path, tokenizer):
    config, _, batch, params = setting(tmp_path, tokenizer)
    rows = np.arange(len(batch.tokens))[:, None]
    for name, indices, weight in (
        ("ntp", [batch.target_index], batch.target_weight),
        ("jepa", [batch.predictor_index, batch.code_index], batch.pair_weight),
    ):
        expected = np.zeros(batch.tokens.shape, bool)
        for index in indices:
            used = weight > 0
            expected[np.broadcast_to(rows, index.shape)[used], index[used]] = True
        gradient = hidden_gradient(config, batch, params, name)
        np.testing.assert_array_equal(np.abs(gradient).sum(-1) > 0, expected, err_msg=name)


def test_stopped_gradient_leaves_the_code_view_still(tmp_path, tokenizer):
    config, _, batch, params = setting(tmp_path, tokenizer, objective={"jepa": {"stop_gradient": True}})
    gradient = np.abs(hidden_gradient(config, batch, params, "jepa")).sum(-1)
    rows, used = np.arange(len(batch.tokens))[:, None], batch.pair_weight > 0
    row = np.broadcast_to(rows, used.shape)[used]
    assert (gradient[row, batch.predictor_index[used]] > 0).all()
    assert not gradient[row, batch.code_index[used]].any()


def test_no_jepa_means_next_token_only(tmp_path, tokenizer):
    """λ = 0 and loss dropout α = 1 both give exactly the next-token loss, its gradient and no views in the rows."""
    only = setting(tmp_path, tokenizer, objective={"jepa": {"weight": 0.0}})
    dropped = setting(tmp_path, tokenizer, objective={"jepa": {"dropout": 1.0}})
    results = []
    for config, _, batch, params in (only, dropped):
        assert batch.segments.max() == batch.num_examples.max()
        total, grads, aux, weights = compiled(params, batch, config)
        np.testing.assert_allclose(total, aux["sums"]["ntp"] / weights["ntp"], rtol=1e-6)
        results.append((batch, total, grads))
    (batch, total, grads), (other_batch, other_total, other_grads) = results
    np.testing.assert_array_equal(batch.tokens, other_batch.tokens)
    np.testing.assert_array_equal(total, other_total)
    chex.assert_trees_all_equal(grads, other_grads)


def test_weights_count_slots_under_padding(tmp_path, tokenizer):
    config, data, batch, _ = setting(tmp_path, tokenizer, objective={"jepa": {"dropout": 0.5}})
    weights = term_weights(batch, config.objective)
    _, plan = data.epochs.step(0)
    assert weights["ntp"] == data.epochs.costs.targets_N[plan.examples].sum()
    assert weights["jepa"] == has_pair(config, 0, plan.examples).sum()
    assert (batch.segments == 0).any() and (batch.target_weight == 0).any()


def test_cosine_of_known_vectors():
    a = jnp.array([[[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]]])
    b = jnp.array([[[0.0, 3.0], [2.0, 2.0], [-1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(cosine(a, b), [[0.0, 1.0, -1.0, 0.0]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda a: cosine(a, b).sum())(a)).all()


def test_spread_loss_sees_collapse_and_ignores_empty_slots():
    spread = jax.random.normal(jax.random.key(0), (4000, 8))
    ones = jnp.ones(4000)
    assert spread_loss(spread, ones, 0.8, 0.04) < 0.01
    collapsed = jnp.ones((4000, 8)) + 0.001 * spread
    assert spread_loss(collapsed, ones, 0.8, 0.04) > 0.7
    padded = jnp.concatenate([spread[:50], jnp.full((10, 8), 7.0)])
    weight = jnp.concatenate([jnp.ones(50), jnp.zeros(10)])
    np.testing.assert_allclose(
        spread_loss(padded, weight, 0.8, 0.04), spread_loss(spread[:50], jnp.ones(50), 0.8, 0.04), rtol=1e-5
    )
    assert spread_loss(spread, jnp.zeros(4000).at[0].set(1), 0.8, 0.04) == 0
    assert np.isfinite(jax.grad(lambda x: spread_loss(x, jnp.ones(4), 0.8, 0.04))(jnp.zeros((4, 8)))).all()


def test_effective_rank_of_known_matrices():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.normal(size=(200, 8)) - 0.0)[0]
    assert diagnostics.effective_rank(orthogonal) == pytest.approx(8, rel=0.02)
    line = np.outer(rng.normal(size=50), rng.normal(size=8)) + 3
    assert diagnostics.effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert diagnostics.effective_rank(np.ones((5, 3))) == 0
    same = diagnostics.collapse_metrics(np.ones((4, 3)), np.ones((4, 3)))
    assert same["cos_shuffled"] == pytest.approx(1) and same["std_text"] == 0
    assert diagnostics.collapse_metrics(np.ones((1, 3)), np.ones((1, 3))) == {}
