"""Models, batches and optimizer states spread over a mesh of devices."""

from jaxformers.sharding.mesh import make_mesh
from jaxformers.sharding.rules import RULES, layout
from jaxformers.sharding.spread import shard, shard_batch
from jaxformers.sharding.zigzag import zigzag

__all__ = ["RULES", "layout", "make_mesh", "shard", "shard_batch", "zigzag"]
