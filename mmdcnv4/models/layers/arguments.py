# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments that backbones have in common; each message names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """Raises ValueError in the name of a class: `Arguments('DAT').rate('drop_rate', 2.0)`."""

    owner: str

    def refuse(self, name: str, expected: str, value: Any) -> ValueError:
        """The error itself, to be raised."""
        return ValueError(f'{self.owner}: {name} must be {expected}, got {value!r}')

    def choice(self, name: str, value: Any, choices: Sequence[Any]) -> None:
        """`value` is one of the strings `choices`."""
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(name, f'one of {tuple(choices)}', value)

    def positive(self, name: str, value: Any, kind: type = Real) -> None:
        """`value` is a finite number of that kind above 0."""
        if not (is_number(value, kind) and 0 < value < math.inf):
            raise self.refuse(
                name, f'{"an integer" if kind is Integral else "a number"} > 0', value)

    def flag(self, name: str, value: Any) -> None:
        """`value` is True or False."""
        if not isinstance(value, bool):
            raise self.refuse(name, 'True or False', value)

    def rate(self, name: str, value: Any) -> None:
        """`value` is a probability below 1."""
        if not is_number(value) or not 0 <= value < 1:
            raise self.refuse(name, 'in [0, 1)', value)

    def integers(self, name: str, values: Any) -> tuple[int, ...]:
        """A sequence of integers, as a tuple."""
        if not isinstance(values, (list, tuple, range)) or not all(
                is_number(value, Integral) for value in values):
            raise self.refuse(name, 'a sequence of integers', values)
        return tuple(values)

    def out_indices(self, values: Any, stages: int = 4) -> tuple[int, ...]:
        """An ascending selection of the stages, as a tuple."""
        indices = self.integers('out_indices', values)
        if not indices or list(indices) != sorted(set(indices)) or not (
                set(indices) <= set(range(stages))):
            raise self.refuse('out_indices', 'an ascending selection of '
                              f'{", ".join(map(str, range(stages)))}', indices)
        return indices

    def frozen_stages(self, value: Any, stages: int = 4) -> int:
        """-1 ... `stages`."""
        if not is_number(value, Integral) or value not in range(-1, stages + 1):
            raise self.refuse('frozen_stages', f'-1 ... {stages}', value)
        return value

    def drop_path_rates(self, rate: Any, depths: Sequence[int],
                        kind: str = 'linear') -> list[list[float]]:
        """Drop-path probability of every block, stage by stage.

        Args:
            rate: the largest one.
            depths: blocks per stage.
            kind: 'linear' (from 0 in the first block to `rate` in the last) or 'uniform'.
        """
        self.choice('drop_path_type', kind, ('linear', 'uniform'))
        self.rate('drop_path_rate', rate)
        last = sum(depths) - 1
        rates = [rate * index / max(last, 1) if kind == 'linear' else rate
                 for index in range(last + 1)]
        starts = [sum(depths[:stage]) for stage in range(len(depths))]
        return [rates[start:start + depth] for start, depth in zip(starts, depths)]


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether `value` is a number of that kind; True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)
