#include "simt/async_copy.h"

#include "simt/executor.h"

namespace simt {

void begin_copy(void* shared, const void* global, int num_bytes, int num_valid, Site site) {
  active_executor->begin_copy({static_cast<unsigned char*>(shared),
                               static_cast<const unsigned char*>(global), num_bytes, num_valid,
                               active_executor->current().num_groups, site});
}

void commit_copies() { ++active_executor->current().num_groups; }

void wait_copies(int num_pending) { active_executor->wait_copies(num_pending); }

}  // namespace simt
