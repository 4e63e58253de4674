"""Scans of lightning attention on a GPU, from planned tables of work.

`scan` holds the equations and the kernels, `warp_scan` those for Hopper, `launch` what starts them.
"""

from kernels_triton.lightning.launch import aligned, launch_prefix, launch_scans, tile_of

__all__ = ["aligned", "launch_prefix", "launch_scans", "tile_of"]
