import pytest
import torch


@pytest.fixture(autouse=True)
def empty_memory_holds_nan():
    """Every `torch.empty` is filled with NaN, so that an output left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.fixture(scope="session")
def worlds():
    """Worlds of ranks by size, started when first used; see `distributed_world`."""
    from distributed_world import World

    started = {}

    def get(size):
        return started.setdefault(size, World(size))

    yield get
    for world in started.values():
        world.close()
