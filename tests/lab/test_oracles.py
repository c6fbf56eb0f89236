"""Each mixer against somebody else's implementation of it, with the same weights."""

import os

import pytest

from everlong import mixers
from everlong.lab.bench import comparison

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and its fallbacks


@pytest.mark.parametrize("name", mixers.names())
def test_a_mixer_is_what_others_make_of_it(name):
    assert name in comparison.names(), f"what is {name} compared with? Write everlong/lab/bench/oracles/{name}.py"
    assert comparison.oracle(name)
    cases = []
    try:
        for case, errors in comparison.compare(name):
            cases.append(case.case)
            assert case.bound <= 1e-4
            for what, error in errors.items():
                assert error < case.bound, f"{case.case}: {what} is {error:.2g} off"
    except ValueError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert len(cases) == len(set(cases))
    assert len(cases) >= 2
