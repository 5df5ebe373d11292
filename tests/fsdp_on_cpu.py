"""Run under accelerate launch: a script whose model accelerate spreads over CPU processes, with gloo.

accelerate 1.15 takes FSDP on accelerators only. On a CPU it reads the same configuration, says nothing, and trains with
DDP. All but its word for the kind of processes is ready, so this sets the word.
"""

import atexit
import os
import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

_init = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp
    sys.argv, code = sys.argv[1:], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    # What FSDP holds of gloo outlives the process group, and an interpreter that ends while a thread of gloo still
    # holds a tensor is aborted (pytorch/pytorch#179291).
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
