"""FP8 calibration: sample texts, the bf16 forward pass that is watched, and the ranges that it showed."""
