"""Checkpoints that are torn or foreign: refused, and never wrong."""

import gc
import random
import shutil

import jax.numpy as jnp
import optax
import pytest
from kept_states import (
    IDENTITY,
    RECORD,
    STEPS,
    assert_same,
    names,
    opened,
    small,
    state,
    template,
)

from experiments.checkpoint import CheckpointError

# Orbax leaves the reads of a torn checkpoint behind in a loop that it has closed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def left_behind():
    """Collect what Orbax left while it is expected, not in some later test."""
    yield
    gc.collect()


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
