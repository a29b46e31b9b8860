"""What ``vllm-dualpath doctor`` looks at: one module a subject, each check a function."""
