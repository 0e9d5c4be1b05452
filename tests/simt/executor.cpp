#include "simt/executor.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#ifdef SIMT_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

Executor* active_executor = nullptr;

namespace {

#ifdef SIMT_RACES
constexpr bool kChecksRaces = true;
#else
constexpr bool kChecksRaces = false;  // most accesses would be missing
#endif

std::atomic<unsigned> seed = [] {
  const char* text = std::getenv("SIMT_SEED");
  return text == nullptr ? 0u : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}();

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    return "(without external linkage)";
  }
  int status;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  // "void f<64>(float*)": the return type and the parameters say nothing new.
  if (name.starts_with("void ")) name.erase(0, 5);
  int depth = 0;
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0 && !name.substr(i).starts_with("(anonymous")) {
      return name.substr(0, i);
    }
  }
  return name;
}

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

const char* verb_of(Access access) {
  switch (access) {
    case Access::kRead:
      return "reads";
    case Access::kWrite:
      return "writes";
    case Access::kAtomic:
      return "atomically changes";
  }
  return "";
}

}  // namespace

std::string describe(const char* space, std::size_t offset, std::size_t num_bytes) {
  return std::string(space) + " bytes " + std::to_string(offset) + ".." +
         std::to_string(offset + num_bytes - 1);
}

std::string describe(Site site) {
  const std::string path = site.file_name();
  return " at " + path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

Executor::Executor() : arena_(kArenaBytes + 32) {
  shared_ = arena_.data() + kGuardBytes;
  // A kernel that needs more than the alignment it may count on shall fail here.
  while (reinterpret_cast<std::uintptr_t>(shared_) % 32 != 16) ++shared_;
}

void Executor::run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
                   const void* context) {
  kernel_ = kernel;
  grid_dim_ = grid;
  block_dim_ = block;
  shared_bytes_ = shared_bytes;
  body_ = body;
  context_ = context;
  failure_.clear();
  random_state_ = 0x9e3779b97f4a7c15u * (seed + std::uint64_t{1});
  global_shadow_.start_launch();

  const std::size_t num_threads = std::size_t{block.x} * block.y * block.z;
  threads_.resize(num_threads);
  warps_.resize((num_threads + 31) / 32);
  for (std::size_t i = 0; i < num_threads; ++i) stacks_.assign(threads_[i].fiber, i);

  // The blocks in an order of the seed: any, as the device may choose any.
  const std::uint64_t num_blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::uint64_t stride = random() % num_blocks + 1;
  while (std::gcd(stride, num_blocks) != 1) ++stride;
  std::uint64_t linear_block = random() % num_blocks;
  for (std::uint64_t i = 0; i < num_blocks; ++i) {
    run_block(linear_block);
    linear_block = (linear_block + stride) % num_blocks;
  }
}

void Executor::run_block(std::uint64_t linear_block) {
  linear_block_ = static_cast<std::uint32_t>(linear_block);
  block_index_ = {static_cast<unsigned>(linear_block % grid_dim_.x),
                  static_cast<unsigned>(linear_block / grid_dim_.x % grid_dim_.y),
                  static_cast<unsigned>(linear_block / grid_dim_.x / grid_dim_.y)};
  epoch_ = 1;
#ifdef SIMT_SANITIZED
  __asan_poison_memory_region(shared_ - kGuardBytes, kGuardBytes);
  __asan_poison_memory_region(shared_ + shared_bytes_, kArenaBytes - kGuardBytes - shared_bytes_);
  __asan_unpoison_memory_region(shared_, shared_bytes_);
#endif
  std::memset(shared_, 0xff, shared_bytes_);
  shared_shadow_.start_block(kChecksRaces ? shared_bytes_ : 0);
  start_threads();

  std::vector<unsigned> ready;
  for (;;) {
    ready.resize(warps_.size());
    std::iota(ready.begin(), ready.end(), 0);
    while (!ready.empty()) {
      unsigned& chosen = ready[random() % ready.size()];
      if (warps_[chosen].runnable != 0) run_warp(warps_[chosen]);
      chosen = ready.back();
      ready.pop_back();
    }
    if (std::ranges::all_of(threads_, &Thread::has_exited)) return;
    complain_of_barrier();
    release_barrier();
  }
}

void Executor::start_threads() {
  for (Warp& warp : warps_) {
    warp.id = static_cast<unsigned>(&warp - warps_.data());
    warp.threads = &threads_[warp.id * 32];
    const std::size_t num_lanes = std::min<std::size_t>(32, threads_.size() - warp.id * 32);
    warp.existing = num_lanes == 32 ? 0xffffffff : (1u << num_lanes) - 1;
    warp.runnable = warp.existing;
    warp.at_collective = 0;
    warp.at_barrier = 0;
    warp.epoch = 0;
  }
  for (unsigned id = 0; id < threads_.size(); ++id) {
    Thread& thread = threads_[id];
    thread.id = id;
    thread.lane = id % 32;
    thread.warp = &warps_[id / 32];
    thread.index = index_of(id);
    thread.has_exited = false;
    thread.collective = nullptr;
    thread.copies.clear();
    thread.num_groups = 0;
    prepare(thread.fiber, &Executor::enter);
  }
}

void Executor::run_warp(Warp& warp) {
  current_ = &pick_lane(warp);
  switch_fiber(scheduler_, current_->fiber);
  current_ = nullptr;
  if (!failure_.empty()) {
    stacks_.forget_poison();
    throw std::runtime_error(failure_);
  }
  if (warp.at_collective != 0) complain_of_stalled(warp);
}

void Executor::enter() {
  Executor& executor = *active_executor;
  arrive(executor.scheduler_);
  try {
    executor.body_(executor.context_);
  } catch (const std::exception& error) {
    executor.fail(executor.current(), "exception", error.what());
  }
  executor.exit_thread();
}

void Executor::exit_thread() {
  Thread& thread = current();
  if (!thread.copies.empty()) {
    fail(thread, "unfinished copy",
         "ends without waiting for the cp.async begun" + describe(thread.copies.front().site));
  }
  thread.has_exited = true;
  Warp& warp = *thread.warp;
  warp.runnable &= ~(1u << thread.lane);
  if (warp.runnable == 0) leave_fiber(thread.fiber, scheduler_);
  current_ = &pick_lane(warp);
  leave_fiber(thread.fiber, current_->fiber);
}

void Executor::pause() {
  Thread& thread = current();
  Warp& warp = *thread.warp;
  warp.runnable &= ~(1u << thread.lane);
  if (warp.runnable == 0) {
    switch_fiber(thread.fiber, scheduler_);
  } else {
    current_ = &pick_lane(warp);
    switch_fiber(thread.fiber, current_->fiber);
  }
}

Thread& Executor::pick_lane(Warp& warp) {
  const unsigned start = random() % 32;
  const unsigned distance = std::countr_zero(std::rotr(warp.runnable, static_cast<int>(start)));
  return warp.threads[(start + distance) % 32];
}

void Executor::join(const Collective& collective, std::uint32_t mask, Site site) {
  Thread& thread = current();
  Warp& warp = *thread.warp;
  if ((mask >> thread.lane & 1) == 0) {
    fail(thread, "wrong mask",
         std::string("calls ") + collective.name + describe(site) +
             " with a mask that leaves its own lane out");
  }
  if (collective.is_aligned && warp.existing != 0xffffffff) {
    fail(thread, "divergent collective",
         std::string("calls ") + collective.name + describe(site) + " in a warp of less than 32");
  }
  mask &= warp.existing;
  thread.collective = &collective;
  thread.mask = mask;
  thread.site = site;
  warp.at_collective |= 1u << thread.lane;
  bool is_complete = (warp.at_collective & mask) == mask;
  for (unsigned lane = 0; is_complete && lane < 32; ++lane) {
    const Thread& other = warp.threads[lane];
    if ((mask >> lane & 1) == 0) continue;
    is_complete = other.collective == &collective && other.mask == mask &&
                  (!collective.is_aligned || other.site.line() == site.line());
  }
  if (!is_complete) return pause();
  collective.execute(warp, mask);
  warp.at_collective &= ~mask;
  warp.runnable |= mask;
}

void Executor::join_barrier(Site site) {
  Thread& thread = current();
  thread.collective = nullptr;
  thread.site = site;
  thread.warp->at_barrier |= 1u << thread.lane;
  pause();
}

void Executor::release_barrier() {
  for (Warp& warp : warps_) {
    warp.runnable = warp.existing;
    warp.at_barrier = 0;
    warp.epoch = 0;
  }
  if (++epoch_ > Stamp::kMaxEpoch) {
    epoch_ = 1;
    shared_shadow_.renew_epoch();
    global_shadow_.renew_epoch();
  }
}

void Executor::advance_warp_epoch(Warp& warp) {
  if (++warp.epoch <= Stamp::kMaxWarpEpoch) return;
  warp.epoch = 1;
  shared_shadow_.renew_warp_epoch(clock(warp.threads[0]));
  global_shadow_.renew_warp_epoch(clock(warp.threads[0]));
}

// Some lane waits at a collective, and no lane of the warp can go on.
void Executor::complain_of_stalled(Warp& warp) {
  const Thread& waiting = warp.threads[std::countr_zero(warp.at_collective)];
  const auto is_missing = [&](const Thread& other) {
    if (other.has_exited || (warp.at_barrier >> other.lane & 1) != 0) return true;
    return other.collective != waiting.collective || other.mask != waiting.mask ||
           (waiting.collective->is_aligned && other.site.line() != waiting.site.line());
  };
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Thread& other = warp.threads[lane];
    if ((waiting.mask >> lane & 1) == 0 || !is_missing(other)) continue;
    std::string why = "has exited";
    if (!other.has_exited) {
      const bool at_barrier = warp.at_barrier >> lane & 1;
      why = std::string("waits at ") + (at_barrier ? "__syncthreads" : other.collective->name) +
            describe(other.site);
      if (!at_barrier && other.mask != waiting.mask) why += " with another mask";
    }
    return fail(waiting, "divergent collective",
                std::string("waits at ") + waiting.collective->name + describe(waiting.site) +
                    " for thread " + describe(other.index) + ", which " + why);
  }
  fail(waiting, "deadlock",
       std::string("waits at ") + waiting.collective->name + describe(waiting.site));
}

// Every thread has exited or waits at the block's barrier: is that so for all, at the same one?
void Executor::complain_of_barrier() {
  const Thread& waiting = *std::ranges::find(threads_, false, &Thread::has_exited);
  for (const Thread& other : threads_) {
    if (!other.has_exited && other.site.line() == waiting.site.line()) continue;
    const std::string why =
        other.has_exited ? "has exited" : "waits at __syncthreads" + describe(other.site);
    fail(waiting, "divergent barrier",
         "waits at __syncthreads" + describe(waiting.site) + " for thread " +
             describe(other.index) + ", which " + why);
  }
}

std::size_t Executor::shared_offset(const Thread& thread, const void* address,
                                    std::size_t num_bytes, const char* verb) {
  const auto offset = static_cast<const unsigned char*>(address) - shared_;
  if (offset >= 0 && offset + num_bytes <= shared_bytes_) return static_cast<std::size_t>(offset);
  fail(thread, "out of bounds",
       std::string(verb) + " " + std::to_string(num_bytes) + " bytes at offset " +
           std::to_string(offset) + " of " + std::to_string(shared_bytes_) +
           " bytes of shared memory");
}

void Executor::touch(Thread& thread, const void* address, std::size_t num_bytes, Access access,
                     const char* what) {
  const auto* bytes = static_cast<const unsigned char*>(address);
  std::optional<Conflict> conflict;
  if (static_cast<std::uintptr_t>(bytes - (shared_ - kGuardBytes)) < kArenaBytes) {
    const std::size_t offset =
        shared_offset(thread, address, num_bytes, what == nullptr ? verb_of(access) : what);
    if (!kChecksRaces) return;
    conflict = shared_shadow_.access(offset, num_bytes, access, clock(thread));
  } else {
    if (!kChecksRaces || stacks_.contains(address)) return;
    conflict = global_shadow_.access(reinterpret_cast<std::uintptr_t>(address), num_bytes, access,
                                     clock(thread));
  }
  if (conflict) complain(thread, address, num_bytes, access, what, *conflict);
}

void Executor::complain(const Thread& thread, const void* address, std::size_t num_bytes,
                        Access access, const char* what, const Conflict& conflict) {
  const auto offset =
      static_cast<std::size_t>(static_cast<const unsigned char*>(address) - shared_);
  char global[32];
  std::snprintf(global, sizeof(global), "global address %p", address);
  const std::string where =
      offset < shared_bytes_ ? describe("shared", offset, num_bytes) : std::string(global);
  const std::string who = (conflict.other_block ? "a thread of another block"
                                                : "thread " + describe(index_of(conflict.thread)));
  const std::string how = conflict.in_flight ? "copies to by a cp.async not yet waited for"
                          : conflict.wrote   ? "wrote with no barrier between"
                                             : "read with no barrier between";
  fail(thread, conflict.in_flight ? "copy in flight" : "data race",
       std::string(what == nullptr ? verb_of(access) : what) + " " + where + ", which " + who +
           " " + how);
}

void Executor::begin_copy(const Copy& copy) {
  Thread& thread = current();
  const auto misaligned = [&](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % copy.num_bytes != 0;
  };
  if (misaligned(copy.shared) || misaligned(copy.global)) {
    fail(thread, "misaligned",
         "begins a cp.async" + describe(copy.site) + " whose " +
             (misaligned(copy.shared) ? "destination" : "source") + " is not aligned to " +
             std::to_string(copy.num_bytes) + " bytes");
  }
  if (copy.num_valid < 0 || copy.num_valid > copy.num_bytes) {
    fail(thread, "wrong size",
         "begins a cp.async" + describe(copy.site) + " of " + std::to_string(copy.num_bytes) +
             " bytes with " + std::to_string(copy.num_valid) + " valid");
  }
  const std::size_t offset =
      shared_offset(thread, copy.shared, copy.num_bytes, "begins a cp.async of");
  if (kChecksRaces) {
    if (const auto conflict = shared_shadow_.begin_copy(offset, copy.num_bytes, clock(thread))) {
      complain(thread, copy.shared, copy.num_bytes, Access::kWrite,
               "begins a cp.async that overwrites", *conflict);
    }
  }
  // Whoever does not wait shall compute with NaN.
  std::memset(copy.shared, 0xff, copy.num_bytes);
  thread.copies.push_back(copy);
}

void Executor::wait_copies(int num_pending) {
  Thread& thread = current();
  const auto has_arrived = [&](const Copy& copy) {
    return copy.group + num_pending < thread.num_groups;
  };
  // Groups arrive in their order.
  const auto end = std::ranges::find_if_not(thread.copies, has_arrived);
  for (auto copy = thread.copies.begin(); copy != end; ++copy) {
#ifdef SIMT_SANITIZED
    if (__asan_region_is_poisoned(const_cast<unsigned char*>(copy->global), copy->num_valid)) {
      fail(thread, "out of bounds",
           "reads global memory that is not allocated, by the cp.async" + describe(copy->site));
    }
#endif
    if (copy->num_valid > 0) {
      touch(thread, copy->global, copy->num_valid, Access::kRead, "reads, by cp.async,");
    }
    std::memcpy(copy->shared, copy->global, copy->num_valid);
    std::memset(copy->shared + copy->num_valid, 0, copy->num_bytes - copy->num_valid);
    if (kChecksRaces) {
      shared_shadow_.end_copy(copy->shared - shared_, copy->num_bytes, clock(thread));
    }
  }
  thread.copies.erase(thread.copies.begin(), end);
}

void Executor::fail(const Thread& thread, const std::string& rule, const std::string& what) {
  failure_ = "simt: " + rule + ": kernel " + name_of(kernel_) + ", block " +
             describe(block_index_) + ", thread " + describe(thread.index) + ": " + what;
  if (current_ == nullptr) {
    stacks_.forget_poison();
    throw std::runtime_error(failure_);
  }
  // No exception: it would have to pass through the kernel's frames, and some of the calls in them
  // (the hooks) are known not to throw.
  leave_fiber(current_->fiber, scheduler_);
}

Clock Executor::clock(const Thread& thread) const {
  return {linear_block_, epoch_, thread.warp->epoch, thread.id};
}

uint3 Executor::index_of(unsigned thread) const {
  return {thread % block_dim_.x, thread / block_dim_.x % block_dim_.y,
          thread / block_dim_.x / block_dim_.y};
}

std::uint32_t Executor::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<std::uint32_t>(random_state_ >> 32);
}

void set_seed(unsigned value) { seed = value; }

cudaError_t run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
                const void* context) {
  const std::uint64_t num_threads = std::uint64_t{block.x} * block.y * block.z;
  const bool grid_fits = grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y <= 65535 &&
                         grid.z >= 1 && grid.z <= 65535;
  const bool block_fits = num_threads >= 1 && num_threads <= 1024 && block.z <= 64;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  if (shared_bytes > Executor::kMaxSharedBytes) return cudaErrorInvalidValue;
  if (active_executor != nullptr) throw std::logic_error("simt: a kernel may not launch another");

  static Executor executor;
  struct Activation {
    Activation() { active_executor = &executor; }
    ~Activation() { active_executor = nullptr; }
  } activation;
  executor.run(kernel, grid, block, shared_bytes, body, context);
  return cudaSuccess;
}

uint3 thread_index() { return active_executor->current().index; }
uint3 block_index() { return active_executor->block_index(); }
dim3 block_dim() { return active_executor->block_dim(); }
dim3 grid_dim() { return active_executor->grid_dim(); }
unsigned char* dynamic_shared() { return active_executor->shared(); }

void trap(Site site) {
  active_executor->fail(active_executor->current(), "trap", "calls __trap" + describe(site));
}

}  // namespace simt

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unknown error";
}

extern "C" void simt_set_seed(unsigned seed) { simt::set_seed(seed); }
