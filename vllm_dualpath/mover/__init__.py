"""The mover: the process that owns one engine's staging memory and moves every KV byte of it."""
