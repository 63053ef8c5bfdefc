"""The two tiers of the tests."""

import pytest


def in_full(values):
    """`values` for `parametrize`, in the full tier."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def mostly_in_full(values, *fast):
    """`values` for `parametrize`; all but those of `fast`, in the full tier."""
    assert set(fast) <= set(values)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.full) for value in values]
