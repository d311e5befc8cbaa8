"""What distributed engines need of the machine."""

import logging
import os
import shutil
import sys
from pathlib import Path

logger = logging.getLogger(__name__)


def prepare_deepspeed_on_cpu() -> None:
    """Make DeepSpeed start on CPU ranks: there it compiles a small C++ op for their communication.

    Where no compiler is found the op is switched off, and the log says so; torch's own communication does the work.
    Compiling takes a minute, once: set TORCH_EXTENSIONS_DIR to a folder that stays. A process killed while compiling
    leaves a `lock` file there, on which the next one waits for ever: delete it.
    """
    if shutil.which("ninja") is None:  # installed beside this Python, whose folder may not be on the path
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if shutil.which("ninja") is None or compiler is None or shutil.which(compiler) is None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logger.warning("no C++ compiler or no ninja: DeepSpeed's CPU communication op is switched off, torch's is used")
