"""DeepSpeed: the only place of Lumina that touches its private names (surface.py lists and checks them).

`import deepspeed` within this folder is the library; `lumina.train.deepspeed` is this. What is handed out is all that
the rest of training needs of it.
"""

from lumina.train.deepspeed.document import refuse_what_deepspeed_does
from lumina.train.deepspeed.engine import Engine
from lumina.train.deepspeed.fragments import (
    EngineSnapshot,
    Fragment,
    allocate_optimizer_state,
    fragments_to_load,
    init_optimizer_state,
    moments,
    owned_fragments,
    raw_step_count,
    restore_engine,
    snapshot_engine,
    step_count,
    sync_weights,
)
from lumina.train.deepspeed.half_precision import scale_exhausted
from lumina.train.deepspeed.layers import LayerStats
from lumina.train.deepspeed.optimizer import parameter_groups
from lumina.train.deepspeed.partitioned_init import drop_secondary_copy, local_shard, partition_on_init
from lumina.train.deepspeed.startup import (
    Ranks,
    destroy_process_group,
    end_process,
    import_deepspeed,
    init_process_group,
    set_collective_timeout,
)
from lumina.train.deepspeed.timing import APART, PHASES, PhaseTimes, StepTimer

__all__ = [
    "APART",
    "PHASES",
    "Engine",
    "EngineSnapshot",
    "Fragment",
    "LayerStats",
    "PhaseTimes",
    "Ranks",
    "StepTimer",
    "allocate_optimizer_state",
    "destroy_process_group",
    "drop_secondary_copy",
    "end_process",
    "fragments_to_load",
    "import_deepspeed",
    "init_optimizer_state",
    "init_process_group",
    "local_shard",
    "moments",
    "owned_fragments",
    "parameter_groups",
    "partition_on_init",
    "raw_step_count",
    "refuse_what_deepspeed_does",
    "restore_engine",
    "scale_exhausted",
    "set_collective_timeout",
    "snapshot_engine",
    "step_count",
    "sync_weights",
]
