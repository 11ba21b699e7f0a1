"""The roofline's times are those of bytes and FLOPs that one device has to do with."""

from __future__ import annotations

import pytest

from spt_jax.planning.roofline import roofline
from spt_jax.planning.topology import Topology


def test_the_devices_of_a_slice_share_what_it_sends_to_the_others():
    alone, pair, wide = Topology.parse("v5e:2x2"), Topology.parse("v5e:2x2", 2), Topology.parse("v5e:2x4", 2)
    assert roofline(alone, 0, 0, 0, 8e9).network == 0
    # Of an all-reduce over two, each sends half and then half.
    assert roofline(pair, 0, 0, 0, 8e9).network == pytest.approx(2 * 8e9 / 4 / 2 / pair.chip.network)
    assert roofline(wide, 0, 0, 0, 8e9).network == pytest.approx(roofline(pair, 0, 0, 0, 8e9).network / 2)
