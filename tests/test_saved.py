"""lab/saved.py against the gzip program, and its bytes against the format's description (RFC 1952)."""

import json
import shutil
import subprocess

import pytest

from lab.saved import read_packed, read_text, save_packed

RECORD = {"solved": [1, 0, 2], "name": "ψ", "none": None}


def test_what_is_packed_is_json_with_no_time_in_it(tmp_path):
    file = tmp_path / "a.json.gz"
    save_packed(RECORD, file, indent=1)
    assert file.read_bytes()[4:8] == bytes(4)  # MTIME: 0 is "no time stamp"
    assert read_text(file) == json.dumps(RECORD, indent=1)
    assert read_packed(file) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.gz"]


@pytest.mark.skipif(shutil.which("gzip") is None, reason="there is no gzip program")
def test_it_is_what_gzip_reads_and_writes(tmp_path):
    packed = tmp_path / "a.json.gz"
    save_packed(RECORD, packed)
    unpacked = subprocess.run(["gzip", "-dc", packed], capture_output=True, check=True).stdout
    assert json.loads(unpacked) == RECORD
    (tmp_path / "b.json").write_bytes(unpacked)
    subprocess.run(["gzip", tmp_path / "b.json"], check=True)
    assert read_packed(tmp_path / "b.json.gz") == RECORD
