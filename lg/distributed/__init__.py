"""Processes: launch them here or on a cluster, join them, exchange data between them."""

from lg.distributed.world import (
    LAUNCHED,
    World,
    any_process,
    barrier,
    broadcast_buffers,
    claim_failure,
    from_main,
    gather_objects,
    gather_rows,
    in_turn,
    is_first_to_fail,
    join,
    leave,
    min_over_processes,
    serve_store,
    sum_over_processes,
    use_loopback,
)
