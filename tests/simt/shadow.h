// Who touched which byte last, and whether a barrier stands between: how data races are found.
//
// Two accesses of which one writes race unless they are one thread's, or both atomic, or ordered:
// by __syncthreads within the block, by __syncwarp within the warp, by nothing between blocks.
// Ordering is remembered, not observed, so a race is found whatever the order of execution was.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

namespace simt {

enum class Access { kRead, kWrite, kAtomic };

// Where a thread stands among the barriers of its block.
struct Clock {
  std::uint32_t block;       // linear index in the grid
  std::uint32_t epoch;       // 1 + barriers of the block so far
  std::uint32_t warp_epoch;  // barriers of the warp since the last one of the block
  std::uint32_t thread;      // linear index in the block
};

// An earlier access that the new one is not ordered after.
struct Conflict {
  std::uint32_t thread;
  bool wrote;
  bool in_flight;    // a cp.async that its thread has not waited for
  bool other_block;  // `thread` is one of another block
};

// 32 bits: epoch 11, warp epoch 8, atomic 1, scope 2, thread 10. 0 is no access at all.
class Stamp {
 public:
  static constexpr std::uint32_t kMaxEpoch = 2046;
  static constexpr std::uint32_t kMaxWarpEpoch = 255;

  constexpr Stamp() = default;
  static Stamp of(const Clock& clock, bool atomic) {
    return Stamp(clock.epoch << 21 | clock.warp_epoch << 13 | std::uint32_t{atomic} << 12 |
                 clock.thread);
  }
  static Stamp in_flight(std::uint32_t thread) { return Stamp(kInFlight << 21 | thread); }

  bool operator==(const Stamp&) const = default;
  std::uint32_t bits() const { return bits_; }
  std::uint32_t thread() const { return bits_ & 0x3ff; }
  std::uint32_t epoch() const { return bits_ >> 21; }
  bool is_atomic() const { return bits_ >> 12 & 1; }
  bool is_in_flight() const { return epoch() == kInFlight; }

  // Whether what this stamp stands for comes before all that `now` does.
  bool is_ordered(const Clock& now) const {
    if (epoch() != now.epoch) return !is_in_flight();
    if (scope() == kThread && thread() == now.thread) return true;
    return scope() != kBlock && thread() / 32 == now.thread / 32 && warp_epoch() < now.warp_epoch;
  }

  // This access and one at `now`, as one stamp. Of several threads it keeps only whether they are
  // of one warp: whoever comes later is unordered with the same ones.
  Stamp joined(const Clock& now, bool atomic) const {
    const Stamp fresh = of(now, atomic);
    if (is_ordered(now)) return fresh;
    const bool one_warp = scope() != kBlock && thread() / 32 == now.thread / 32;
    return Stamp(fresh.bits_ | (one_warp ? kWarp : kBlock) << 10);
  }

  // The counters of epochs are about to start again: what they order must not look new.
  void renew_epoch() {
    if (!is_in_flight()) bits_ &= 0x1fffff;
  }
  void renew_warp_epoch(const Clock& now) {
    if (epoch() == now.epoch && scope() != kBlock && thread() / 32 == now.thread / 32) {
      bits_ &= ~(0xffu << 13);
    }
  }

 private:
  enum Scope : std::uint32_t { kThread, kWarp, kBlock };
  static constexpr std::uint32_t kInFlight = 2047;

  explicit constexpr Stamp(std::uint32_t bits) : bits_(bits) {}
  std::uint32_t warp_epoch() const { return bits_ >> 13 & 0xff; }
  std::uint32_t scope() const { return bits_ >> 10 & 3; }

  std::uint32_t bits_ = 0;
};

class SharedShadow {
 public:
  void start_block(std::size_t num_bytes);

  std::optional<Conflict> access(std::size_t offset, std::size_t num_bytes, Access access,
                                 const Clock& now);
  // From begin_copy to end_copy no thread may touch the bytes.
  std::optional<Conflict> begin_copy(std::size_t offset, std::size_t num_bytes, const Clock& now);
  void end_copy(std::size_t offset, std::size_t num_bytes, const Clock& now);

  void renew_epoch();
  void renew_warp_epoch(const Clock& now);

 private:
  std::vector<Stamp> writes_, reads_;  // a stamp for each byte
};

// Writes only, and reads of what was written: an input costs nothing, but a read that comes before
// the write of another block is not seen.
class GlobalShadow {
 public:
  void start_launch();

  std::optional<Conflict> access(std::uintptr_t address, std::size_t num_bytes, Access access,
                                 const Clock& now);

  void renew_epoch();
  void renew_warp_epoch(const Clock& now);

 private:
  static constexpr std::size_t kPageBytes = 4096;
  static constexpr std::size_t kCacheLines = 256;
  static constexpr std::uint32_t kNobody = 0xffffffff;
  static constexpr std::uint32_t kManyBlocks = 0xfffffffe;  // atomics

  struct Page {
    Page();
    Stamp writes[kPageBytes];
    std::uint32_t blocks[kPageBytes];
  };
  struct CacheLine {
    std::uintptr_t number = 0;
    Page* page = nullptr;
  };

  Page* find(std::uintptr_t number);
  Page& make(std::uintptr_t number);
  static std::optional<Conflict> access_byte(Page& page, std::size_t at, Access access,
                                             const Clock& now);

  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
  CacheLine cache_[kCacheLines];
};

}  // namespace simt
