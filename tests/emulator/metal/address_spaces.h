// address_spaces.h - as much of Metal's language as attn-span.metal uses, in Clang's words, with its address spaces: a
// pointer whose space is missing or wrong does not compile.
typedef signed char    int8_t;
typedef unsigned short uint16_t, ushort;
typedef int            int32_t;
typedef unsigned int   uint32_t, uint;
typedef unsigned long  uint64_t;
typedef _Float16       half;
typedef float          float2 __attribute__((ext_vector_type(2)));
typedef float          float4 __attribute__((ext_vector_type(4)));
typedef uint           uint3 __attribute__((ext_vector_type(3)));
typedef uint           uint4 __attribute__((ext_vector_type(4)));

#define __METAL_VERSION__ 310

#define kernel
#define thread
#define device      __attribute__((address_space(1)))
#define constant    const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))

enum class mem_flags { mem_threadgroup };

void  threadgroup_barrier(mem_flags);
float simd_shuffle_xor(float, ushort);
float exp(float);

template <typename T, typename From> T as_type(From from) { return __builtin_bit_cast(T, from); }
