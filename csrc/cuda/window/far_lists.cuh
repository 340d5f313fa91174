// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// far_lists.cuh — taps that sample out of reach of their pixels ("far"), on their way from
// dcnv4_window_grad_offset.cuh, which finds them, to dcnv4_window_grad_value.cuh, whose warps own
// the cells to which they add.
//
// A list belongs to a block of 4x4 input pixels and a group, the work of a warp at a time. A tap is
// in the list of each block that has a cell of its sample, 1 to 4, as 9 * output pixel + tap. No
// number is added in global memory, where 16 bytes of grad_value cost a reduction.
//
// A list has as much room as its block's gradient in float32: 16 D entries of 4 bytes, when the 16
// pixels have 144 taps. Where more taps than fit meet in one block, the list is full: its memory
// becomes those sums, [16 cells][D], which dcnv4_window_grad_rest.cuh clears and fills.
#pragma once

#include "dense_window.cuh"

namespace mmdcnv4 {
namespace cuda {

constexpr int32_t kTaps = 9;

struct FarLists {
  uint32_t* count;    // [N, Hb, Wb, G]: taps of each list, also those without room
  uint32_t* entries;  // [N, Hb, Wb, G][room]
  uint32_t* has_full; // one number: whether any list is full
  uint32_t blocks_h, blocks_w, groups;
  uint32_t room;      // entries of a list

  FarLists from(int64_t image) const { // for the host
    const int64_t lists = image * int64_t(blocks_h) * blocks_w * groups;
    FarLists lists_of_image = *this;
    lists_of_image.count += lists;
    lists_of_image.entries += lists * room;
    return lists_of_image;
  }
  MMDCNV4_DEVICE uint64_t list_of(uint32_t image, uint32_t block_x, uint32_t block_y,
                                  uint32_t group) const {
    return ((uint64_t(image) * blocks_h + block_y) * blocks_w + block_x) * groups + group;
  }
  MMDCNV4_DEVICE void append(uint64_t list, uint32_t entry) const {
    const uint32_t at = fetch_add(count + list, 1);
    if (at < room) {
      entries[list * room + at] = entry;
    } else {
      *has_full = 1;
    }
  }
  MMDCNV4_DEVICE bool is_full(uint64_t list) const { return count[list] > room; }
  // The sums of a full list: those of its first cell.
  MMDCNV4_DEVICE float* sums(uint64_t list) const {
    return reinterpret_cast<float*>(entries + list * room);
  }
};

// Puts a tap into the lists of the blocks that its sample meets; thread `lane` of a team of kTeam
// takes every kTeam-th of the four that there may be.
template <int kTeam>
MMDCNV4_DEVICE void list_tap(const FarLists& lists, uint32_t image, uint32_t group,
                             const Bilinear<float>& sample, uint32_t entry, uint32_t lane) {
#pragma unroll
  for (uint32_t i = 0; i < 4; i += kTeam) {
    const uint32_t corner = lane + i;
    const uint32_t left = uint32_t(sample.x0) / kBlockSide;
    const uint32_t right = uint32_t(sample.x1) / kBlockSide;
    const uint32_t top = uint32_t(sample.y0) / kBlockSide;
    const uint32_t bottom = uint32_t(sample.y1) / kBlockSide;
    // corners are clamped into the image: one that is missing shares the block of one that exists
    if (corner >= 4 || (corner % 2 != 0 && left == right) || (corner / 2 != 0 && top == bottom))
      continue;
    lists.append(lists.list_of(image, corner % 2 ? right : left, corner / 2 ? bottom : top, group),
                 entry);
  }
}

inline FarLists make_far_lists(const Dcnv4Params& p, uint32_t* counts, uint32_t* entries) {
  FarLists lists{};
  lists.has_full = counts;
  lists.count = counts + 1;
  lists.entries = entries;
  lists.blocks_h = uint32_t(window_blocks(p.height));
  lists.blocks_w = uint32_t(window_blocks(p.width));
  lists.groups = uint32_t(p.groups);
  lists.room = uint32_t(window_list_room(p));
  return lists;
}

} // namespace cuda
} // namespace mmdcnv4
