#include "simt/shadow.h"

#include <algorithm>

namespace simt {
namespace {

Conflict conflict_with(Stamp earlier, bool wrote) {
  return {earlier.thread(), wrote, earlier.is_in_flight(), false};
}

// Whether the stamps of an access of the usual sizes are all one: then one look decides for all.
template <std::size_t kNum>
bool all_equal(const Stamp* stamps) {
  std::uint32_t differences = 0;
  for (std::size_t i = 0; i < kNum; ++i) differences |= stamps[i].bits() ^ stamps[0].bits();
  return differences == 0;
}

std::size_t length_of_run(const Stamp* stamps, std::size_t num) {
  if (num == 16 && all_equal<16>(stamps)) return 16;
  if (num == 4 && all_equal<4>(stamps)) return 4;
  std::size_t length = 1;
  while (length < num && stamps[length] == stamps[0]) ++length;
  return length;
}

void fill(Stamp* stamps, std::size_t num, Stamp stamp) {
  if (num == 16) {
    std::fill_n(stamps, 16, stamp);
  } else {
    std::fill_n(stamps, num, stamp);
  }
}

// Calls visit(stamp, first, length) for each run of equal stamps, until one returns a conflict.
template <typename Visit>
std::optional<Conflict> for_each_run(Stamp* stamps, std::size_t num, const Visit& visit) {
  while (num > 0) {
    const std::size_t length = length_of_run(stamps, num);
    if (const std::optional<Conflict> conflict = visit(*stamps, stamps, length)) return conflict;
    stamps += length;
    num -= length;
  }
  return std::nullopt;
}

}  // namespace

void SharedShadow::start_block(std::size_t num_bytes) {
  writes_.assign(num_bytes, Stamp());
  reads_.assign(num_bytes, Stamp());
}

std::optional<Conflict> SharedShadow::access(std::size_t offset, std::size_t num_bytes,
                                             Access access, const Clock& now) {
  const auto after_writes = [&](Stamp last, Stamp* first,
                                std::size_t length) -> std::optional<Conflict> {
    const bool both_atomic = access == Access::kAtomic && last.is_atomic();
    if (!both_atomic && !last.is_ordered(now)) return conflict_with(last, true);
    if (access == Access::kWrite) fill(first, length, Stamp::of(now, false));
    if (access == Access::kAtomic) fill(first, length, last.joined(now, true));
    return std::nullopt;
  };
  const auto after_reads = [&](Stamp last, Stamp* first,
                               std::size_t length) -> std::optional<Conflict> {
    if (access == Access::kRead) {
      const Stamp joined = last.joined(now, false);
      if (joined != last) fill(first, length, joined);
    } else if (!last.is_ordered(now)) {
      return conflict_with(last, false);
    }
    return std::nullopt;
  };
  if (const auto conflict = for_each_run(writes_.data() + offset, num_bytes, after_writes)) {
    return conflict;
  }
  return for_each_run(reads_.data() + offset, num_bytes, after_reads);
}

std::optional<Conflict> SharedShadow::begin_copy(std::size_t offset, std::size_t num_bytes,
                                                 const Clock& now) {
  const auto conflict = access(offset, num_bytes, Access::kWrite, now);
  if (!conflict) fill(writes_.data() + offset, num_bytes, Stamp::in_flight(now.thread));
  return conflict;
}

void SharedShadow::end_copy(std::size_t offset, std::size_t num_bytes, const Clock& now) {
  fill(writes_.data() + offset, num_bytes, Stamp::of(now, false));
}

void SharedShadow::renew_epoch() {
  for (Stamp& stamp : writes_) stamp.renew_epoch();
  for (Stamp& stamp : reads_) stamp.renew_epoch();
}

void SharedShadow::renew_warp_epoch(const Clock& now) {
  for (Stamp& stamp : writes_) stamp.renew_warp_epoch(now);
  for (Stamp& stamp : reads_) stamp.renew_warp_epoch(now);
}

GlobalShadow::Page::Page() { std::fill_n(blocks, kPageBytes, kNobody); }

void GlobalShadow::start_launch() {
  pages_.clear();
  std::fill_n(cache_, kCacheLines, CacheLine());
}

GlobalShadow::Page* GlobalShadow::find(std::uintptr_t number) {
  CacheLine& line = cache_[number % kCacheLines];
  if (line.number != number) {
    const auto found = pages_.find(number);
    line = {number, found == pages_.end() ? nullptr : found->second.get()};
  }
  return line.page;
}

GlobalShadow::Page& GlobalShadow::make(std::uintptr_t number) {
  if (Page* page = find(number)) return *page;
  auto& slot = pages_[number];
  slot = std::make_unique<Page>();
  cache_[number % kCacheLines] = {number, slot.get()};
  return *slot;
}

std::optional<Conflict> GlobalShadow::access(std::uintptr_t address, std::size_t num_bytes,
                                             Access access, const Clock& now) {
  while (num_bytes > 0) {
    const std::size_t at = address % kPageBytes;
    const std::size_t num_here = std::min(num_bytes, kPageBytes - at);
    const std::uintptr_t number = address / kPageBytes;
    Page* page = access == Access::kRead ? find(number) : &make(number);
    for (std::size_t i = 0; page != nullptr && i < num_here; ++i) {
      if (const auto conflict = access_byte(*page, at + i, access, now)) return conflict;
    }
    address += num_here;
    num_bytes -= num_here;
  }
  return std::nullopt;
}

std::optional<Conflict> GlobalShadow::access_byte(Page& page, std::size_t at, Access access,
                                                  const Clock& now) {
  Stamp& last = page.writes[at];
  std::uint32_t& block = page.blocks[at];
  const bool other_block = block != kNobody && block != now.block;
  const bool both_atomic = access == Access::kAtomic && last.is_atomic();
  if (!both_atomic && block != kNobody && (other_block || !last.is_ordered(now))) {
    Conflict conflict = conflict_with(last, true);
    conflict.other_block = other_block;
    return conflict;
  }
  if (access == Access::kWrite) {
    last = Stamp::of(now, false);
    block = now.block;
  } else if (access == Access::kAtomic) {
    last = last.joined(now, true);
    block = other_block ? kManyBlocks : now.block;
  }
  return std::nullopt;
}

void GlobalShadow::renew_epoch() {
  for (auto& [number, page] : pages_) {
    for (Stamp& stamp : page->writes) stamp.renew_epoch();
  }
}

void GlobalShadow::renew_warp_epoch(const Clock& now) {
  for (auto& [number, page] : pages_) {
    for (std::size_t i = 0; i < kPageBytes; ++i) {
      if (page->blocks[i] == now.block) page->writes[i].renew_warp_epoch(now);
    }
  }
}

}  // namespace simt
