// The block code of kernels/block_code.py as float32: a chunk of rows at a time, written once,
// compiled for each instruction set.
#include "block_code.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "target.h"

namespace moetier {
namespace {

constexpr int kBlock = 32;
constexpr int kRowsPerChunk = 8;
constexpr int kGroup = 64;
constexpr uint8_t kPlanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 18, 24};

template <class T>
ALWAYS_INLINE T read(const uint8_t* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

// Bits of a stream, in the order of kernels/block_code.py, of which `end` words are there.
struct SignStream {
  const uint8_t* words;
  int64_t word, end;
  int bit;

  // The next `count` bits, 0 to 32, in the low end; false past the end of the words.
  ALWAYS_INLINE bool next(int count, uint32_t* bits) {
    if (count == 0) {
      *bits = 0;
      return true;
    }
    const bool crosses = bit + count > 32;
    if (word + crosses >= end) return false;
    uint64_t both = read<uint32_t>(words + 4 * word);
    if (crosses) both |= static_cast<uint64_t>(read<uint32_t>(words + 4 * word + 4)) << 32;
    *bits = static_cast<uint32_t>((both >> bit) & ((uint64_t{1} << count) - 1));
    bit += count;
    word += bit / 32;
    bit %= 32;
    return true;
  }
};

// Moves the low bits of `bits` to where `mask` has ones, from the lowest up.
template <bool HAS_PDEP>
ALWAYS_INLINE uint32_t deposit(uint32_t bits, uint32_t mask) {
  uint32_t placed = 0;
#if MOETIER_X86
  if (HAS_PDEP) {
    // Not the intrinsic: it may be inlined only where the compiler was told of the instruction.
    asm("pdepl %2, %1, %0" : "=r"(placed) : "r"(bits), "r"(mask));
    return placed;
  }
#endif
  for (; mask; mask &= mask - 1, bits >>= 1) placed |= (mask & (0 - mask)) & (0 - (bits & 1));
  return placed;
}

ALWAYS_INLINE float group_step(const MoetierBlockCode& code, int64_t row, int64_t group) {
  const float step = read<float>(code.data + 32 + 4 * row);
  if (!code.is_grouped) return step;
  const uint8_t factor = code.data[code.factors + row * (code.cols / kGroup) + group];
  return step * (static_cast<float>(16 + (factor & 15)) *
                 static_cast<float>(1 << (factor >> 4)) / 16.0f);
}

ALWAYS_INLINE int planes_of(const MoetierBlockCode& code, int64_t block) {
  const uint8_t pair = code.data[code.plane_counts + block / 2];
  return kPlanes[block % 2 ? pair >> 4 : pair & 15];
}

template <bool HAS_PDEP>
ALWAYS_INLINE bool decode_block(const MoetierBlockCode& code, const uint8_t* planes,
                                int num_planes, SignStream* signs, float step, float* out) {
  uint32_t value[kBlock] = {};
  uint32_t any = 0, bits;
  for (int plane = 0; plane < num_planes; plane++) {
    const uint32_t word = read<uint32_t>(planes + 4 * plane);
    any |= word;
    for (int i = 0; i < kBlock; i++) value[i] |= ((word >> i) & 1u) << plane;
  }
  if (!signs->next(__builtin_popcount(any), &bits)) return false;
  const uint32_t negative = deposit<HAS_PDEP>(bits, any);
  for (int i = 0; i < kBlock; i++) {
    const uint32_t sign = 0u - ((negative >> i) & 1u);
    value[i] = (value[i] ^ sign) - sign;
  }
  if (code.is_differenced)
    for (int i = 1; i < kBlock; i++) value[i] += value[i - 1];
  for (int i = 0; i < kBlock; i++)
    out[i] = static_cast<float>(static_cast<int32_t>(value[i])) * step;
  return true;
}

// False when the chunk's parts contradict one another.
template <bool HAS_PDEP>
ALWAYS_INLINE bool decode_chunk(const MoetierBlockCode& code, int64_t chunk, float* weight) {
  const int64_t row_blocks = code.cols / kBlock;
  const int64_t first_row = chunk * kRowsPerChunk;
  const int64_t end_row =
      first_row + kRowsPerChunk < code.rows ? first_row + kRowsPerChunk : code.rows;
  const int64_t num_words = (code.num_bytes - code.payload) / 4;
  const uint8_t* words = code.data + code.payload;
  const uint8_t* starts = code.data + code.chunk_starts + 8 * chunk;
  int64_t plane_word = read<uint32_t>(starts);
  const int64_t sign_word = read<uint32_t>(starts + 4);
  const int64_t end = chunk + 1 < (code.rows + kRowsPerChunk - 1) / kRowsPerChunk
                          ? read<uint32_t>(starts + 8)
                          : num_words;
  if (plane_word > sign_word || sign_word > end || end > num_words) return false;
  if (chunk == 0 && plane_word != 0) return false;
  SignStream signs{words, sign_word, end, 0};
  for (int64_t row = first_row; row < end_row; row++) {
    const float row_step = read<float>(code.data + 32 + 4 * row);
    if (!(row_step > 0.0f) || !std::isfinite(row_step)) return false;
    for (int64_t b = 0; b < row_blocks; b++) {
      const int num_planes = planes_of(code, row * row_blocks + b);
      if (plane_word + num_planes > sign_word) return false;
      const float step = group_step(code, row, b / (kGroup / kBlock));
      if (!decode_block<HAS_PDEP>(code, words + 4 * plane_word, num_planes, &signs, step,
                        weight + row * code.cols + b * kBlock))
        return false;
      plane_word += num_planes;
    }
  }
  return plane_word == sign_word;
}

bool decode_chunk_portable(const MoetierBlockCode& code, int64_t chunk, float* weight) {
  return decode_chunk<false>(code, chunk, weight);
}
#if MOETIER_X86
TARGET_AVX2 bool decode_chunk_avx2(const MoetierBlockCode& code, int64_t chunk, float* weight) {
  return decode_chunk<true>(code, chunk, weight);
}
TARGET_AVX512 bool decode_chunk_avx512(const MoetierBlockCode& code, int64_t chunk,
                                       float* weight) {
  return decode_chunk<true>(code, chunk, weight);
}
#endif

}  // namespace
}  // namespace moetier

int32_t moetier_decode_block_code(const MoetierBlockCode* code, float* weight, int32_t num_threads,
                                  int32_t isa) {
  using namespace moetier;
  auto* decode = decode_chunk_portable;
#if MOETIER_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("bmi2")) {
    if (isa == MOETIER_AVX2) decode = decode_chunk_avx2;
    if (isa == MOETIER_AVX512VNNI) decode = decode_chunk_avx512;
  }
#endif
  (void)isa;
  std::atomic<bool> is_sound{true};
  parallel_for((code->rows + kRowsPerChunk - 1) / kRowsPerChunk, num_threads, [&](int64_t chunk) {
    if (!decode(*code, chunk, weight)) is_sound = false;
  });
  if (!is_sound) return MOETIER_BLOCK_CODE_MALFORMED;
  return MOETIER_OK;
}
