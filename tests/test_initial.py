# SPDX-License-Identifier: Apache-2.0
"""A run that starts from another run's weights."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jepa_jax.checkpoint.initial import initial_parameters, open_initial
from llm_jepa_jax.data import synthetic
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.run_directory import open_run
from llm_jepa_jax.text.tokenizer import train_tokenizer
from tests.conftest import CACHE, REPOSITORY

QUICK = (
    "main", f"--config={REPOSITORY}/configs/tiny.py:smoke", "--config.train.num_steps=2", "--config.log.report=False",
    "--config.log.tensorboard=False", "--config.eval.final_examples=2", f"--config.train.compile_cache={CACHE}",
    "--config.eval.max_new_tokens=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run's directory."""
    workdir = tmp_path_factory.mktemp("first")
    run([*QUICK, f"--workdir={workdir}"])
    return workdir


def changed(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


@pytest.mark.parametrize("new_rows", ["mean", "normal"])
def test_weights_are_the_runs_and_new_rows_their_mean(first, new_rows):
    """Also with another objective, whose linear predictor the run does not have."""
    known = open_run(first)
    old = known.params
    size = known.config.model.vocab_size
    config = changed(
        known.config, model={"vocab_size": size + 8}, init={"checkpoint": str(first), "new_rows": new_rows}
    )
    jepa = dataclasses.replace(config.objective.jepa, linear_predictor=True)
    config = changed(config, objective={"jepa": jepa})
    params = initial_parameters(jax.random.key(0), config, open_initial(config), make_mesh(config.mesh))
    np.testing.assert_array_equal(params["embedding"][:size], old["embedding"])
    jax.tree.map(np.testing.assert_array_equal, params["layers"], old["layers"])
    rows, padding = np.split(np.asarray(params["embedding"][size:]), [8])
    assert rows.shape == (8, old["embedding"].shape[1]) and padding.shape[0] == 120 and not padding.any()
    if new_rows == "mean":
        np.testing.assert_allclose(rows, np.tile(np.asarray(old["embedding"]).mean(0), (8, 1)), atol=1e-6)
    else:
        assert 0.5 < rows.std() / known.config.model.init_std < 2
    assert np.abs(params["predictors"]["jepa"]).max() > 0


def test_a_run_goes_on_from_another_ones_weights(first, tmp_path):
    """With its tokenizer, at a loss below that of random weights; a second start resumes the new run."""
    argv = [*QUICK, f"--config.init.checkpoint={first}", f"--workdir={tmp_path}", "--config.opt.learning_rate=1e-9"]
    result = run(argv)
    assert (tmp_path / "tokenizer.model").read_bytes() == (first / "tokenizer.model").read_bytes()
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
        open_run(tmp_path).params,
        open_run(first).params,
    )
    assert max(jax.tree.leaves(moved)) < 1e-6
    assert run(argv)["ntp_loss"] == pytest.approx(result["ntp_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.init.checkpoint=/nowhere", "`init.checkpoint`=/nowhere has no config.json; name the directory of a"),
        (
            "--config.model.mlp_dim=64",
            r"`model.mlp_dim`=64 is not the 128 of `init.checkpoint`.*; set --config.model.m",
        ),
        ("--config.model.vocab_size=511", "`model.vocab_size`=511 is below the"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(first, tmp_path, flag, message):
    with pytest.raises(UserError, match=message):
        run([*QUICK, f"--config.init.checkpoint={first}", f"--workdir={tmp_path}", flag])


def test_another_tokenizer_must_begin_with_the_runs(first, tmp_path):
    records, _ = synthetic.generate(300, 30)
    train_tokenizer((message.content for record in records for message in record.messages), 500).save(tmp_path)
    flags = [f"--config.init.checkpoint={first}", f"--config.text.tokenizer={tmp_path}/tokenizer.model"]
    with pytest.raises(UserError, match=r"has not the piece .* leave it out to take that run's tokenizer"):
        run([*QUICK, *flags, f"--workdir={tmp_path}/new"])
