"""Checkpoints: whole, whatever happens while they are written."""

import contextlib
import os
import resource
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kept_states import (
    IDENTITY,
    RECORD,
    assert_same,
    names,
    on,
    opened,
    small,
    state,
    template,
)

from experiments.checkpoint import KEPT, CheckpointError, Checkpoints
from experiments.fingerprint import fingerprint
from experiments.mesh import make_mesh


@pytest.fixture
def copy(tmp_path):
    """A folder with two checkpoints."""
    folder = tmp_path / "copy"
    with opened(folder) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(step), RECORD)
    return folder


MESHES = {"one": (1, 1), "data": (8, 1), "both": (8, 2), "model": (4, 4)}


@pytest.mark.parametrize("there", ["one", "both"])
@pytest.mark.parametrize("here", MESHES)
def test_a_state_comes_back_on_any_mesh(tmp_path, there, here):
    expected = on(make_mesh(*MESHES[there]), state(3))
    asked = template(on(make_mesh(*MESHES[here]), state(0)))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(7, expected, RECORD)
        found = checkpoints.restore(asked)
    assert found is not None
    assert (found.step, found.record) == (7, RECORD)
    assert_same(found.state, expected)
    places = [leaf.sharding for leaf in jax.tree.leaves(found.state)]
    assert places == [leaf.sharding for leaf in jax.tree.leaves(asked)]


def test_an_empty_folder_has_nothing_to_go_on_from(tmp_path):
    with opened(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.restore(template(state())) is None
        assert checkpoints.latest() is None


@pytest.mark.parametrize("shape", [(1, 1), (8, 2)])
def test_donated_buffers_do_not_reach_what_is_saved(tmp_path, shape):
    spoil = jax.jit(lambda x: jax.tree.map(lambda y: -y, x), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        for step in range(1, 6):
            tree = {
                "sharded": jnp.full((512, 1024), step, jnp.int32),
                "copied": jnp.full((1024,), step, jnp.float32),
            }
            tree = on(make_mesh(*shape), tree)
            asked = template(tree)
            checkpoints.save(step, tree, None)
            for _ in range(3):
                tree = spoil(tree)
            jax.block_until_ready(tree)
            found = checkpoints.restore(asked)
            assert found is not None
            assert found.step == step
            for leaf in found.state.values():
                assert (np.asarray(leaf) == step).all()


def test_what_a_training_appends_to_its_record_does_not_reach_what_is_saved(tmp_path):
    with opened(tmp_path) as checkpoints:
        for step in range(1, 6):
            record = {"history": [[epoch, 0.5] for epoch in range(step)]}
            checkpoints.save(step, small(), record)
            record["history"].append("later")
            record["history"][0][1] = "changed"
            found = checkpoints.restore(template(small()))
            assert found is not None
            assert found.step == step
            assert found.record["history"] == [[epoch, 0.5] for epoch in range(step)]


def test_two_checkpoints_are_kept_and_one_is_complete_at_every_moment(tmp_path):
    seen, over = [], threading.Event()

    def watch():
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError):
                complete = [int(n) for n in os.listdir(tmp_path) if n.isdecimal()]
                seen.append(max(complete, default=0))

    with opened(tmp_path) as checkpoints:
        watcher = threading.Thread(target=watch)
        watcher.start()
        for step in range(1, 9):
            checkpoints.save(step, {"x": jnp.full((300, 300), step)}, None)
        checkpoints.wait()
        over.set()
        watcher.join()
        assert checkpoints.latest() == 8
    assert names(tmp_path) == ["7", "8"]
    assert KEPT == 2
    assert seen == sorted(seen)  # never an older one, never none after the first
    assert seen[-1] == 8


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    goes_on = threading.Event()
    rename = os.rename

    def held(*args, **kwargs):
        goes_on.wait(20)
        return rename(*args, **kwargs)

    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state(), RECORD)
        checkpoints.wait()
        monkeypatch.setattr(os, "rename", held)
        began = time.monotonic()
        checkpoints.save(2, state(), RECORD)
        assert time.monotonic() - began < 10
        assert checkpoints.latest() == 1
        goes_on.set()
        checkpoints.wait()
        assert checkpoints.latest() == 2


def test_what_killed_saves_left_is_cleared_away(copy):
    left = shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    (left / "state" / "manifest.ocdbt").unlink()
    (copy / "40.orbax-checkpoint-tmp-7").mkdir()
    with opened(copy) as checkpoints:
        assert checkpoints.restore(template(state())).step == 20
        checkpoints.save(30, state(), RECORD)
    assert names(copy) == ["20", "30"]


@contextlib.contextmanager
def full_disk(free):
    """Let no file become longer than `free` bytes; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Of a write that fails late, Orbax has closed the event loop that should hear of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("free", [0, 20_000])
@pytest.mark.parametrize("ending", ["save", "wait", "close"])
def test_a_full_disk_is_told_and_the_last_checkpoint_survives(copy, free, ending):
    big = {"x": jax.random.normal(jax.random.key(0), (200, 200))}
    shutil.rmtree(copy)
    with opened(copy) as checkpoints:
        checkpoints.save(20, big, "good")
    failed = r"saving step 30 in .* failed: .*File too large.* step 20 is complete"
    checkpoints = Checkpoints(copy, IDENTITY)
    end = {
        "save": lambda: checkpoints.save(40, big, RECORD),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
    }[ending]

    def save_and_end():
        # What fails in the background is not lost: the next call raises it, if it
        # did not fail so early that this one does.
        checkpoints.save(30, big, RECORD)
        end()

    with full_disk(free), pytest.raises(CheckpointError, match=failed):
        save_and_end()
    with contextlib.suppress(CheckpointError):
        checkpoints.close()
    with opened(copy) as checkpoints:
        found = checkpoints.restore(template(big))
        assert found is not None
        assert (found.step, found.record) == (20, "good")
        assert_same(found.state, big)
        checkpoints.save(30, big, "later")
    assert names(copy) == ["20", "30"]


def test_a_step_that_is_there_is_not_passed_over_in_silence(copy):
    told = pytest.raises(CheckpointError, match=r"saving step 20 .* later one")
    with opened(copy) as checkpoints, told:
        checkpoints.save(20, state(), RECORD)


def test_ctrl_c_waits_for_a_save_that_has_begun(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with opened(tmp_path) as checkpoints:
        save = checkpoints._manager.save

        def interrupted(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return save(*args, **kwargs)

        monkeypatch.setattr(checkpoints._manager, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(1, small(), RECORD)
        checkpoints.wait()
        assert checkpoints.latest() == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/here cannot hold checkpoints"):
        Checkpoints(tmp_path / "file" / "here", IDENTITY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_change_of_an_array_changes_its_fingerprint(dtype):
    # Equal elements, and a power of two of them: where sums of products cancel.
    ones, bits = np.ones((256, 256)), np.arange(256**2).reshape(256, 256) // 7 % 2
    for x in (ones, bits):
        changed = [x, np.zeros_like(x), np.roll(bits, 1), bits.T, bits[::-1]]
        for place in ((0, 0), (-1, -1), (slice(128), slice(None))):
            changed.append(x.copy())
            changed[-1][place] = 1 - x[place]
        prints = {fingerprint({"x": jnp.asarray(y.astype(dtype))}) for y in changed}
        assert len(prints) == len(changed)


def test_the_fingerprint_does_not_depend_on_where_the_parts_lie():
    x = {"x": jax.random.normal(jax.random.key(0), (64, 32))}
    spread = on(make_mesh(8, 2), x)
    assert fingerprint(spread) == fingerprint(x)
