"""The engine: `trtllm-build` as a child process, its checks before and its directory read back after."""
