"""What distributed engines are called, and what they need of the machine."""

import logging
import os
import shutil
import sys
import time
from pathlib import Path

from transformers import Trainer

logger = logging.getLogger(__name__)

_FORGOTTEN = 600.0
"""Seconds after which a compiler's lock is nobody's: the op takes one minute."""


def engine_of(trainer: Trainer) -> str:
    """Who holds the optimizer's state. Trainer would go on without it where another one does."""
    if not trainer.is_deepspeed_enabled:
        return "torch"
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    return f"DeepSpeed's ZeRO-{stage} on {trainer.args.world_size} processes"


def prepare_deepspeed_on_cpu() -> None:
    """Make DeepSpeed start on CPU ranks: there it compiles a small C++ op for their communication.

    Where no compiler is found the op is switched off, and the log says so; torch's own communication does the work.
    Compiling takes a minute, once: set TORCH_EXTENSIONS_DIR to a folder that stays.
    """
    if shutil.which("ninja") is None:  # installed beside this Python, whose folder may not be on the path
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if shutil.which("ninja") is None or compiler is None or shutil.which(compiler) is None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logger.warning("no C++ compiler or no ninja: DeepSpeed's CPU communication op is switched off, torch's is used")
    else:
        _load_op()


def _load_op() -> None:
    """Compile the op if it is not, and load it, one process after another.

    torch guards the op's folder by a file `lock`. A process that is killed leaves it behind, and the next one would
    wait for ever. The kernel's own lock on our file `loading` dies with its process, and a process that dies while it
    holds that one leaves a word in it: then `lock` is the dead one's, and goes. So does one as old as nobody waits,
    which a process left that did not know of ours.
    """
    import fcntl  # not on Windows

    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(ShareMemCommBuilder.NAME, verbose=False))
    with (folder / "loading").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lock = folder / "lock"
        if file.read() or (lock.exists() and time.time() - lock.stat().st_mtime > _FORGOTTEN):
            lock.unlink(missing_ok=True)
        file.truncate(0)
        file.write("loading")
        file.flush()
        ShareMemCommBuilder().load(verbose=False)
        file.truncate(0)
