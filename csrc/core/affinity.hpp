// Where our threads run.
#pragma once

namespace dualpath {

// Keeps the calling thread off the cores that the thread which started it is bound to, if this
// process may use others: vLLM binds the forward pass to cores of its own on a CPU, and a thread
// that woke up on one would take it from the forward pass, and what is in its caches.
void leave_compute_cores();

}  // namespace dualpath
