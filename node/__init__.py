"""The muscle: loading layers, running a stage, the conductor, the ring, the sampler."""
