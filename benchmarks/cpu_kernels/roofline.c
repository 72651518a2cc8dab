// The two limits of a low-bit product on one thread: reading memory, and integer dot products.
// Compiled at run time with -march=native by roofline.py.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

enum { kAheadBytes = 5120, kSums = 16 };

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
typedef __m512i Vector;
static Vector load(const uint8_t* from) { return _mm512_loadu_si512(from); }
static Vector all(int byte) { return _mm512_set1_epi8((char)byte); }
static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
static Vector dot(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX2__)
typedef __m256i Vector;
static Vector load(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
static Vector all(int byte) { return _mm256_set1_epi8((char)byte); }
static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
static Vector dot(Vector sum, Vector a, Vector b) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
}
#endif

static int32_t first_lane(Vector v) {
  int32_t lanes[sizeof(Vector) / 4];
  __builtin_memcpy(lanes, &v, sizeof v);
  return lanes[0];
}

// Reads num_bytes, a multiple of 4 vectors, with the kernels' own prefetch.
int32_t read_all(const uint8_t* data, size_t num_bytes) {
  Vector sums[4] = {all(0), all(0), all(0), all(0)};
  for (size_t at = 0; at < num_bytes; at += 4 * sizeof(Vector)) {
    for (size_t line = 0; line < 4 * sizeof(Vector); line += 64)
      _mm_prefetch((const char*)data + at + kAheadBytes + line, _MM_HINT_T0);
    for (int i = 0; i < 4; i++) sums[i] = add(sums[i], load(data + at + i * sizeof(Vector)));
  }
  return first_lane(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// Multiplications of u8 by s8 that one call of dot_products(rounds) makes.
int64_t num_products(int64_t rounds) { return rounds * kSums * (int64_t)sizeof(Vector); }

int32_t dot_products(int64_t rounds) {
  Vector sums[kSums], a = all(3), b = all(5);
#pragma GCC unroll 16  // keeps the sums in registers
  for (int i = 0; i < kSums; i++) sums[i] = all(i);
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) {
      sums[i] = dot(sums[i], a, b);
      __asm__ volatile("" : "+v"(sums[i]));  // so that the loop is not folded
    }
  }
#pragma GCC unroll 16
  for (int i = 1; i < kSums; i++) sums[0] = add(sums[0], sums[i]);
  return first_lane(sums[0]);
}
