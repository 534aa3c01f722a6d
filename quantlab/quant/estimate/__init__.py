"""What a run will take before it starts: size, memory, time."""
