"""JSON that says one thing: what Python's own reader lets pass and this one refuses."""

import json

import pytest

from kcrprune.containers.strict_json import LARGEST, parse_object, read_object
from kcrprune.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "a name appears twice"),
        ('{"outer": {"a": 1, "a": 1}}', "a name appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        ("[1]", "is not a JSON object"),
        ("7", "is not a JSON object"),
    ],
)
def test_what_json_itself_reads_is_refused_with_the_reason(text, reason):
    json.loads(text)
    with pytest.raises(CheckpointError, match=f"^the header .*{reason}"):
        parse_object(text.encode(), "the header")


@pytest.mark.parametrize(("data", "reason"), [(b'{"a": ', "not valid"), (b'{"\xff": 1}', "not valid"),
                                             (b'{"a":' + b"[" * 100_000, "nests too deeply")])  # fmt: skip
def test_what_is_no_json_is_refused_as_well(data, reason):
    with pytest.raises(CheckpointError, match=reason):
        parse_object(data, "the header")


def test_a_file_is_read_up_to_the_largest_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": {"b": [1, null]}}'.ljust(LARGEST))
    assert read_object(path) == {"a": {"b": [1, None]}}
    path.write_bytes(b"{}".ljust(LARGEST + 1))
    with pytest.raises(CheckpointError, match=rf"config\.json is {LARGEST + 1} bytes long"):
        read_object(path)
