"""``model.remat = auto`` takes the fastest policy whose step fits the devices."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest
import tiny

from spt_jax.config import default_config
from spt_jax.models.frozen_tree import random_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.objective import Objective
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.remat import POLICIES, SHARE, device_memory, fitting_remat, step_memory, with_remat
from spt_jax.training.step import init_state, make_train_step

DEEP = dataclasses.replace(tiny.MODEL, decoder=dataclasses.replace(tiny.CONFIG, num_layers=4, intermediate_size=256))


@pytest.fixture(scope="module")
def steps():
    """Steps by policy, and their arguments as shapes."""
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer(default_config().optimizer, 1)
    params = jax.eval_shape(lambda: random_params(DEEP.decoder, jax.random.key(0)))
    state = init_state(tiny.MODEL.init(jax.random.key(0), tiny.params()), optimizer, mesh)
    batch = tiny.packed("dialogue", tiny.DIALOGUES).batch()
    return (
        {p: make_train_step(with_remat(DEEP, p), Objective(), optimizer, mesh) for p in POLICIES},
        (state, params, batch),
    )


def test_the_fastest_that_fits_is_taken(steps):
    by_policy, arguments = steps
    needed = {policy: step_memory(step, *arguments) for policy, step in by_policy.items()}
    assert needed["full"] < needed["dots"] < needed["none"]
    for policy in POLICIES[:-1]:
        enough = math.ceil(needed[policy] / SHARE)
        assert fitting_remat(by_policy.get, arguments, enough) == policy
        assert fitting_remat(by_policy.get, arguments, enough - 100) != policy
    assert fitting_remat(by_policy.get, arguments, 1) == "full"


def test_a_device_that_does_not_tell_its_memory_takes_the_fastest():
    assert device_memory(jax.devices("cpu")[0]) is None
    assert fitting_remat(lambda _: pytest.fail("nothing needs to be compiled"), (), None) == "none"


class _Full:
    def lower(self, *_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")


class _Broken:
    def lower(self, *_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_step_that_is_too_large_to_compile_does_not_fit_and_other_errors_are_told():
    assert step_memory(_Full()) == math.inf
    assert fitting_remat(lambda _: _Full(), (), 10**12) == "full"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        step_memory(_Broken())
