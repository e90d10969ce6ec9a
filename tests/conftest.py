"""Fixtures that several files share."""
import gc

import pytest


@pytest.fixture
def quick_collections():
    "Each training collects garbage twice, and going through all that torch and transformers have loaded takes longer than a tiny training."
    gc.freeze()
    yield
    gc.unfreeze()
