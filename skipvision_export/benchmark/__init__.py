"""Whatever runs bundles to measure them: parity, accuracy, time, memory, FLOPs."""
