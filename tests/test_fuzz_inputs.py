"""A few dozen random inputs of every kind; `python tests/fakes/fuzz_inputs.py` makes thousands."""

import pytest
from fuzz_inputs import KINDS, fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_loads_with_the_right_value_or_is_refused_by_name(kind: str) -> None:
    result = fuzz(kind, 60)
    assert result["faults"] == 0, result["first"]
    assert result["valid"] * 3 >= result["inputs"]
