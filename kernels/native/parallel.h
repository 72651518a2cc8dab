// A bounded pool of helper threads that sleep while there is nothing to do.
#pragma once
#include <cstdint>

namespace moetier {

// Calls body(context, item) once for every item in [0, num_items), on the caller's thread and at
// most num_threads - 1 helpers, and returns when all are done. The caller never waits for a helper
// that has not started, so a busy machine costs speed but never a stall. body must not throw.
void parallel_for(int64_t num_items, int num_threads, void (*body)(const void*, int64_t),
                  const void* context);

// From now on helpers stay on these cores, the i-th on cores[(i + 1) % num_cores], so that the
// first core is left to the caller. Callers are not moved. No effect but on Linux; a core that the
// process may not use is passed over. Throws std::bad_alloc.
void pin_helpers(const int32_t* cores, int64_t num_cores);

// parallel_for of a callable.
template <class Body>
void parallel_for(int64_t num_items, int num_threads, const Body& body) {
  parallel_for(
      num_items, num_threads,
      [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); },
      &body);
}

}  // namespace moetier
