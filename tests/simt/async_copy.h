// cp.async: copies that arrive in shared memory only when the thread that began them waits.

#pragma once

#include "simt/types.h"

namespace simt {

void begin_copy(void* shared, const void* global, int num_bytes, int num_valid, Site site);
void commit_copies();
void wait_copies(int num_pending);

template <int kBytes>
void copy_async(void* shared, const void* global, int num_valid, Site site = Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  begin_copy(shared, global, kBytes, num_valid, site);
}

inline void copy_async_commit() { commit_copies(); }

template <int kPending>
void copy_async_wait() {
  wait_copies(kPending);
}

}  // namespace simt
