"""What each process of a training reads: of every batch its own rows, no row twice and none left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from several_processes import start
from tiny_run import TALK, train_arguments

pytestmark = pytest.mark.first_python

STEPS = 4
EPOCHS = 2
DEVELOPMENT = 3
WATCHED = """
import sys
from pathlib import Path

import jax
import numpy as np

from spt_jax.commands.main import main
from spt_jax.data.loader import DialogueLoader

batch = DialogueLoader.batch

def watched(loader, step):
    made = batch(loader, step)
    np.save(Path(sys.argv[1]) / f"{jax.process_index()}-{step}.npy", made["tokens"])
    return made

DialogueLoader.batch = watched
sys.exit(main(sys.argv[2:]))
"""


def read_by(folder: Path, count: int) -> list[list[np.ndarray]]:
    """The rows of tokens that each process made, by process and step."""
    folder.mkdir()
    arguments = train_arguments(folder, workdir=folder / "run")
    arguments += [f"--config.train.steps={STEPS}", "--heartbeat=60"]
    seen = folder / "seen"
    seen.mkdir()
    job = start([str(seen), *arguments], count, 4 if count == 1 else 2, program=("-c", WATCHED))
    assert job.wait() == [0] * count, job.err
    return [[np.load(seen / f"{process}-{step}.npy") for step in range(STEPS)] for process in range(count)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """The batches of one process, by step."""
    (batches,) = read_by(tmp_path_factory.mktemp("shards") / "one", 1)
    return batches


@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_the_processes_are_disjoint_and_together_the_whole_batch(whole, tmp_path, count):
    parts = read_by(tmp_path / "several", count)
    for step, batch in enumerate(whole):
        assert [len(part[step]) for part in parts] == [len(batch) // count] * count
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batch)
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS // EPOCHS, (epoch + 1) * STEPS // EPOCHS)
        rows = Counter(
            row.tobytes() for part in parts for step in steps for row in part[step] if np.unique(row).size > 1
        )
        assert len(rows) == len(TALK) - DEVELOPMENT and set(rows.values()) == {1}
