"""A cluster's network on one machine: namespaces as nodes, shaped NICs, a network file system."""
