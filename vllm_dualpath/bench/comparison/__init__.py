"""Read modes beside each other on one shaped testbed: the same agents, interleaved, measured."""
