"""Every decision before any work: targets, limits, plugins, memory, ceilings, pinned versions."""
