# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the traced step: those of the compiled program, however it is cut into loops."""

import dataclasses

import jax
import pytest

from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.plan import hlo
from llm_jepa_jax.plan.work import product_flops
from llm_jepa_jax.train.metrics import Window
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step_flops import step_flops, traced_step
from tests.conftest import small_config, small_data


def traced(cache_dir, tokenizer, devices=1, **sections):
    """The step of a run's only kind: (factory, kind, program)."""
    config = small_config(cache_dir, **sections)
    config = dataclasses.replace(config, mesh=MeshConfig(data=devices))
    with jax.default_device(jax.devices()[0]):
        data = small_data(config, tokenizer)
    factory = state_factory(config, make_mesh(config.mesh, jax.devices()[:devices]), data.num_steps)
    [kind] = data.kinds
    return factory, kind, traced_step(factory, data.num_steps, kind)


def compiled_flops(module, computation, times=1):
    total = 0.0
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            trips = module.trips(instruction)
            if trips is None:  # the head's, of one chunk here; attention's, over one block of keys and then over two
                trips = 1.5 if "attention" in instruction.op_name else 1
            total += compiled_flops(module, module.computations[instruction.called["body"]], times * trips)
        elif instruction.opcode in ("call", "conditional"):
            total += sum(
                compiled_flops(module, module.computations[name], times) for name in instruction.called.values()
            )
        else:
            total += times * product_flops(module, computation, instruction)
    return total


def test_the_traced_step_has_the_products_of_the_compiled_one(cache_dir, tokenizer):
    """With rows of two attention blocks and one chunk of the head."""
    sections = {"data": {"row_length": 128, "rows_per_step": 4, "max_dropped_share": 0.9}, "train": {"remat": "full"}}
    factory, kind, program = traced(cache_dir, tokenizer, **sections)
    with jax.set_mesh(factory.mesh):
        compiled = program.lower().compile()
    module = hlo.parse(compiled.as_text())
    expected = compiled_flops(module, module.computations[module.entry])
    assert step_flops(factory, 4, kind, program) == pytest.approx(expected, rel=0.01)
    assert compiled.cost_analysis()["flops"] < 0.8 * expected  # why it is not asked: it takes loop bodies once


def test_neither_chunks_nor_devices_change_it(cache_dir, tokenizer):
    """But for what fills up a device's last chunk."""
    one, kind, program = traced(cache_dir, tokenizer)
    whole = step_flops(one, 4, kind, program)
    four, kind, program = traced(cache_dir, tokenizer, devices=4)
    assert step_flops(four, 4, kind, program) == pytest.approx(whole, rel=0.03)
    chunks, kind, program = traced(cache_dir, tokenizer, objective={"head_chunk": 64})
    assert step_flops(chunks, 4, kind, program) == pytest.approx(whole, rel=0.03)


def test_a_window_says_the_mean_of_its_steps():
    window = Window()
    for flops in (2e9, 4e9):
        window.add({"pairs": 0, "target_tokens": 1, "examples": 1, "tokens": 1, "slots": 2, "flops": flops, "steps": 1})
    assert window.means()["step_flops"] == 3e9
