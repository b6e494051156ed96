"""Metadata of encoder files."""

import pytest

from mixmae.convert import EncoderMetadata
from mixmae.encoders.build import config_to_json
from tests.factories import tiny_swin


def test_metadata_of_another_version_is_refused():
    content = {"encoder": config_to_json(tiny_swin().config)}
    with pytest.raises(ValueError, match="written by another version of mixmae"):
        EncoderMetadata.from_json(content)
