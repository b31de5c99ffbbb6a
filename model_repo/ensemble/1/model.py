"""Door to the model; the code lies beside it as the package `minitron_runtime`."""

from minitron_runtime.tensorrt_llm_bls import TritonPythonModel

__all__ = ["TritonPythonModel"]
