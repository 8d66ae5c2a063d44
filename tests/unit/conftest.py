from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from ring_model import Model

# how long it takes to draw an example is the load of the machine
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any machine")


@pytest.fixture
def model() -> Iterator[Callable[..., Model]]:
    """Make rings to play with; they are closed at the end."""
    made: list[Model] = []

    def make(**options: int) -> Model:
        made.append(Model(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()
