"""All combinations of choices for a test; most of them only in `make slow`."""

import itertools

import pytest


def combinations(*choices, every=2):
    """Parameters for all combinations; those whose indices add up to a multiple of `every` are not slow.

    As long as `every` is at most the number of choices of some slot outside a pair, each pair of choices is among them.
    """
    params = []
    for parts in itertools.product(*map(tuple, choices)):
        total = sum(tuple(slot).index(part) for slot, part in zip(choices, parts, strict=True))
        marks = pytest.mark.slow if total % every else ()
        params.append(pytest.param(parts, marks=marks, id="-".join(parts)))
    return params
