// A bounded pool of helper threads that sleep while there is nothing to do.
#pragma once
#include <cstdint>

namespace moetier {

// Calls body(context, item) once for every item in [0, num_items), on the caller's thread and at
// most num_threads - 1 helpers, and returns when all are done. The caller never waits for a helper
// that has not started, so a busy machine costs speed but never a stall. body must not throw.
void parallel_for(int64_t num_items, int num_threads, void (*body)(const void*, int64_t),
                  const void* context);

// The same for a callable.
template <class Body>
void parallel_for(int64_t num_items, int num_threads, const Body& body) {
  parallel_for(
      num_items, num_threads,
      [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); },
      &body);
}

}  // namespace moetier
