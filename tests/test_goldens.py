# SPDX-License-Identifier: Apache-2.0
"""Every run that the published code's losses, gradient norms and gradients were recorded of, on its own inputs."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from llm_jepa_jax.config import Config, DataConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.train.step import gradients
from tests.golden_cases import conversations, cropped, objective, stp_batch, stp_config, two_views, two_views_batch
from tests.test_model import golden_model, llama_params

MATRIX = "linear_predictor_M"


@pytest.fixture(scope="module")
def recorded(shared_dir):
    """Model configuration, parameters, arrays, and numbers."""
    model, params, arrays = golden_model(shared_dir)
    return model, params, dict(arrays), json.loads((shared_dir / "goldens" / "goldens.json").read_text())


@functools.cache
def compiled(config, often=False):
    """(total, gradient, term means) of a batch; without next-token loss at step 0, with it at step 1.

    What runs `often` is worth optimizing, against what the other tests do (conftest.py).
    """

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1} if often else None)
    def run(params, batch, step):
        total, grads, aux, weights = gradients(params, batch, config, step=step)
        return total, grads, {name: aux["sums"][name] / weights[name] for name in weights}

    return run


def case(recorded, group, full_name):
    """Our term's name, objective and batch for a recorded run."""
    _, _, arrays, values = recorded
    expected = values[group][full_name]
    dataset, name = full_name.split("/", 1)
    if run := two_views(name):
        return "jepa", objective(jepa=run.jepa), two_views_batch(arrays, dataset, run, expected)
    rows = len(arrays[f"{dataset}/input_ids"])
    stp = stp_config(name, len(expected.get("draws_start_end_full", range(rows))) // rows)
    return "stp", objective(stp=stp), stp_batch(arrays, dataset, name, stp, expected)


def results(recorded, group, full_name):
    """What ours gives for a recorded run, by the recorded names; and the gradient of the total."""
    model, params, arrays, _ = recorded
    term, terms, batch = case(recorded, group, full_name)
    if getattr(terms, term).linear_predictor:
        params = params | {"predictors": {term: arrays[MATRIX].T}}
    config = Config(model=model, objective=terms, data=DataConfig(rows_per_step=len(batch.tokens)))
    run = compiled(config, often=group == "finetune")
    _, alone, _ = run(params, batch, 0)
    total, grads, means = run(params, batch, 1)
    found = {
        "ntp": means["ntp"], "jepa": means[term], "total": total,
        "grad_norm": optax.global_norm(grads), "grad_norm_jepa_only": optax.global_norm(alone),
        "grad_norm_M": optax.global_norm(grads.get("predictors", {})),
    }  # fmt: skip
    return found, grads


def tolerance(name):
    return 1e-4 if name.startswith("grad") else 1e-5


@pytest.mark.parametrize("group", ["finetune", "stp"])
def test_losses_and_gradient_norms(recorded, group):
    values = recorded[3][group]
    assert len(values) >= 14
    wrong = []
    for full_name, expected in values.items():
        found, _ = results(recorded, group, full_name)
        wanted = expected.keys() & found.keys()
        assert len(wanted) == 5 + full_name.endswith("+lp"), full_name
        wrong += [
            (full_name, name, float(found[name]), expected[name])
            for name in sorted(wanted)
            if not abs(float(found[name]) - expected[name]) <= tolerance(name) * abs(expected[name])
        ]
    assert not wrong


def recorded_gradients(arrays):
    """{run: {parameter: gradient}}"""
    runs = {}
    for key in arrays:
        if key.startswith("grads/"):
            run, parameter = key.removeprefix("grads/").rsplit("/", 1)
            runs.setdefault(run, {})[parameter] = arrays[key]
    return runs


def assert_gradients(found, theirs, model, name):
    """Each parameter's gradient within 1e-4 of its norm, layer by layer."""
    matrix = [value for key, value in theirs.items() if key.endswith("M.weight")]
    expected = llama_params(theirs, model)
    if matrix:
        expected["predictors"] = dict.fromkeys(found["predictors"], matrix[0].T)
    assert jax.tree.structure(found) == jax.tree.structure(expected), name
    for (path, ours), wanted in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        where = f"{name} {jax.tree_util.keystr(path)}"
        ours, wanted = (np.asarray(value, np.float64) for value in (ours, wanted))
        if "layers" in where:
            for layer, (one, other) in enumerate(zip(ours, wanted, strict=True)):
                assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other), f"{where} {layer}"
        else:
            assert np.linalg.norm(ours - wanted) <= 1e-4 * np.linalg.norm(wanted), where


def test_whole_gradients(recorded):
    model, params, arrays, values = recorded
    runs = recorded_gradients(arrays)
    assert {"regular", "stp:random_span"} < runs.keys()
    for run, theirs in runs.items():
        if ":" in run:
            group, name = run.split(":")
            _, found = results(recorded, group, name if "/" in name else f"synth/{name}")
        else:
            _, found = next_token(model, params, arrays, "synth")
        assert_gradients(found, theirs, model, run)


def next_token(model, params, arrays, dataset):
    """Loss and gradient of next-token prediction alone."""
    config = Config(model=model, objective=objective(), data=DataConfig(rows_per_step=8))
    total, grads, _ = compiled(config)(params, cropped(conversations(arrays, dataset)), 1)
    return total, grads


def test_next_token_prediction_alone(recorded):
    model, params, arrays, values = recorded
    assert "synth" in values["regular"]
    for dataset, expected in values["regular"].items():
        total, grads = next_token(model, params, arrays, dataset)
        assert float(total) == pytest.approx(expected["ntp"], rel=1e-5)
        assert float(optax.global_norm(grads)) == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert conversations(arrays, dataset)["target_weight"].sum() == expected["n_label_positions_shifted"]


def test_batches_are_the_recorded_inputs(recorded):
    """Packed tokens and the additive mask, bit for bit."""
    arrays = recorded[2]
    seen = 0
    for key in arrays:
        if not key.endswith(("packed_input_ids", "mask4d_allowed_packbits")):
            continue
        run = key.rsplit("/", 1)[0]
        group = "stp" if "/stp/" in run else "finetune"
        _, _, batch = case(recorded, group, run.replace("/stp/", "/"))
        rows, length = batch.tokens.shape[0], batch.tokens.shape[1] // 3
        segments = batch.segments[:, : 2 * length].reshape(rows, 2, length).swapaxes(0, 1).reshape(-1, length)
        if key.endswith("packed_input_ids"):
            used = segments[rows:] > 0
            theirs = arrays[key][:, :length]
            np.testing.assert_array_equal(batch.tokens[:, length : 2 * length][used], theirs[used], key)
        else:
            whole = arrays[f"{key.split('/')[0]}/input_ids"].shape[1]
            allowed = np.unpackbits(arrays[key])[: 2 * rows * whole**2].reshape(2 * rows, whole, whole)
            same = np.tril((segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0))
            np.testing.assert_array_equal(same, allowed[:, :length, :length], key)
            assert same.sum() == allowed.sum()
        seen += 1
    assert seen >= 20


def test_what_the_reference_cannot_do_is_refused(recorded):
    """Its runs that fail are a contradiction in ours too, apart from the mask modes, which need nothing more here."""
    refused = 0
    for full_name in recorded[3]["errors"]:
        name = full_name.split("/", 1)[1]
        if name.startswith("curvature"):
            config = Config(objective=objective(stp=dataclasses.replace(stp_config(name, 1), layer=-1)))
            with pytest.raises(UserError, match=r"objective\.stp\.(distance|linear_predictor)"):
                resolve(config, {})
            refused += 1
    assert refused >= 2
