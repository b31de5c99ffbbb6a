"""Door to the model; the code lies beside it as the package `minitron_runtime`."""

from minitron_runtime.preprocessing import TritonPythonModel

__all__ = ["TritonPythonModel"]
