"""Processes: joining the world, collectives, launching here or on a cluster."""

from lg.distributed.world import (
    LAUNCHED,
    World,
    any_process,
    barrier,
    broadcast_buffers,
    claim_fault,
    gather_objects,
    in_turn,
    join,
    leave,
    rows_of_all,
    smallest,
    speaks_for_all,
    sum_over_processes,
    use_loopback,
)

__all__ = [
    "LAUNCHED",
    "World",
    "any_process",
    "barrier",
    "broadcast_buffers",
    "claim_fault",
    "gather_objects",
    "in_turn",
    "join",
    "leave",
    "rows_of_all",
    "smallest",
    "speaks_for_all",
    "sum_over_processes",
    "use_loopback",
]
