"""What is kept, what is noticed and what is refused; damage of every kind leaves the checkpoint before it usable."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_trees import META, assert_restores, fill, names, save, targets, trees
from jax.sharding import NamedSharding, PartitionSpec

from spt_jax.errors import UserError
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import replicated
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import restore_targets, tree_digest, tree_shapes
from spt_jax.training.checkpoint_record import DamagedCheckpointError, read_record


@pytest.mark.parametrize(
    ("latest", "best", "perplexities", "kept"),
    [
        (2, 1, {0: 9.0, 1: 4.0, 2: 6.0, 3: 7.0, 4: 8.0}, [1, 3, 4]),
        (1, 2, {0: 3.0, 1: 9.0, 2: 5.0, 3: 8.0, 4: 8.5}, [0, 2, 4]),
        (1, 1, {0: 9.0, 1: None, 2: 4.0, 3: None, 4: None}, [2, 4]),
        (2, 1, {0: None, 1: None, 2: None, 3: None}, [2, 3]),
        (2, 1, {0: 5.0, 1: math.nan, 2: math.inf, 3: None}, [0, 2, 3]),
        (3, 1, {0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0}, [1, 2, 3]),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, latest, best, perplexities, kept):
    with Checkpoints(tmp_path / "c", keep_latest=latest, keep_best=best) as checkpoints:
        for step, perplexity in perplexities.items():
            save(checkpoints, step, perplexity)
        assert checkpoints.steps() == kept
        assert_restores(checkpoints, "latest", kept[-1])


def test_what_is_kept_does_not_depend_on_restarts(tmp_path):
    for step, perplexity in {0: 9.0, 1: None, 2: 4.0, 3: None, 4: 7.0}.items():
        with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
            save(checkpoints, step, perplexity)
    assert names(tmp_path) == {"2", "4"}


@pytest.mark.parametrize(
    ("perplexities", "best"),
    [
        ({0: 5.0, 1: 3.0, 2: 4.0}, 1),
        ({0: 5.0, 1: 3.0, 2: 3.0}, 2),
        ({0: 5.0, 1: math.nan}, 0),
        ({0: math.nan, 1: math.nan}, 1),
        ({0: 5.0, 1: None}, 0),
        ({0: None, 1: None}, 1),
    ],
)
def test_best_is_the_lowest_perplexity_and_never_one_that_is_not_a_number(tmp_path, perplexities, best):
    fill(tmp_path, perplexities)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_restores(checkpoints, "best", best)
        meta = checkpoints.meta("best")
        assert meta is not None
        assert meta["step"] == best


def test_a_step_is_restored_by_its_number(tmp_path):
    fill(tmp_path, {3: 5.0, 4: 6.0})
    with Checkpoints(tmp_path) as checkpoints:
        assert_restores(checkpoints, "3", 3)
        with pytest.raises(UserError, match=r"no checkpoint of step 7 .*\[3, 4\]"):
            checkpoints.restore("7", targets())


def test_without_any_checkpoint_there_is_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore("latest", targets()) is None
        assert checkpoints.meta("best") is None
    with pytest.raises(UserError, match="there is no checkpoint in"):
        Checkpoints(tmp_path / "new", read_only=True)


def test_orbax_itself_reads_what_was_saved(tmp_path):
    fill(tmp_path, {3: 5.0})
    for item, tree in trees(3).items():
        with ocp.StandardCheckpointer() as reader:
            assert tree_digest(reader.restore(tmp_path / "3" / item, tree)) == tree_digest(tree)


def test_a_clock_that_runs_ahead_by_days_fails_no_save(tmp_path, monkeypatch):
    now, days = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: now() + next(days) * 24 * 3600)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 5.0)
        save(checkpoints, 2, 4.0)
        assert_restores(checkpoints, "latest", 2)
    assert next(days) > 2


def flip_bits(step: Path) -> None:
    """Inverts the stored bytes of the arrays, in the middle of the largest file."""
    chunk = max((p for p in (step / "trainable").rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(255 - value for value in data[middle : middle + 8])
    chunk.write_bytes(bytes(data))


def other_arrays(step: Path) -> None:
    """Arrays that are whole, but of another save: only the digest can tell."""
    shutil.rmtree(step / "trainable")
    shutil.copytree(step.with_name("1") / "trainable", step / "trainable")


def truncate_metrics(step: Path) -> None:
    (step / "metrics" / "metrics").write_text('{"perp')


def truncate_arrays(step: Path) -> None:
    for path in (step / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def remove_meta(step: Path) -> None:
    (step / "meta" / "metadata").unlink()


def truncate_meta(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text()[:40])


def change_a_name_in_meta(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace("bank/prompts", "bank/pron0ts"))


def change_a_digit_of_the_perplexity(step: Path) -> None:
    path = step / "metrics" / "metrics"
    path.write_text(path.read_text().replace("4", "3"))


def remove_metrics(step: Path) -> None:
    (step / "metrics" / "metrics").unlink()


def garble_what_is_told_of_the_arrays(step: Path) -> None:
    (step / "optimizer" / "_METADATA").write_bytes(b"\xc2")


def change_a_name_told_of_the_arrays(step: Path) -> None:
    path = step / "trainable" / "_METADATA"
    path.write_text(path.read_text().replace("prompts", "pronpts"))


def remove_item(step: Path) -> None:
    shutil.rmtree(step / "optimizer")


DAMAGES = [
    flip_bits,
    other_arrays,
    truncate_metrics,
    truncate_arrays,
    empty_folder,
    remove_meta,
    truncate_meta,
    change_a_name_in_meta,
    change_a_digit_of_the_perplexity,
    remove_metrics,
    garble_what_is_told_of_the_arrays,
    change_a_name_told_of_the_arrays,
    remove_item,
]
NOTICED_IN_READING = [flip_bits, other_arrays]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_set_aside_and_the_one_before_taken(tmp_path, damage: Callable[[Path], None]):
    fill(tmp_path, {1: 5.0, 2: 4.0})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        assert_restores(checkpoints, "latest", 1)
        assert names(tmp_path) == {"1", "2.corrupt"}
        save(checkpoints, 2, 4.0)
        assert_restores(checkpoints, "latest", 2)
    assert names(tmp_path) == {"1", "2", "2.corrupt"}


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage not in NOTICED_IN_READING])
def test_damage_beside_the_arrays_is_noticed_before_any_array_is_read(tmp_path, damage: Callable[[Path], None]):
    fill(tmp_path, {1: 5.0, 2: 4.0})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_read_only_passes_over_a_damaged_step_says_so_and_changes_nothing(
    tmp_path, caplog, damage: Callable[[Path], None]
):
    fill(tmp_path, {1: 5.0, 2: 4.0})
    damage(tmp_path / "2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for which in ("latest", "best"):
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert_restores(checkpoints, which, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert {record.message.partition(" is damaged: ")[0] for record in caplog.records} == {"the checkpoint of step 2"}
    assert all(record.message.endswith("; it was passed over") for record in caplog.records)


def test_a_step_damaged_twice_keeps_both_remains(tmp_path):
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            save(checkpoints, 4)
        empty_folder(tmp_path / "4")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore("latest", targets()) is None
    assert names(tmp_path) == {"4.corrupt", "4.corrupt2"}


def test_when_all_are_damaged_one_sentence_says_so(tmp_path):
    fill(tmp_path, {1: 5.0, 2: 4.0})
    flip_bits(tmp_path / "1")
    flip_bits(tmp_path / "2")
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint in .* is whole: the checkpoint of step 1 is damaged"),
    ):
        checkpoints.restore("latest", targets())
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="is whole"):
        checkpoints.restore("latest", targets())
    assert names(tmp_path) == {"1.corrupt", "2.corrupt"}


def test_other_shapes_are_refused_with_both_named_and_nothing_set_aside(tmp_path):
    fill(tmp_path, {1: 5.0})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"bank/prompts of shape \[3, 2, 5\].*needs \[3, 2, 6\]"):
            checkpoints.restore("latest", targets(width=6))
        other = targets()
        other["optimizer"][1]["nu"] = other["optimizer"][1]["mu"]
        with pytest.raises(UserError, match=r"nu of shape None.*needs \[2, 5\]"):
            checkpoints.restore("latest", other)
        assert_restores(checkpoints, "latest", 1)
    assert names(tmp_path) == {"1"}


def test_shapes_are_named_by_their_path():
    assert tree_shapes(trees(0)["trainable"]) == {"bank/prompts": [3, 2, 5]}


def test_the_digest_sees_every_bit_every_shape_and_every_name():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(1, np.int32)}
    others = [
        {"a": np.zeros((3, 2), np.float32), "b": tree["b"]},
        {"a": np.zeros((2, 3), np.int32), "b": tree["b"]},
        {"a": np.where(np.eye(2, 3) > 0, -0.0, 0.0).astype(np.float32), "b": tree["b"]},
        {"a": tree["a"], "c": tree["b"]},
        {"a": tree["a"]},
    ]
    assert len({tree_digest(t) for t in [tree, *others]}) == 6
    assert tree_digest(tree) == tree_digest({"b": jnp.zeros(1, jnp.int32), "a": np.asfortranarray(tree["a"])})


def test_a_restore_onto_another_number_of_devices_is_bitwise(tmp_path):
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh(devices=jax.devices()[:8])
    for source, target in ((one, eight), (eight, one)):
        folder = tmp_path / str(source.size)
        saved = jax.device_put(trees(7), replicated(source))
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(7, saved["trainable"], saved["optimizer"], META, 1.0)
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore("latest", targets(mesh=target))
        assert restored is not None
        assert tree_digest(jax.device_get(restored[1])) == tree_digest(jax.device_get(saved))
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored[1])} == {target.size}


def test_a_restore_takes_the_shardings_that_are_asked_for(tmp_path):
    fill(tmp_path, {1: 5.0})
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        wanted = {"trainable": restore_targets(trees(0)["trainable"], split)}
        restored = checkpoints.restore("best", wanted)
    assert restored is not None
    prompts = restored[1]["trainable"]["bank"]["prompts"]
    assert prompts.sharding == split
    assert prompts.addressable_shards[0].data.shape == (3, 1, 5)
    np.testing.assert_array_equal(np.asarray(prompts), np.asarray(trees(1)["trainable"]["bank"]["prompts"]))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep_latest=8) as checkpoints:
        for step in range(1, 5):
            tree = {"a": jnp.full((256, 1024), step, jnp.float32)}
            checkpoints.save(step, tree, {"n": jnp.asarray(step)}, META, None)
            overwrite(tree)
        checkpoints.wait()
        target = restore_targets({"a": np.zeros((256, 1024), np.float32)}, replicated(make_mesh()))
        for step in range(1, 5):
            restored = checkpoints.restore(str(step), {"trainable": target})
            assert restored is not None
            assert np.unique(np.asarray(restored[1]["trainable"]["a"])) == [step]


def test_the_files_beside_the_arrays_are_json(tmp_path):
    fill(tmp_path, {1: 5.0})
    meta = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())
    assert meta["digests"] == {name: tree_digest(tree) for name, tree in trees(1).items()}
    assert meta["shapes"] == {"bank/prompts": [3, 2, 5]}


def test_a_step_that_is_rated_later_ranks_and_is_kept_as_one_saved_with_its_perplexity(tmp_path):
    with Checkpoints(tmp_path / "c", keep_latest=1, keep_best=1) as checkpoints:
        save(checkpoints, 1, None)
        checkpoints.rate(1, 4.0)
        assert (checkpoints.meta("1") or {})["perplexity"] == 4.0
        save(checkpoints, 2, 5.0)
        save(checkpoints, 3, 6.0)
        assert checkpoints.steps() == [1, 3]
        assert_restores(checkpoints, "best", 1)
    assert names(tmp_path) == {"c"}


def test_a_change_in_what_a_step_was_rated_later_is_noticed(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, None)
            checkpoints.rate(step, 4.0)
    step = tmp_path / "c" / "2"
    path = step / "metrics" / "metrics"
    path.write_text(path.read_text().replace("4.0", "3.0"))
    with pytest.raises(DamagedCheckpointError, match=r"its perplexity is 3.0, but None was saved"):
        read_record(step, ("trainable",))
    shutil.copyfile(step.with_name("1") / "metrics" / "metrics", path)  # whole, but of another step
    with pytest.raises(DamagedCheckpointError):
        read_record(step, ("trainable",))


@pytest.mark.parametrize("name", ["²", "٢", "007", "-2"])
def test_a_folder_whose_name_only_looks_like_a_step_is_none(tmp_path, name):
    fill(tmp_path, {1: 5.0})
    (tmp_path / name).mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
        assert_restores(checkpoints, "latest", 1)
        for ask in (checkpoints.meta, lambda which: checkpoints.restore(which, targets())):
            with pytest.raises(
                UserError, match=f"the checkpoint is '{name}'; allowed: best, latest or a step's number"
            ):
                ask(name)
