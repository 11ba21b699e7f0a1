"""NumPy's files are read as NumPy reads them, or refused before they take memory."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from spt_jax.numpy_files import npz_names, read_npy, read_npz

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "by column": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "number": np.float64(2.5),
    "empty": np.zeros((0, 4), np.int32),
    "texts": np.asarray(["a", "bc"]),
}


def bytes_of(save: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    """A file of an array of three numbers that says it is another."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue() + b"\0" * 24


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(save: Callable[..., None]) -> None:
    content = bytes_of(save, **ARRAYS)
    found = read_npz(content, most_bytes=1 << 20)
    with np.load(io.BytesIO(content)) as expected:
        assert sorted(found) == sorted(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)


@pytest.mark.parametrize("shape", [(10**12,), (4,), (2,), (-1, 3), (-3, -1), (2**62, 2**62, 0)])
def test_a_header_that_lies_is_refused_without_the_memory_that_it_claims(shape: tuple[int, ...]) -> None:
    content = claiming(shape)
    with pytest.raises(ValueError, match="claims"):
        read_npy(content)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a.npy", content)
    with pytest.raises(ValueError, match="claims"):
        read_npz(archive.getvalue())
    np.testing.assert_array_equal(read_npy(claiming((3,))), np.zeros(3))


def test_what_unfolds_to_more_than_allowed_is_refused_before_it_does() -> None:
    content = bytes_of(np.savez_compressed, zeros=np.zeros(50_000_000, np.int8))
    assert len(content) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="unpacked; allowed: 1000000"):
            read_npz(content, most_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert read_npz(content, most_bytes=60_000_000)["zeros"].size == 50_000_000


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_member_that_unpacks_to_more_than_it_claims_is_refused_without_the_memory(kind: int) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr("zeros.npy", bytes_of(np.save, np.zeros(50_000_000, np.int8)))
    size = (50_000_128).to_bytes(4, "little")
    content = stream.getvalue().replace(size, (200).to_bytes(4, "little"))
    assert content != stream.getvalue()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"CRC|NumPy does not write"):
            read_npz(content, most_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_arrays_that_are_not_asked_for_are_not_read() -> None:
    content = bytes_of(np.savez_compressed, small=np.arange(3), large=np.zeros(50_000_000, np.int8))
    assert npz_names(content) == ["small", "large"]
    assert list(read_npz(content, ["small"], 10_000)) == ["small"]
    with pytest.raises(ValueError, match="unpacked"):
        read_npz(content, most_bytes=10_000)


def test_python_objects_are_refused() -> None:
    objects = np.asarray([{}, None], dtype=object)
    with pytest.raises(ValueError, match="Python objects"):
        read_npy(bytes_of(np.save, objects))
    with pytest.raises(ValueError, match="Python objects"):
        read_npz(bytes_of(np.savez, objects))


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY\x01\x00\x05\x00{([{(", b"\x93NUMPY\x09\x00" + b" " * 80])
def test_what_is_no_such_file_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        read_npy(content)
    with pytest.raises(ValueError):
        read_npz(content)


def test_a_bit_that_changed_is_noticed() -> None:
    content = bytearray(bytes_of(np.savez, a=ARRAYS["matrix"]))
    content[content.index(ARRAYS["matrix"].tobytes())] ^= 1
    with pytest.raises(ValueError, match="CRC"):
        read_npz(bytes(content))
