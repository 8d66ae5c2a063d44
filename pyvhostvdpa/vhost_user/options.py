# SPDX-License-Identifier: MIT
"""How a device is served, and whom its events are reported to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

EventCallback = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of an event and its fields."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How a device is served.

    ``max_memory`` is how many bytes a front-end may share, None for no limit; ``features`` masks what is offered;
    ``indirect`` offers indirect descriptors though the device is then not switched in place; ``control`` takes the
    device's control queue also for a guest with one queue pair; ``has_config`` is whether the front-end has a
    configuration space of its own. One without asks for the device's, and hands a control queue over if it is offered
    one: it is offered none, and nothing that takes one.
    """

    max_memory: int | None = None
    features: int = ~0
    indirect: bool = False
    control: bool = False
    has_config: bool = True
