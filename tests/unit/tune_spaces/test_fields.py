"""Fields of a config, set by their dotted names."""

from __future__ import annotations

import pytest

from pipelines.recipes import PRETRAIN_RECIPES
from tune_spaces.fields import set_fields


def test_fields_that_are_allowed_only_together_are_set_together():
    base = PRETRAIN_RECIPES["demo"]()
    with pytest.raises(ValueError, match=r"method.fill cannot be 'learnable': .*set unmixing='none'"):
        set_fields(base, {"method.fill": "learnable"})
    method = set_fields(base, {"method.fill": "learnable", "method.unmixing": "none"}).method
    assert (method.fill, method.unmixing) == ("learnable", "none")
    with pytest.raises(ValueError, match=r"A batch of 32 images cannot be mixed 3 at a time"):
        set_fields(base, {"method.num_images": 3})
    assert set_fields(base, {"method.num_images": 3, "loop.batch_size": 18}).loop.batch_size == 18
