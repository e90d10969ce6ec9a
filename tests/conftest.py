"""Fixtures that several files share."""
import gc

import pytest


@pytest.fixture
def quick_collections():
    "Each training collects garbage twice, and going through all that torch and transformers have loaded takes longer than a tiny training."
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def registry_as_it_was():
    "Estimators that a test registers are gone after it."
    from ecom_importance.importance.estimators import ESTIMATORS

    before = dict(ESTIMATORS)
    yield
    ESTIMATORS.clear()
    ESTIMATORS.update(before)
