# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's `config.json`, read field by field, so that what nothing has read can be refused by name."""

from collections.abc import Iterable
from typing import Any

from llm_jepa_jax.errors import UserError

WITHOUT_EFFECT = frozenset(
    (
        "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
        "cache_implementation", "dtype", "eos_token_id", "model_type", "output_attentions", "output_hidden_states",
        "pad_token_id", "pretraining_tp", "return_dict", "torch_dtype", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_cache",
    )
)  # fmt: skip
"""Fields of every family that do not change hidden states or logits."""


class Fields:
    """The fields of one JSON object in a file; each is to be taken once."""

    def __init__(self, place: str, values: dict[str, Any], section: str = ""):
        self.place, self._values, self._section = place, dict(values), section

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def path(self, name: str) -> str:
        """The field's name from the top of the file."""
        return self._section + name

    def take(self, name: str, kind: type, default: Any = ..., null: Any = ...) -> Any:
        """The field's value as `kind`; where it is absent, `default`, and where it is null, `null` or else `default`.

        Raises:
            UserError: it is missing, or of another type.
        """
        if name in self._values and self._values[name] is None and null is not ...:
            default = null
        value = self._values.pop(name, None)
        if value is None:
            if default is ...:
                raise UserError(f"{self.place}: has no `{self.path(name)}`; add it as the model was trained")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{self.place}: `{self.path(name)}` is {value!r}; it must be {kind.__name__}")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of numbers; a number alone is a list of one.

        Raises:
            UserError: it is missing, or holds something else.
        """
        if not isinstance(self._values.get(name), list):
            return [self.take(name, float)]
        values = self.take(name, list)
        if not values or any(type(value) not in (int, float) for value in values):
            raise UserError(f"{self.place}: `{self.path(name)}` is {values!r}; it must be numbers")
        return [float(value) for value in values]

    def below(self, name: str) -> "Fields":
        """The section of that name; empty where it is absent or null."""
        return Fields(self.place, self.take(name, dict, {}), f"{self.path(name)}.")

    def rest(self) -> dict[str, Any]:
        """What is left, which is taken with this."""
        values, self._values = self._values, {}
        return values

    def refuse(self, name: str, value: Any, right: str) -> UserError:
        """The error that says a field's value is not supported."""
        return UserError(f"{self.place}: `{self.path(name)}` is {value!r}, which is not supported; {right}")

    def finish(self, without_effect: Iterable[str] = ()) -> None:
        """Checks that everything has been taken, but for fields known to have no effect.

        Raises:
            UserError: something else is left.
        """
        left = sorted(set(self._values) - set(without_effect))
        if left:
            said = ", ".join(f"`{self.path(name)}`={self._values[name]!r}" for name in left[:8])
            raise UserError(
                f"{self.place}: {said} {'is' if len(left) == 1 else 'are'} not known to this family; "
                "remove what does not change the model's output"
            )
