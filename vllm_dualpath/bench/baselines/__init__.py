"""What one would run today instead, each in an environment of its own."""
