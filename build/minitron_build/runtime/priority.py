"""Which of the waiting requests runs first: the parameter `priority_level` of a request.

Triton keeps its own `priority` to itself and orders only what waits in its own queue, which is always empty
here: requests wait in the engine. Level 1 is the first; equal levels run in order of arrival.
"""

from __future__ import annotations

import json

from .parameters import ParameterError, Parameters
from .status import invalid

NAME = "priority_level"


class PriorityLevels:
    """What a model accepts.

    Args:
        parameters: a model's parameters `priority_levels` and `default_priority_level`.

    Raises:
        ParameterError: one of them is missing or wrong.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._levels = parameters.number("priority_levels")
        self._default = parameters.number("default_priority_level")
        if not 1 <= self._default <= self._levels:
            raise ParameterError(
                f"default_priority_level of model {parameters.model_name} is {self._default}; "
                f"expected 1 to priority_levels, which is {self._levels}"
            )

    def read(self, request_parameters: str) -> int:
        """The level of one request.

        Args:
            request_parameters: all parameters of the request, as the JSON object that Triton gives.

        Raises:
            StatusError: INVALID_ARGUMENT, not one of the model's levels.
        """
        if NAME not in request_parameters:
            return self._default
        asked = json.loads(request_parameters).get(NAME, self._default)
        level = int(asked) if str(asked).isdecimal() else 0
        if not 1 <= level <= self._levels:
            raise invalid(f"{NAME} is {asked!r}; this model has levels 1 (first) to {self._levels}")
        return level
