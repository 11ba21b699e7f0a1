"""Leases on trials, beside Optuna's tables in the same database: who holds one may run the trial, and no one else.

Optuna's own heartbeats end the trial of a worker that fell silent and begin a new one in its place. A run of ours goes
on from its checkpoint, and TPE's draws depend on the trials' order, so the trial itself passes to another worker. A
lease is taken, renewed and given back by single statements that say which state they expect.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy
from sqlalchemy import Column, Float, Integer, MetaData, String, Table
from sqlalchemy.exc import DBAPIError, IntegrityError

from spt_jax.sweeps.process_identity import is_dead

_TABLE = Table(
    "spt_jax_leases",
    MetaData(),
    Column("study", String(512), primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("owner", String(512), nullable=False),
    Column("expires", Float(53), nullable=False),
)
# The database's clock is the one clock that workers on several machines share.
_NOW = {"sqlite": "(julianday('now') - 2440587.5) * 86400.0", "postgresql": "extract(epoch from clock_timestamp())"}


_OPENING = -1  # the number of no trial


@dataclasses.dataclass(frozen=True)
class Lease:
    """A lease as it stands in the database.

    Attributes:
        trial: The trial's number.
        owner: Who has it, see `spt_jax.sweeps.process_identity`; empty when it was given back.
        seconds: How long it still holds; negative when it has run out.
    """

    trial: int
    owner: str
    seconds: float


class Leases:
    """The leases of one sweep.

    Args:
        engine: The database's.
        study: The sweep's name.
        owner: Who takes leases, see `spt_jax.sweeps.process_identity`.
        seconds: How long a lease holds unless it is renewed.
    """

    def __init__(self, engine: sqlalchemy.Engine, study: str, owner: str, seconds: float) -> None:
        self._engine, self._study = engine, study
        self.owner, self.seconds = owner, seconds
        self._now = sqlalchemy.literal_column(_NOW[engine.dialect.name], Float(53))
        try:
            _TABLE.create(engine, checkfirst=True)
        except DBAPIError:  # another worker made it in this moment
            if not sqlalchemy.inspect(engine).has_table(_TABLE.name):
                raise

    def claim(self, trial: int) -> bool:
        """Takes the lease of a trial if nobody has it: none was given, it ran out, or its owner's process is dead."""
        where = (_TABLE.c.study == self._study) & (_TABLE.c.trial == trial)
        with self._engine.begin() as connection:
            row = connection.execute(
                sqlalchemy.select(_TABLE.c.owner, _TABLE.c.expires, (_TABLE.c.expires - self._now)).where(where)
            ).first()
        if row is None:
            return self._insert(trial)
        owner, expires, left = row
        if left > 0 and not is_dead(owner):
            return False
        # Whoever changed the row since it was read has it.
        unchanged = where & (_TABLE.c.owner == owner) & (_TABLE.c.expires == expires)
        return self._update(unchanged, owner=self.owner, expires=self._now + self.seconds)

    def renew(self, trial: int) -> bool:
        """Holds a lease for its whole time again; False when it is another's by now."""
        return self._update(self._mine(trial), expires=self._now + self.seconds)

    def release(self, trial: int) -> None:
        """Gives a lease back, if it is still this owner's."""
        self._update(self._mine(trial), owner="", expires=0.0)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the context is open, no other owner of this sweep's leases is in it; waits until none is."""
        while not self.claim(_OPENING):
            time.sleep(0.1)
        try:
            yield
        finally:
            self.release(_OPENING)

    def read(self) -> dict[int, Lease]:
        """The leases of the sweep's trials, by trial."""
        query = sqlalchemy.select(_TABLE.c.trial, _TABLE.c.owner, _TABLE.c.expires - self._now)
        of_trials = (_TABLE.c.study == self._study) & (_TABLE.c.trial != _OPENING)
        with self._engine.begin() as connection:
            rows = connection.execute(query.where(of_trials)).all()
        return {trial: Lease(trial, owner, float(left)) for trial, owner, left in rows}

    def _mine(self, trial: int) -> sqlalchemy.ColumnElement[bool]:
        return (_TABLE.c.study == self._study) & (_TABLE.c.trial == trial) & (_TABLE.c.owner == self.owner)

    def _insert(self, trial: int) -> bool:
        values = {"study": self._study, "trial": trial, "owner": self.owner, "expires": self._now + self.seconds}
        try:
            with self._engine.begin() as connection:
                connection.execute(sqlalchemy.insert(_TABLE).values(values))
        except IntegrityError:
            return False
        return True

    def _update(self, where: sqlalchemy.ColumnElement[bool], **values: object) -> bool:
        with self._engine.begin() as connection:
            return connection.execute(sqlalchemy.update(_TABLE).where(where).values(values)).rowcount == 1
