// Runs the threads of a block as fibers, one block after the other.
//
// A lane that waits hands over to another lane of its warp; when none of the warp can go on, the
// scheduler looks why and picks another warp. So a warp runs as far as it can before any other
// moves: unlike lock step this lets each warp meet the others' stale or half-written data.

#pragma once

#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/launch.h"
#include "simt/shadow.h"

namespace simt {

struct Warp;

// An instruction that the lanes of a warp execute together: the last of them to arrive executes it
// for all, from the words that each has left in its column of Warp::words.
struct Collective {
  const char* name;
  // All 32 lanes must execute this very instruction (.aligned), not just one of its kind.
  bool is_aligned;
  void (*execute)(Warp& warp, std::uint32_t mask);
};

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int num_bytes;
  int num_valid;
  unsigned group;
  Site site;
};

struct Thread {
  Fiber fiber;
  Warp* warp;
  unsigned id;  // linear index in the block
  unsigned lane;
  uint3 index;
  bool has_exited;
  // What it waits at, and where: a collective, or the block's barrier (null).
  const Collective* collective;
  std::uint32_t mask;
  Site site;
  std::vector<Copy> copies;
  unsigned num_groups;  // of copies, committed
};

struct Warp {
  unsigned id;
  unsigned epoch;
  std::uint32_t existing;  // lanes that the block has threads for
  std::uint32_t runnable;
  std::uint32_t at_collective;
  std::uint32_t at_barrier;
  Thread* threads;  // of lane 0
  alignas(32) std::uint32_t words[10][32];
};

class Executor {
 public:
  // Around the block's shared memory: no kernel's stray index should leave it unseen.
  static constexpr std::size_t kMaxSharedBytes = 227 * 1024;
  static constexpr std::size_t kGuardBytes = 256 * 1024;
  static constexpr std::size_t kArenaBytes = 2 * kGuardBytes + kMaxSharedBytes;

  Executor();

  void run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
           const void* context);

  Thread& current() { return *current_; }
  uint3 block_index() const { return block_index_; }
  dim3 block_dim() const { return block_dim_; }
  dim3 grid_dim() const { return grid_dim_; }
  unsigned char* shared() { return shared_; }

  // Called by the current thread, on its stack.
  void join(const Collective& collective, std::uint32_t mask, Site site);
  void join_barrier(Site site);
  void advance_warp_epoch(Warp& warp);
  void begin_copy(const Copy& copy);
  void wait_copies(int num_pending);
  // Checks an access of `thread` and remembers it. `what` is null for plain loads and stores.
  void touch(Thread& thread, const void* address, std::size_t num_bytes, Access access,
             const char* what);
  [[noreturn]] void fail(const Thread& thread, const std::string& rule, const std::string& what);

 private:
  static void enter();
  void exit_thread();
  void pause();
  void run_block(std::uint64_t linear_block);
  void start_threads();
  void run_warp(Warp& warp);
  void release_barrier();
  void complain_of_stalled(Warp& warp);
  void complain_of_barrier();
  [[noreturn]] void complain(const Thread& thread, const void* address, std::size_t num_bytes,
                             Access access, const char* what, const Conflict& conflict);
  std::size_t shared_offset(const Thread& thread, const void* address, std::size_t num_bytes,
                            const char* verb);
  Clock clock(const Thread& thread) const;
  uint3 index_of(unsigned thread) const;
  Thread& pick_lane(Warp& warp);
  std::uint32_t random();

  StackPool stacks_;
  std::vector<unsigned char> arena_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Fiber scheduler_;
  Thread* current_ = nullptr;
  std::string failure_;

  const void* kernel_ = nullptr;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  dim3 grid_dim_, block_dim_;
  uint3 block_index_ = {};
  std::uint32_t linear_block_ = 0;
  std::size_t shared_bytes_ = 0;
  unsigned char* shared_ = nullptr;
  unsigned epoch_ = 0;
  std::uint64_t random_state_ = 0;

  SharedShadow shared_shadow_;
  GlobalShadow global_shadow_;
};

// The one that runs a kernel, or null. Not of each thread: thread-local storage of libraries that
// are loaded late is scarce, and Python is full of them. Kernels run one at a time.
extern Executor* active_executor;

// "shared bytes 16..31"
std::string describe(const char* space, std::size_t offset, std::size_t num_bytes);
// " at kernel.cu:12"
std::string describe(Site site);

}  // namespace simt
