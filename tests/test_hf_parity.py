# SPDX-License-Identifier: Apache-2.0
"""Every published family against `transformers`: in, through a training step, and out again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.batch import FIELDS, Batch, RowShape, abstract_batch
from llm_jepa_jax.eval.encode import hidden_states, pad_right
from llm_jepa_jax.eval.generate import SHARED_PAYS
from llm_jepa_jax.models.transformer import forward_states
from llm_jepa_jax.parallel.sharding import num_row_shards, rows_sharding
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.hf_models import CASES, make_model, reference

pytestmark = pytest.mark.parity
LENGTHS = (200, 31, 90)
LIKE_ANOTHER = (
    "llama2", "llama-linear-biased", "mistral-no-window", "qwen2", "qwen2-yarn", "qwen3-yarn", "qwen3-windows-biased",
    "phi-grouped-tied", "gemma3-untied",
)  # fmt: skip
"""Of a family that another case trains too; training them is slow."""
SHARING = ("llama3", "mistral", "qwen2-windows", "gemma2", "gemma3", "phi")
"""Of each kind of attention and of block: those asked behind a shared prefix too, which is then encoded once."""


def error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 96, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """The name, the model, its directory in several files, and ours."""
    pytest.importorskip("torch")  # here, not above: seconds, which every process that collects tests would spend
    pytest.importorskip("transformers")
    model = make_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size="60KB")
    return request.param, model, directory, lj.load(directory)


def test_logits_and_hidden_states(case):
    """Every layer's, of sequences longer than windows and scaling thresholds."""
    _, model, _, lm = case
    run, layers = lm.run, lm.run.config.model.num_layers
    states = tuple((layer, layer == layers) for layer in range(layers + 1))
    tokens, lengths = pad_right(sequences(), 8)
    ours = hidden_states(run.params, tokens, lengths, config=run.config.model, dtype=jnp.float32, states=states)
    for row, (ids, logits) in enumerate(zip(sequences(), lm.logits(sequences()), strict=True)):
        expected_states, expected = reference(model, ids)
        assert error(logits, expected) < 1e-4
        for state, theirs in zip(ours, expected_states, strict=True):
            assert error(state[row, : len(ids)], theirs) < 1e-5


def test_packed_segments_equal_sequences_alone(case):
    _, model, _, lm = case
    packed = np.concatenate(sequences())[None]
    positions = np.concatenate([np.arange(length) for length in LENGTHS])[None]
    segments = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)[None]
    config = lm.run.config.model
    (hidden,) = forward_states(lm.run.params, config, packed, positions, segments, dtype=jnp.float32)
    start = 0
    for tokens in sequences():
        expected = reference(model, tokens)[0][-1]
        assert error(hidden[0, start : start + len(tokens)], expected) < 1e-5
        start += len(tokens)


@pytest.mark.parametrize(("case", "shared"), [(c, 0) for c in CASES] + [(c, 64) for c in SHARING], indirect=["case"])
def test_greedy_answers_are_token_for_token_the_same(case, shared):
    """20 prompts of many lengths in one batch, of those whose every choice leads by more than 1e-3; also behind tokens
    that they share."""
    import torch

    _, model, _, lm = case
    rng, new, width = np.random.default_rng(2), 16, 84 + shared
    prefix = rng.integers(20, 96, shared).tolist()
    prompts = [prefix + rng.integers(20, 96, 3 * length).tolist() for length in range(1, 29)]
    assert not shared or (len(prompts) - num_row_shards(lm.run.mesh)) * shared >= SHARED_PAYS
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = model.generate(
        padded, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=2,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens_BxT = theirs.sequences[:, width:].numpy()
    best_TxBx2 = np.stack([torch.topk(scores, 2).values.numpy() for scores in theirs.scores])
    expected, leads = [], []
    for row, tokens in enumerate(tokens_BxT):
        ends = np.flatnonzero(tokens == 2)
        taken = ends[0] + 1 if len(ends) else len(tokens)
        expected.append((tokens[: ends[0]] if len(ends) else tokens).tolist())
        leads.append((best_TxBx2[:taken, row, 0] - best_TxBx2[:taken, row, 1]).min())
    clear = [row for row, lead in enumerate(leads) if lead > 1e-3][:20]
    assert len(clear) == 20
    ours = lm.generate(prompts, new)
    assert [ours[row] for row in clear] == [expected[row] for row in clear]
    assert len({tuple(expected[row]) for row in clear}) > 15


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in LIKE_ANOTHER else ()) for c in CASES], indirect=True
)
def test_a_trained_model_comes_back(case, tmp_path):
    """One training step, then export in several files, then `transformers`: equal logits, in both directions."""
    import transformers

    _, _, directory, lm = case
    config, mesh = lm.run.config, lm.run.mesh
    config = dataclasses.replace(config, opt=dataclasses.replace(config.opt, learning_rate=1e-3))
    factory = state_factory(config, mesh, 1)
    state = factory.create()
    before = np.asarray(state.params["embedding"])
    state, metrics = make_train_step(factory, 1)(state, one_batch(mesh.size, mesh))
    assert np.isfinite(float(metrics["last"]["total_loss"]))
    assert np.abs(np.asarray(state.params["embedding"]) - before).max() > 1e-5
    trained = dataclasses.replace(lm, run=dataclasses.replace(lm.run, params=state.params))
    trained.save_hf(tmp_path / "out", shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert again.config.model_type == json.loads((directory / "config.json").read_text())["model_type"]
    for tokens, logits in zip(sequences(), trained.logits(sequences()), strict=True):
        assert error(logits, reference(again.eval(), tokens)[1]) < 1e-4
    ours = lj.load(tmp_path / "out").run
    jax.tree.map(np.testing.assert_array_equal, ours.params, state.params)
    assert ours.config.model == config.model


def one_batch(rows, mesh):
    """Rows of one segment of random tokens, all of them targets, with a pair each."""
    rng, length = np.random.default_rng(1), 64
    shapes = abstract_batch(rows, RowShape(length, 32, 1, length))
    values = {name: np.zeros(getattr(shapes, name).shape, getattr(shapes, name).dtype) for name in FIELDS}
    values["tokens"] = rng.integers(3, 96, (rows, length)).astype(np.int32)
    values["targets"] = values["tokens"][:, 1:33]
    values["segments"][:] = values["target_weight"][:] = values["pair_weight"][:] = 1
    values["positions"][:], values["target_index"][:] = np.arange(length), np.arange(32)
    values["predictor_index"][:], values["code_index"][:] = 20, 50
    return jax.device_put(Batch(**values), rows_sharding(mesh))
