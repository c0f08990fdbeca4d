"""Gradients reduced beside the backward pass without stopping the host.

DeepSpeed 0.19.8 under ZeRO 1 and 2 with `overlap_comm` reduces full buckets on a stream of their own, and at the end of
each backward pass that reduced makes the host wait for the whole device. What comes next only has to run after the
reduction on the device: its stream is waited for there, and the host goes on to queue the next micro-batch.

History, read before this became the default (DeepSpeed's issues): a bucket was refilled while it was being reduced
(7188, 7804; fixed by not resetting the index of the pair of buckets), copies from several autograd streams were not
waited for (8061), stage 3 waited for the wrong stream (pull request 7898). The fixes are in 0.19.8. A gradient larger
than the bucket is still reduced where it lies, and freed under stage 2 without a word to the allocator: the bucket is
therefore never smaller than the largest tensor (lumina.config.deepspeed).
"""

from __future__ import annotations

from typing import Any


def wait_on_the_device(wrapper: Any, accelerator: Any) -> None:
    """Replace the host's wait at the end of a backward pass of a ZeRO 1 or 2 wrapper by the stream's. Nothing where no
    stream of its own reduces (a CPU, no overlap), or where offloading needs the host to wait."""
    epilogue = getattr(wrapper, "independent_gradient_partition_epilogue", None)
    overlaps = getattr(wrapper, "overlap_comm", False) and hasattr(wrapper, "reduction_stream")
    if epilogue is None or not overlaps or wrapper.cpu_offload or accelerator.resolves_data_dependency():
        return

    def behind_the_reduction(device_index: Any = None) -> None:
        accelerator.current_stream().wait_stream(wrapper.reduction_stream)

    def queued() -> None:
        accelerator.synchronize = behind_the_reduction
        try:
            epilogue()
        finally:
            del accelerator.synchronize  # the class's own again

    wrapper.independent_gradient_partition_epilogue = queued
