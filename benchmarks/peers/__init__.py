"""What the side-by-side benchmarks share: environments of the peers, the process that is timed, readers, errors."""
