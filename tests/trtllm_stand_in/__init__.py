"""A stand-in for the package tensorrt_llm, generated from the table of facts: it refuses what the real one refuses, and simulates batches.

    write_stand_in(folder, "1.3")      a package on disk: put `folder` on PYTHONPATH of a process, such as Triton's Python stub
    stand_in("1.3")                    a context: `import tensorrt_llm` finds it in this process, and no longer afterwards

Names, fields, defaults and signatures come from the table; what the classes do (`runtime/`) is by hand, the layout of rows included.
It needs pydantic and torch on a CPU. It is no engine: states and tokens are a hash of the prefix, sampling is greedy whatever is asked.
"""

from tests.trtllm_stand_in.generate import VERSIONS, module_texts, write_stand_in
from tests.trtllm_stand_in.inside import stand_in

__all__ = ["VERSIONS", "module_texts", "stand_in", "write_stand_in"]
