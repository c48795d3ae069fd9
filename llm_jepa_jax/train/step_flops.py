# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a step takes: the matrix products of the very program that is compiled.

XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once, however often it runs, so a model of eight
scanned layers costs there what one of a single layer does. The traced program says how often.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core

from llm_jepa_jax.batch import StepShape
from llm_jepa_jax.parallel.sharding import placed_batch
from llm_jepa_jax.resolve import attention_backend
from llm_jepa_jax.train.state import StateFactory
from llm_jepa_jax.train.step import make_train_step


def traced_step(factory: StateFactory, num_steps: int, kind: StepShape) -> Any:
    """The step of a kind as it goes to the compiler."""
    batch = placed_batch(factory.mesh, kind.rows, kind.row)
    with jax.set_mesh(factory.mesh):
        step: Any = make_train_step(factory, num_steps, kind.row.longest_segment)
        return step.trace(factory.abstract, batch)


def step_flops(factory: StateFactory, num_steps: int, kind: StepShape, traced: Any) -> float:
    """FLOPs of the matrix products of one traced step, over all devices: what is recomputed counts again.

    Attention is counted as its XLA back end does it, whatever kernel runs, and the head at every target slot: so the
    number depends neither on the machine nor on the batch.
    """
    config, platform = factory.config, factory.mesh.devices.flat[0].platform
    if attention_backend(config, platform, kind.row.length) != "xla":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, attention="xla"))
        traced = traced_step(dataclasses.replace(factory, config=config), num_steps, kind)
    return product_flops(traced.jaxpr.jaxpr, kind.row.longest_segment or kind.row.length)


def product_flops(program: core.Jaxpr, reach: int) -> float:
    """FLOPs of all products of a traced program, 2 a multiplication; of branches that exclude each other the most.

    `reach` is how many tokens back attention looks.
    """
    return sum(_equation(equation, reach) for equation in program.eqns)


def _equation(equation: Any, reach: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    if name == "cond":
        return max(product_flops(branch.jaxpr, reach) for branch in params["branches"])
    if name == "while":
        body = params["body_jaxpr"].jaxpr
        return _trips(body, reach) * product_flops(body, reach)
    inner = sum(product_flops(each, reach) for each in core.jaxprs_in_params(params))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":  # shapes inside are one device's
        return params["mesh"].size * inner
    return inner


def _trips(body: core.Jaxpr, reach: int) -> float:
    """How often the body of a loop runs whose end the data decide.

    The head goes over a list in parts until one holds no target: all of them are counted. Attention goes over blocks of
    keys for one block of queries: the mean of those within `reach` is counted, though segments may end it earlier.
    """
    slices = [each for each in body.eqns if each.primitive.name == "dynamic_slice" and each.outvars[0].aval.shape]
    for whole, part in ((each.invars[0].aval.shape, each.outvars[0].aval.shape) for each in slices):
        if part[0] > 1:
            return whole[0] / part[0]
    segments = [each.invars[0].aval.shape for each in slices if each.invars[0].aval.ndim == 3]  # [n, R, B]
    blocks, block = (segments[0][0], segments[0][-1]) if segments else (1, 1)
    seen = (reach - 2) // block + 2 if reach > 1 else 1
    return sum(min(query + 1, seen) for query in range(blocks)) / blocks
