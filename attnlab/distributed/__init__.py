"""MiniMax-01's training systems on torch.distributed: LASP+, varlen ring attention, expert groups.

Read `pack` first: every exchange here is decided on the host, from the bounds of the packed
documents and the map of chunks to ranks, which are the same on all ranks.
"""
