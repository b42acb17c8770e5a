// What CUDA C has beyond C++, for one block after the other on a CPU. Threads of a block are fibers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

#define CUDART_INF_F INFINITY
#define CUDART_INF double(INFINITY)
#define CUDART_NAN_F NAN

struct dim3 { unsigned x, y, z; };
struct Place { dim3 thread, block, threads, blocks; unsigned lane, count; };
extern "C" Place emulated_place;
extern "C" void emulated_yield();
extern "C" void emulated_barrier();
extern "C" uint64_t *emulated_slots();
#define threadIdx (emulated_place.thread)
#define blockIdx (emulated_place.block)
#define blockDim (emulated_place.threads)
#define gridDim (emulated_place.blocks)
inline void __syncthreads() { emulated_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulated_yield(); }
inline unsigned __activemask() { return ~0u; }

template <class T> T emulated_shuffle(T value, unsigned from) {
  uint64_t *slots = emulated_slots(), bits = 0;
  unsigned me = emulated_place.lane;
  std::memcpy(&bits, &value, sizeof value);
  slots[me] = bits;
  emulated_yield();
  bits = slots[from < emulated_place.count ? from : me];
  emulated_yield();
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> T __shfl_sync(unsigned, T v, unsigned lane, unsigned width = 32) {
  unsigned me = emulated_place.lane;
  return emulated_shuffle(v, me / width * width + lane % width);
}
template <class T> T __shfl_down_sync(unsigned, T v, unsigned by, unsigned width = 32) {
  unsigned me = emulated_place.lane;
  return emulated_shuffle(v, me % width + by < width ? me + by : me);
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by, unsigned width = 32) {
  unsigned me = emulated_place.lane;
  return emulated_shuffle(v, me % width >= by ? me - by : me);
}
template <class T> T __shfl_xor_sync(unsigned, T v, unsigned mask, unsigned = 32) {
  return emulated_shuffle(v, emulated_place.lane ^ mask);
}

#define EMULATED_VECTOR(type, name)                                                  \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                           \
  struct name##3 { type x, y, z; };                                                  \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                   \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float)
EMULATED_VECTOR(double, double)
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(unsigned, uint)
EMULATED_VECTOR(short, short)
EMULATED_VECTOR(unsigned short, ushort)
EMULATED_VECTOR(signed char, char)
EMULATED_VECTOR(unsigned char, uchar)
EMULATED_VECTOR(long, long)
EMULATED_VECTOR(long, longlong)
EMULATED_VECTOR(unsigned long, ulong)
EMULATED_VECTOR(unsigned long, ulonglong)

using std::max; using std::min; using std::isnan; using std::isinf; using std::isfinite;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanf(float x) { return std::tan(x); }
inline float __exp10f(float x) { return std::pow(10.f, x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T atomicAdd(T *p, T v) { T old = *p; *p += v; return old; }
template <class... A> void emulated_call(void (*kernel)(A...), void **values) {
  [&]<std::size_t... I>(std::index_sequence<I...>) { kernel(*(A *)values[I]...); }
  (std::index_sequence_for<A...>{});
}

#define __align__(size) alignas(size)
using half = _Float16;
using __half = half;
struct alignas(4) half2 { half x, y; };
using __half2 = half2;
inline half2 make_half2(half x, half y) { return {x, y}; }
inline float __half2float(half x) { return x; }
inline half __float2half(float x) { return half(x); }
inline half __float2half_rn(float x) { return half(x); }
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
#define EMULATED_HALF(name, function) inline half name(half x) { return half(function(float(x))); }
EMULATED_HALF(hexp, std::exp)
EMULATED_HALF(hlog, std::log)
EMULATED_HALF(hsqrt, std::sqrt)
EMULATED_HALF(hrsqrt, rsqrtf)
EMULATED_HALF(htanh, std::tanh)
EMULATED_HALF(hfloor, std::floor)
EMULATED_HALF(hceil, std::ceil)
EMULATED_HALF(hrint, std::nearbyint)
EMULATED_HALF(htrunc, std::trunc)
EMULATED_HALF(__habs, std::fabs)
EMULATED_HALF(fabsf16, std::fabs)
