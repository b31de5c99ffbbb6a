"""Checks of any TensorRT-LLM model repository."""
