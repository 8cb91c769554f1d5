"""Models, batches and optimizer states spread over a mesh of devices."""

from jaxformers.sharding.hosts import collect, host_rows, join_batch, join_hosts
from jaxformers.sharding.mesh import make_mesh
from jaxformers.sharding.rules import RULES, layout
from jaxformers.sharding.spread import shard, shard_batch
from jaxformers.sharding.zigzag import zigzag

__all__ = [
    "RULES",
    "collect",
    "host_rows",
    "join_batch",
    "join_hosts",
    "layout",
    "make_mesh",
    "shard",
    "shard_batch",
    "zigzag",
]
