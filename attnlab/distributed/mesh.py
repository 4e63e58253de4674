"""The ranks of a job in two views: how attention shares them, and how the experts do.

MiniMax-01, arXiv 2501.08313, section 3.1: world = pp dp cp tp = pp edp ep etp. The dense view has
data, context (sequence) and tensor (head) parallelism, the sparse one expert-data, expert and
expert-tensor parallelism. Inner axes have the fastest links: tp and etp. pp, stages of layers, is 1.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from attnlab.checks import expect
from attnlab.distributed.comm import Group, Ledger

DENSE = ("pp", "dp", "cp", "tp")
SPARSE = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks each kind of parallelism takes; `edp` follows from the others.

    Raises:
        ValueError: for numbers that don't factor the world, and for stages of layers.
    """

    world_size: int
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        """Check the factors."""
        for name in ("world_size", "dp", "cp", "tp", "ep", "etp", "pp"):
            value = getattr(self, name)
            expect(value >= 1, f"{name} >= 1", value)
        expect(self.pp == 1, "pp of 1: layers are not spread over stages", self.pp)
        dense = self.dp * self.cp * self.tp
        words = f"dp {self.dp} x cp {self.cp} x tp {self.tp}"
        expect(dense == self.world_size, f"{self.world_size} ranks as {words}", dense)
        experts = self.ep * self.etp
        words = f"ep x etp that divides the {self.world_size} ranks"
        expect(self.world_size % experts == 0, words, f"{self.ep} x {self.etp}")

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.ep * self.etp)

    def check_model(
        self, *, num_heads: int, num_kv_heads: int, num_experts: int, width: int
    ) -> None:
        """Raise `ValueError` unless heads, experts and their width divide among the ranks."""
        for name, count, axis in (
            ("heads", num_heads, "tp"),
            ("key heads", num_kv_heads, "tp"),
            ("experts", num_experts, "ep"),
            ("channels of an expert", width, "etp"),
        ):
            ways = getattr(self, axis)
            expect(count % ways == 0, f"a number of {name} that {axis} {ways} divides", count)


class Meshes:
    """The two views of one world as `DeviceMesh`es, and their axes as groups."""

    def __init__(self, layout: Layout, device_type: str, ledger: Ledger | None = None) -> None:
        """Make the groups; every rank of the world has to, with the same layout.

        Raises:
            ValueError: if the job has another number of ranks.
        """
        import torch.distributed as dist

        expect(dist.get_world_size() == layout.world_size, "a layout of all ranks", layout)
        self.layout, self._ledger = layout, ledger
        self.world = init_device_mesh(device_type, (layout.world_size,), mesh_dim_names=("world",))
        self.dense = self._view(DENSE)
        self.sparse = self._view(SPARSE)
        self._pack = self.dense["cp", "tp"]._flatten("pack")
        self._groups: dict[str, Group] = {}

    def group(self, axis: str) -> Group:
        """This rank's group along an axis of either view, or "world", or "pack".

        The last are the ranks that share a pack, cp and tp, in the order of its tokens.
        """
        if axis not in self._groups:
            views = {**dict.fromkeys(DENSE, self.dense), **dict.fromkeys(SPARSE, self.sparse)}
            mesh = views.get(axis, self._pack if axis == "pack" else self.world)
            process_group = mesh.get_group(axis)
            self._groups[axis] = Group(process_group, name=axis, ledger=self._ledger)
        return self._groups[axis]

    def _view(self, axes: tuple[str, ...]) -> DeviceMesh:
        sizes = tuple(getattr(self.layout, axis) for axis in axes)
        return self.world._unflatten(0, sizes, axes)
