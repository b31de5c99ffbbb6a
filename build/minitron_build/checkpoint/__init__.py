"""The TensorRT-LLM checkpoint: its weight map, the converter that writes it, the contract it keeps."""
