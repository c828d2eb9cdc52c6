"""What a run would need of devices that nobody has paid for yet: `rlalign plan CONFIG --topology v5p:2x2x4`."""

from rlalign.plan.devices import Topology, parse_topology
from rlalign.plan.estimate import Phase, Plan, estimate
from rlalign.plan.job import Job, read_job

__all__ = ["Job", "Phase", "Plan", "Topology", "estimate", "parse_topology", "read_job"]
