import os

import pytest
import torch


@pytest.fixture(autouse=True)
def empty_memory_holds_nan():
    """Every `torch.empty` is filled with NaN, so that an output left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once_a_launch():
    """Triton's interpreter patches its language at each call of a device function: most of its time.

    Nothing undoes that before the launch ends, so what one call has patched serves the later ones.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_anew(executor, *arguments, **keywords):
        patched.clear()
        return launch(executor, *arguments, **keywords)

    def patch_once(function):
        modules = interpreter.tl, interpreter.tl.core
        seen = frozenset(m for m in modules if any(v is m for v in function.__globals__.values()))
        if seen in patched:
            return None
        patched.add(seen)
        return patch(function)

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        changes.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def one_thread():
    """For tests of tiny tensors: on busy cores a second thread waits far longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def worlds():
    """Worlds of ranks by size, started when first used; see `distributed_world`.

    They end with their module: gloo keeps a thread that polls for each group that was ever made, and
    the hundreds of a whole suite take a core from all tests behind them.
    """
    from distributed_world import World

    started = {}

    def get(size):
        return started.setdefault(size, World(size))

    yield get
    for world in started.values():
        world.close()
