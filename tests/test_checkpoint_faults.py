"""Checkpoints where something goes wrong beside them: disks, kills, readers, odd values. Oracle: what was saved before.

Of one process, and of two where purelm.dist.checkpoint has code of its own.
"""

import errno
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

from purelm import checkpoint
from purelm.checkpoint import folder as one_process
from purelm.checkpoint import shards
from purelm.dist import checkpoint as dist_checkpoint


def save(root, step, value, kind="one", **options):
    """Of one process, or in the format of many (a world of one writes it, too)."""
    trees = {"params": {"w": torch.full((4, 3), float(value))}, "opt_state": [torch.tensor(value)]}
    if kind == "many":
        return dist_checkpoint.save(root, step, trees, like=trees, **options)
    return checkpoint.save(root, step, trees, **options)


def value_of(root, step=None):
    trees, _ = checkpoint.load(root, step)
    (count,) = trees["opt_state"]
    assert (trees["params"]["w"] == count).all()
    return int(count)


KINDS = pytest.mark.parametrize("kind", ["one", "many"])


@KINDS
def test_meta_of_any_keys_comes_back_as_json_has_it(tmp_path, kind):
    """Sorted as numbers, 2 comes before 10, and as texts after it."""
    save(tmp_path, 1, 5, kind, meta={"loss": {i: 1.0 / i for i in range(1, 12)}, "pair": (1, 2)})
    _, meta = checkpoint.load(tmp_path)
    assert meta == {"loss": {str(i): 1.0 / i for i in range(1, 12)}, "pair": [1, 2], "step": 1}


@KINDS
@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ({"x": {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}}, r"two leaves of x have the path 'a\.b'"),
        ({"x/y": {"a": torch.ones(2)}}, "'x/y' cannot name a tree"),
        ({"": {"a": torch.ones(2)}}, "'' cannot name a tree"),
    ],
)
def test_names_that_would_collide_are_refused(tmp_path, trees, message, kind):
    with pytest.raises(ValueError, match=message):
        if kind == "one":
            checkpoint.save(tmp_path, 1, trees)
        else:
            dist_checkpoint.save(tmp_path, 1, trees, like=trees)
    assert not list(tmp_path.iterdir())


@KINDS
def test_a_negative_step_and_a_dtype_without_a_name_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        save(tmp_path, -1, 1, kind)
    odd = {"t": {"x": torch.ones(2, dtype=torch.complex128)}}
    if kind == "many":
        with pytest.raises(ValueError, match=r"save: t\.x is torch\.complex128, which cannot be stored"):
            dist_checkpoint.save(tmp_path, 1, odd, like=odd)
    assert not list(tmp_path.iterdir())


def test_views_that_torch_negates_or_conjugates_late_are_stored_by_value(tmp_path):
    z = torch.complex(torch.randn(4), torch.randn(4))
    checkpoint.save(tmp_path, 1, {"t": {"conj": z.conj(), "neg": z.conj().imag}})
    found = checkpoint.load(tmp_path)[0]["t"]
    assert torch.equal(found["conj"], z.conj().resolve_conj()) and torch.equal(found["neg"], -z.imag)
    many = {"t": {"neg": z.conj().imag}}
    dist_checkpoint.save(tmp_path, 2, many, like=many)
    assert torch.equal(checkpoint.load(tmp_path)[0]["t"]["neg"], -z.imag)


@KINDS
def test_a_full_disk_says_where_and_leaves_what_was_there(tmp_path, monkeypatch, kind):
    save(tmp_path, 1, 1, kind)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_library(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if kind == "one":
        monkeypatch.setattr(one_process, "save_file", full_in_library)
    else:
        monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match=r"\.tmp-step-00000002-.*\.safetensors") as error:
        save(tmp_path, 2, 2, kind)
    assert "No space left on device" in str(error.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and value_of(tmp_path) == 1


@KINDS
@pytest.mark.parametrize("at", ["keep_last", "replaced"])
def test_what_a_kill_left_of_an_old_checkpoint_goes_with_the_next_save(tmp_path, monkeypatch, kind, at):
    save(tmp_path, 1, 1, kind)

    class Killed(BaseException):
        pass

    real = shutil.rmtree

    def kill(path, **options):
        if os.path.exists(path) and "step-00000001" in str(path):  # the old one, not this save's folder
            raise Killed
        real(path, **options)

    monkeypatch.setattr(one_process.shutil, "rmtree", kill)
    with pytest.raises(Killed):
        save(tmp_path, *((2, 2) if at == "keep_last" else (1, 2)), kind, keep_last=1)
    monkeypatch.undo()
    newest = 2 if at == "keep_last" else 1
    assert checkpoint.steps(tmp_path) == [newest] and value_of(tmp_path) == 2
    save(tmp_path, 3, 3, kind, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{newest}", "step-00000003"]


@KINDS
def test_a_save_killed_before_it_clears_what_it_replaced(tmp_path, monkeypatch, kind):
    save(tmp_path, 1, 1, kind)

    class Killed(BaseException):
        pass

    real = one_process._remove

    def kill(folder):
        if folder.exists():
            raise Killed
        real(folder)

    monkeypatch.setattr(one_process, "_remove", kill)
    with pytest.raises(Killed):
        save(tmp_path, 1, 2, kind)
    monkeypatch.undo()
    assert (tmp_path / "step-00000001.replaced").is_dir() and value_of(tmp_path, 1) == 2
    save(tmp_path, 2, 3, kind, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    with pytest.raises(ValueError, match="no checkpoint of step 1"):
        checkpoint.load(tmp_path, 1)


@KINDS
@pytest.mark.parametrize("read", ["one", "many"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_taken(tmp_path, monkeypatch, kind, read):
    """Files are checked, and opened again to be read: those of another save by then."""
    save(tmp_path, 1, 1, kind)
    real, checked = one_process.check_file, []
    n_files = len(list((tmp_path / "step-00000001").glob("*.safetensors")))

    def check(path, entry):
        real(path, entry)
        checked.append(path)
        if len(checked) == n_files:
            save(tmp_path, 1, 2, kind)

    monkeypatch.setattr(one_process, "check_file", check)
    like = {"params": {"w": torch.empty(4, 3)}, "opt_state": [torch.tensor(0)]}
    with pytest.raises(ValueError, match="step-00000001: was replaced while it was read: load it again"):
        checkpoint.load(tmp_path) if read == "one" else dist_checkpoint.load(tmp_path, like)
    monkeypatch.undo()
    assert value_of(tmp_path) == 2
