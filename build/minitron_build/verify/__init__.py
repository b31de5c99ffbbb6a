"""Whether a checkpoint or a bundle is good enough: measured against its source, judged by thresholds."""
