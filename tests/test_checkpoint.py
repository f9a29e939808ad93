"""Checkpoints: whole or refused, never lost, never wrong."""

import contextlib
import os
import random
import resource
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scl_jax
from experiments.checkpoint import KEPT, CheckpointError, Checkpoints, _fingerprint
from experiments.mesh import by_shape, make_mesh
from experiments.step import TrainState

# Orbax leaves the reads of a torn checkpoint behind in a loop that it has closed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
IDENTITY = {"method": "scl", "seed": 1, "config": {"model": "lenet5", "epochs": 3}}
RECORD = {"key": [17, 4294967295], "history": [["scl", 1, 0.1]], "sums": [1 / 3, 2.5]}
STEPS = (10, 20)


def state(seed=0, optimizer=None):
    """Return what a training has, and leaves of all other types."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "Conv_0": {"kernel": jax.random.normal(keys[0], (3, 3, 2, 8))},
        "Dense_0": {
            "kernel": jax.random.normal(keys[1], (16, 8)),
            "bias": jax.random.normal(keys[2], (8,)),
        },
    }
    masked = scl_jax.mask_params(params, dtype=jnp.bfloat16)
    tx = scl_jax.partition(optimizer or optax.adamw(0.1), optax.sgd(0.1, 0.9))
    statistics = {
        "batch_stats": {"mean": jax.random.normal(keys[3], (8,))},
        "flags": jnp.array([True, False, seed % 2 == 0]),
        "bytes": jnp.arange(seed, seed + 5, dtype=jnp.uint8),
        "half": jnp.full((2, 2), seed, jnp.float16),
        "count": jnp.int32(seed),
    }
    return TrainState(masked, statistics, tx.init(masked))


def small(seed=0):
    """Return a state of few leaves."""
    key = jax.random.key(seed)
    return {"kernel": jax.random.normal(key, (48, 48)), "count": jnp.int32(seed)}


def on(mesh, tree):
    """Put a state where it belongs on a mesh."""
    return jax.device_put(tree, by_shape(mesh, tree))


def template(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@contextlib.contextmanager
def opened(folder, identity=IDENTITY):
    with contextlib.closing(Checkpoints(folder, identity)) as checkpoints:
        yield checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints, which nobody may change."""
    folder = tmp_path_factory.mktemp("saved")
    with opened(folder) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state(step), {**RECORD, "step": step})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def damages(content):
    """Yield ways in which a file can be torn."""
    chance = random.Random(len(content))
    yield "deleted", None
    yield "emptied", b""
    yield "truncated", content[: len(content) // 2]
    yield "zeroed", bytes(len(content))
    for bit in (chance.randrange(8 * len(content)) for _ in range(2)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)


def test_whatever_file_is_torn_no_wrong_value_comes_back(tmp_path):
    newest, asked, saved = STEPS[-1], template(small()), tmp_path / "saved"
    with opened(saved) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, small(step), {**RECORD, "step": step})
    used = dict.fromkeys(STEPS, 0)
    files = [p for p in (saved / str(newest)).rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in sorted(files):
        for damage, content in damages(file.read_bytes()):
            folder = shutil.copytree(saved, tmp_path / "torn")
            torn = folder / file.relative_to(saved)
            torn.unlink() if content is None else torn.write_bytes(content)
            with opened(folder) as checkpoints:
                found = checkpoints.restore(asked)
            assert found is not None, (file, damage)
            assert found.record == {**RECORD, "step": found.step}, (file, damage)
            assert_same(found.state, small(found.step))
            aside = [name for name in names(folder) if name.startswith("refused-")]
            assert len(aside) == (found.step != newest), (file, damage)
            used[found.step] += 1
            shutil.rmtree(folder)
    assert min(used.values()) > 10


def test_no_bit_of_the_record_can_be_flipped(copy):
    file = copy / str(STEPS[-1]) / "about" / "metadata"
    content = file.read_bytes()
    begin = content.index(b'"record"')
    with opened(copy) as checkpoints:
        for place in range(begin, len(content), 3):
            torn = bytearray(content)
            torn[place] ^= 1
            file.write_bytes(torn)
            with pytest.raises(CheckpointError, match="it cannot be read"):
                checkpoints._read(STEPS[-1], template(state()))


def test_a_torn_checkpoint_is_put_aside_and_its_step_saved_again(copy, caplog):
    shutil.rmtree(copy / "20" / "state" / "ocdbt.process_0" / "d")
    shutil.rmtree(copy / "20" / "state" / "d")
    with opened(copy) as checkpoints:
        found = checkpoints.restore(template(state()))
        assert found is not None
        assert found.step == 10
        (aside,) = copy.glob("refused-20-*")
        assert (aside / "about" / "metadata").is_file()
        assert "step 20 is refused and put aside: it cannot be read" in caplog.text
        checkpoints.save(20, state(5), "anew")
    with opened(copy) as checkpoints:
        found = checkpoints.restore(template(state()))
    assert found is not None
    assert (found.step, found.record) == (20, "anew")
    assert_same(found.state, state(5))
    assert names(copy) == ["10", "20", aside.name]


def test_if_all_are_refused_nothing_is_changed(copy):
    for step in (10, 20):
        (copy / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with opened(copy) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(template(state()))
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    for words in ("step 20: ", "step 10: ", str(copy), "Nothing was changed"):
        assert words in str(error.value)


def with_config(**changes):
    return {**IDENTITY, "config": {**IDENTITY["config"], **changes}}


OTHER_NETWORK = state()._replace(statistics={"batch_stats": {"mean": jnp.zeros(9)}})


@pytest.mark.parametrize(
    ("identity", "asked", "reason"),
    [
        (
            {**IDENTITY, "method": "dense"},
            state(),
            "method = 'scl', here it is 'dense'",
        ),
        ({**IDENTITY, "seed": 2}, state(), "seed = 1, here it is 2"),
        (with_config(epochs=4), state(), "epochs = 3, here it is 4"),
        (with_config(augment="flip"), state(), "augment = None, here it is 'flip'"),
        ({**IDENTITY, "format": 2}, state(), "format = 1, here it is 2"),
        ({**IDENTITY, "scl_jax": "9"}, state(), "scl_jax = .*, here it is '9'"),
        (IDENTITY, OTHER_NETWORK, r".*mean: float32\[8\], here it is float32\[9\]"),
        (IDENTITY, state(0, optax.sgd(0.1)), "opt.*here it is nothing"),
    ],
    ids=lambda value: None,
)
def test_a_foreign_checkpoint_is_refused_with_what_differs(
    copy, identity, asked, reason
):
    told = pytest.raises(CheckpointError, match=f"step 20: it has {reason}")
    with opened(copy, identity) as checkpoints, told:
        checkpoints.restore(template(asked))
    with opened(copy) as checkpoints:
        assert checkpoints.restore(template(state())).step == 20


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
    with full_disk(free):
        # What fails in the background is not lost: the next call raises it.
        checkpoints.save(30, big, RECORD)
        with pytest.raises(CheckpointError, match=failed):
            end()
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
        prints = {_fingerprint({"x": jnp.asarray(y.astype(dtype))}) for y in changed}
        assert len(prints) == len(changed)


def test_the_fingerprint_does_not_depend_on_where_the_parts_lie():
    x = {"x": jax.random.normal(jax.random.key(0), (64, 32))}
    spread = on(make_mesh(8, 2), x)
    assert _fingerprint(spread) == _fingerprint(x)
