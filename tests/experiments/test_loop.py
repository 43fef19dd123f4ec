"""The training loop's own parts; the programs around it are in test_programs.py."""

import dataclasses
import gc

import pytest

from experiments.loop import _collector_at_rest
from experiments.setup import start
from purelm.data import open_tokens
from tests.experiments.small import small, token_file


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_objects_of_before_are_out_of_collections_until_the_loop_ends(ends):
    """Oracle: gc.get_freeze_count."""
    assert gc.get_freeze_count() == 0
    try:
        with _collector_at_rest() as rest:
            assert gc.get_freeze_count() == 0
            rest()
            assert gc.get_freeze_count() > 10_000
            if ends == "badly":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert gc.get_freeze_count() == 0


def test_verify_reads_all_of_the_token_files(tmp_path):
    """Oracle: one byte changed where the sampled blocks of opening do not look."""
    path = token_file(tmp_path / "train.bin", n=200_000)
    whole = path.read_bytes()
    for at in range(0, len(whole), 10_000):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            open_tokens(path)
            break
        except ValueError:
            continue
    cfg = small(tmp_path)
    assert start(cfg).done == 0
    with pytest.raises(ValueError, match=r"train\.bin"):
        start(dataclasses.replace(cfg, verify=True))
    path.write_bytes(whole)
    assert start(dataclasses.replace(cfg, verify=True)).done == 0
