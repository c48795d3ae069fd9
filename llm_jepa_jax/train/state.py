# SPDX-License-Identifier: Apache-2.0
"""The train state, its shardings, and its creation, all derived from one abstract init."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.checkpoint.frozen import frozen_parameters
from llm_jepa_jax.checkpoint.initial import initial_parameters, open_initial
from llm_jepa_jax.config import Config
from llm_jepa_jax.models.lora import abstract_frozen, joined
from llm_jepa_jax.objectives.parameters import abstract_parameters, init_parameters
from llm_jepa_jax.parallel.sharding import parameter_shardings, placed, replicated
from llm_jepa_jax.train.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """Everything that one step turns into the next. Scalars are int32."""

    step: jax.Array
    """Steps taken, skipped ones included: the place in the data."""
    params: Any
    """What is trained."""
    opt_state: Any
    skipped: jax.Array
    """Updates skipped for a non-finite loss or gradient."""
    skipped_in_row: jax.Array
    """How many of the last updates in a row were skipped."""
    frozen: Any = None
    """The parameters that adapters lie beside: handed on as they are, and not saved. None where all are trained."""

    @property
    def whole(self) -> Any:
        """All parameters, which is what evaluation takes."""
        return joined(self.params, self.frozen)


def saved_part(state: TrainState) -> dict[str, Any]:
    """What checkpoints hold of a state, by its fields."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "frozen"}


@dataclasses.dataclass(frozen=True)
class StateFactory:
    """Makes the state of one configuration on one mesh."""

    config: Config
    mesh: Mesh
    optimizer: optax.GradientTransformation
    abstract: TrainState
    """`jax.ShapeDtypeStruct`s with their shardings."""

    @property
    def origin(self) -> str:
        """Where a new state's weights come from, in words."""
        return self.config.init.checkpoint or f"random weights (seed {self.config.seed})"

    def create(self) -> TrainState:
        """The initial state, each device making its own shards.

        Raises:
            UserError: the weights of `init.checkpoint` cannot be read.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.replace(frozen=None))
        key, saved = jax.random.key(self.config.seed), open_initial(self.config)
        if saved or self.config.lora.adapter:
            start, make, donated = initial_parameters(key, self.config, saved, self.mesh), lambda params: params, 0
        else:
            start, make, donated = key, lambda key: init_parameters(key, self.config), ()
        with jax.set_mesh(self.mesh):
            make_state = jax.jit(
                lambda start: _initial(make(start), self.optimizer), out_shardings=shardings, donate_argnums=donated
            )
            return self._with_frozen(make_state(start))

    def completed(self, saved: dict[str, Any]) -> TrainState:
        """The state of a checkpoint; what is frozen comes from where it came from at first.

        Raises:
            UserError: the weights of `init.checkpoint` cannot be read.
        """
        return self._with_frozen(TrainState(**saved))

    def _with_frozen(self, state: TrainState) -> TrainState:
        return state.replace(frozen=frozen_parameters(self.config, self.mesh) if self.config.lora.rank else None)


def _initial(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # Three arrays, not one three times: a buffer can be donated only once.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zeros[0], params, optimizer.init(params), zeros[1], zeros[2])


def state_factory(config: Config, mesh: Mesh, num_steps: int) -> StateFactory:
    """Shapes and shardings of the state; nothing is allocated.

    The optimizer's moments take the sharding of their parameter, its scalars are replicated.
    """
    _, axes = abstract_parameters(config)
    model = config.model
    optimizer = make_optimizer(config.opt, num_steps, axes, model.vocab_size / model.padded_vocab_size)
    shapes = jax.eval_shape(lambda: _initial(init_parameters(jax.random.key(0), config), optimizer))
    frozen, frozen_axes = abstract_frozen(config)
    shapes = shapes.replace(frozen=frozen)
    everywhere = replicated(mesh)
    params = parameter_shardings(mesh, axes)
    opt_state = _like_parameters(shapes.opt_state, shapes.params, params, everywhere)
    frozen_shardings = parameter_shardings(mesh, frozen_axes)
    shardings = TrainState(everywhere, params, opt_state, everywhere, everywhere, frozen_shardings)
    return StateFactory(config, mesh, optimizer, placed(shapes, shardings))


def _like_parameters(state: Any, params: Any, shardings: Any, everywhere: NamedSharding) -> Any:
    """Shardings of an optimizer's state: a leaf whose path ends like a parameter's lies as that parameter does."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    of = {
        path: (leaf.shape, sharding) for (path, leaf), sharding in zip(paths, jax.tree.leaves(shardings), strict=True)
    }

    def lies(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        found = next((of[path[start:]] for start in range(len(path)) if path[start:] in of), None)
        return _reduced(leaf.shape, *found) if found else everywhere

    return jax.tree_util.tree_map_with_path(lies, state)


def _reduced(shape: tuple[int, ...], full: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """The sharding of a parameter, without the axis that a factored moment has summed away."""
    spec = (*sharding.spec, *(None,) * (len(full) - len(sharding.spec)))
    kept = [spec] + [spec[:axis] + spec[axis + 1 :] for axis in range(len(full))]
    sizes = [full] + [full[:axis] + full[axis + 1 :] for axis in range(len(full))]
    axes = next((k for k, size in zip(kept, sizes, strict=True) if size == shape), ())
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
