"""An eager call goes past the dispatcher, and whatever wants to see the op still does."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.custom_op import CustomOp


def cube(x: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * x**3


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return 3 * ctx.factor * grad * x**2, None


def add_one_(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return torch.zeros_like(like)


CUBE = CustomOp(
    "test_cube", cube, lambda x, f: torch.empty_like(x), setup_context=save, backward=backward
)
ADD_ONE_ = CustomOp("test_add_one_", add_one_, lambda x, y: torch.empty_like(y), mutates=("x", 0))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """Calls of the op itself, by which the dispatcher was asked."""
    calls, op = [], CUBE._op
    monkeypatch.setattr(CUBE, "_op", lambda *args: (calls.append(args), op(*args))[1])
    return calls


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("parameter", [False, True], ids=["tensor", "parameter"])
def test_an_eager_call_does_not_ask_the_dispatcher(parameter, requires_grad, dispatched):
    x = torch.tensor([1.0, 2.0], requires_grad=requires_grad)
    y = CUBE(torch.nn.Parameter(x, requires_grad) if parameter else x, 2.0)
    assert dispatched == [] and y.requires_grad == requires_grad
    assert y.tolist() == [2.0, 16.0]


def test_both_ways_have_the_same_gradient():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(f(x, 2.0).sum(), x)[0] for f in (CUBE, CUBE._op)]
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0], 6 * x.detach() ** 2)


def test_a_mode_sees_the_op():
    with Seen() as mode:
        CUBE(torch.ones(2), 1.0)
    assert "attnlab::test_cube" in mode.ops


def test_a_subclass_sees_the_op():
    with FakeTensorMode():
        x = torch.ones(2)
    assert isinstance(CUBE(x, 1.0), FakeTensor)


def test_a_transform_sees_the_op(dispatched):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(torch.func.vmap(lambda row: CUBE(row, 1.0))(x), x**3)
    assert dispatched


def test_a_compiled_call_holds_the_op():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: CUBE(x, 1.0), fullgraph=True, backend=keep)
    assert compiled(torch.tensor([2.0])).tolist() == [8.0]
    assert any("test_cube" in str(node.target) for node in graphs[0].graph.nodes)


def test_a_change_in_place_raises_the_version():
    x = torch.zeros(2)
    version = x._version
    ADD_ONE_(x, x)
    assert x._version > version and x.tolist() == [1.0, 1.0]
    with torch.inference_mode():
        y = torch.zeros(2)
        ADD_ONE_(y, y)
    assert y.tolist() == [1.0, 1.0]


def test_a_backward_of_torch_ops_is_differentiable():
    x = torch.tensor([2.0], requires_grad=True)
    (first,) = torch.autograd.grad(CUBE(x, 1.0), x, create_graph=True)
    assert torch.autograd.grad(first, x)[0].tolist() == [12.0]


def test_an_op_without_a_gradient_refuses_instead_of_giving_none():
    x = torch.ones(2, requires_grad=True)
    result = ADD_ONE_(torch.zeros(2), x) + x
    with pytest.raises(RuntimeError, match="test_add_one_"):
        result.sum().backward()


def test_the_op_passes_opcheck():
    x = torch.randn(4, requires_grad=True)
    torch.library.opcheck(torch.ops.attnlab.test_cube.default, (x, 2.0))
