// Vectors, their exponential and logarithm, and how they are loaded and stored.

namespace NAMESPACE {
namespace {

template <class F> struct Bits;
template <> struct Bits<float> {
    using Signed = int32_t;
    using Unsigned = uint32_t;
};
template <> struct Bits<double> {
    using Signed = int64_t;
    using Unsigned = uint64_t;
};

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct Bool {
    uint8_t byte;  // Any but 0 is true.
};

template <class F> struct Vectors {
    static constexpr int W = BYTES / sizeof(F);
    typedef F V __attribute__((vector_size(BYTES)));
    typedef typename Bits<F>::Signed I __attribute__((vector_size(BYTES)));
    typedef typename Bits<F>::Unsigned U __attribute__((vector_size(BYTES)));

    // For unaligned access. A memcpy would count as an alias of everything.
    typedef V Stored __attribute__((aligned(sizeof(F))));
    typedef I StoredI __attribute__((aligned(sizeof(F))));
    typedef uint16_t H __attribute__((vector_size(2 * W)));
    typedef H StoredH __attribute__((aligned(2)));

    static INLINE V load(const F *from) { return *(const Stored *)from; }
    static INLINE V load(const Bfloat16 *from) { return (V)(load_bits(from) << 16); }
    // Elements as they are, in lanes. By intrinsics, since GCC splits a conversion of 64 bytes.
    static INLINE U load_bits(const F *from) { return (U)load(from); }
    static INLINE U load_bits(const Bfloat16 *from) {
#if defined(__x86_64__) && BYTES == 64
        return (U)_mm512_cvtepu16_epi32(*(const __m256i_u *)from);
#else
        return __builtin_convertvector(*(const StoredH *)from, U);
#endif
    }
    static INLINE void store_bits(F *to, U bits) { store(to, (V)bits); }
    static INLINE void store_bits(Bfloat16 *to, U bits) {
#if defined(__x86_64__) && BYTES == 64
        *(__m256i_u *)to = _mm512_cvtepi32_epi16((__m512i)bits);
#else
        *(StoredH *)to = __builtin_convertvector(bits, H);
#endif
    }
    // Turns rows into columns: each step rotates the bits of a lane's row and column by one.
    static INLINE void transpose(U (&rows)[W]) {
#ifndef __clang__
        U low, high;
        for (int k = 0; k < W; k++) low[k] = k / 2 + k % 2 * W, high[k] = low[k] + W / 2;
#endif
#pragma GCC unroll 4
        for (int step = 1; step < W; step *= 2) {
            U next[W];
#pragma GCC unroll 8
            for (int r = 0; r < W / 2; r++) {
                const U a = rows[r], b = rows[r + W / 2];
#ifdef __clang__
                for (int k = 0; k < W; k++) {
                    next[2 * r][k] = k % 2 ? b[k / 2] : a[k / 2];
                    next[2 * r + 1][k] = k % 2 ? b[(k + W) / 2] : a[(k + W) / 2];
                }
#else
                next[2 * r] = __builtin_shuffle(a, b, low);
                next[2 * r + 1] = __builtin_shuffle(a, b, high);
#endif
            }
#pragma GCC unroll 16
            for (int r = 0; r < W; r++) rows[r] = next[r];
        }
    }
    static INLINE I load(const typename Bits<F>::Signed *from) { return *(const StoredI *)from; }
    static INLINE void store(F *to, V value) { *(Stored *)to = value; }
    static INLINE void store(Bfloat16 *to, V value) { *(StoredH *)to = to_bfloat16(value); }
    // To bfloat16: to the nearest, ties to even.
    static INLINE H to_bfloat16(V value) {
#if defined(__x86_64__) && BYTES == 64
        const __m512i bits = (__m512i)value, half = _mm512_set1_epi32(0x7fff);
        const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
        const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
        __m512i rounded = _mm512_add_epi32(bits, half);
        rounded = _mm512_mask_add_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(1));
        rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
        typedef short Halves __attribute__((vector_size(64)));
        constexpr Halves upper = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
        return (H)_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)upper, rounded));
#else
        U bits = (U)value;
        bits = value == value ? bits + (((bits >> 16) & 1) + 0x7fff) : bits | 0x400000;
        return __builtin_convertvector(bits >> 16, H);
#endif
    }
    // To an aligned place, past the cache; `end_streams` orders what follows after it.
    static INLINE void stream(F *to, V value) {
#if defined(__clang__)
        __builtin_nontemporal_store(value, (V *)to);
#elif defined(__x86_64__) && BYTES == 64
        _mm512_stream_ps((float *)to, (__m512)value);
#elif defined(__x86_64__) && BYTES == 32
        _mm256_stream_ps((float *)to, (__m256)value);
#elif defined(__x86_64__)
        _mm_stream_ps((float *)to, (__m128)value);
#else
        store(to, value);
#endif
    }
    static INLINE void stream(Bfloat16 *to, V value) {
#if defined(__clang__)
        __builtin_nontemporal_store(to_bfloat16(value), (H *)to);
#elif defined(__x86_64__) && BYTES == 64
        _mm256_stream_si256((__m256i *)to, (__m256i)to_bfloat16(value));
#elif defined(__x86_64__) && BYTES == 32
        _mm_stream_si128((__m128i *)to, (__m128i)to_bfloat16(value));
#else
        store(to, value);
#endif
    }
    static void end_streams() { std::atomic_thread_fence(std::memory_order_seq_cst); }
    static INLINE V splat(F value) { return V{} + value; }
    static INLINE I lanes() {
        I value;
        for (int k = 0; k < W; k++) value[k] = k;
        return value;
    }
    static INLINE V max(V a, V b) { return a > b ? a : b; }  // max(NaN, b) = b.
    static INLINE V shuffled(V value, I from) {
#ifdef __clang__
        V result;
        for (int k = 0; k < W; k++) result[k] = value[from[k] & (W - 1)];
        return result;
#else
        return __builtin_shuffle(value, from);
#endif
    }
    static INLINE F reduce_add(V value) {
#pragma GCC unroll 4
        for (int half = W / 2; half; half /= 2) value += shuffled(value, lanes() + half);
        return value[0];
    }
    static INLINE F reduce_max(V value) {
#pragma GCC unroll 4
        for (int half = W / 2; half; half /= 2)
            value = max(value, shuffled(value, lanes() + half));
        return value[0];
    }
};

// ---- Exponential and logarithm

// Polynomials interpolate at Chebyshev's nodes: (eʳ − 1 − r) / r² for |r| ≤ ½ log 2; for
// √½ ≤ 1 + f < √2 and s = f / (2 + f), (log(1 + f) − f + ½ f²) / f³ in float and, where that would
// need twice as many terms, (2 artanh s − 2 s) / s³ in s². The first part of log 2 has so few bits
// that its product with an exponent is exact.
template <class F> struct Constants;
template <> struct Constants<float> {
    static constexpr float EXP[] = {0.00139269268f, 0.00836377405f, 0.0416665487f, 0.166665733f,
                                    0.5f};
    static constexpr float LOG[] = {0.0697161183f,  -0.114797339f, 0.116854198f,
                                    -0.124256872f,  0.142490581f,  -0.166678026f,
                                    0.200007156f,   -0.24999997f,  0.333333313f};
    static constexpr float LOG2_HIGH = 0.693359375f, LOG2_LOW = -2.12194440e-4f;
    static constexpr float LEAST = -104.0f;  // Where exp is 0.
    static constexpr float INTEGER = 12582912.0f;  // 1.5·2²³: a sum with it is rounded to integers.
    static constexpr float TINY = 0x1p-126f, SCALE = 0x1p23f, EXPONENT = 0x1p23f;
    static constexpr float UNSHIFT = 0x1p-64f;
    static constexpr int MANTISSA = 23, BIAS = 127, SHIFT = 64;
    static constexpr uint32_t ONE = 0x3f800000, SQRT_HALF = 0x3f3504f3, EXPONENT_BITS = 0x4b000000;
};
template <> struct Constants<double> {
    static constexpr double EXP[] = {
        2.510134692835034e-08, 2.7621338669142925e-07, 2.75572664186123e-06, 2.4801518641395993e-05,
        0.00019841269864380513, 0.0013888888918939168, 0.008333333333329793, 0.04166666666662064,
        0.16666666666666669, 0.5};
    static constexpr double LOG[] = {
        0.1463003136412286, 0.15330617306743305, 0.18182922513515942, 0.22222210674238516,
        0.28571428628810996, 0.3999999999989322, 0.666666666666667};
    static constexpr double LOG2_HIGH = 6.93147180369123816490e-01;
    static constexpr double LOG2_LOW = 1.90821492927058770002e-10;
    static constexpr double LEAST = -746.0;
    static constexpr double INTEGER = 6755399441055744.0;
    static constexpr double TINY = 0x1p-1022, SCALE = 0x1p52, EXPONENT = 0x1p52;
    static constexpr double UNSHIFT = 0x1p-512;
    static constexpr int MANTISSA = 52, BIAS = 1023, SHIFT = 512;
    static constexpr uint64_t ONE = 0x3ff0000000000000, SQRT_HALF = 0x3fe6a09e667f3bcd,
                              EXPONENT_BITS = 0x4330000000000000;
};

// c₀ xⁿ + c₁ xⁿ⁻¹ + … by Estrin's scheme, whose chain of dependencies is shorter than Horner's.
template <int N, class V> INLINE V in_pairs(V x, const V *c) {
    if constexpr (N == 1) {
        return c[0];
    } else {
        constexpr int odd = N % 2;
        V pairs[N / 2 + odd];
        pairs[0] = c[0];
#pragma GCC unroll 16
        for (int k = odd; k < N / 2 + odd; k++) pairs[k] = c[2 * k - odd] * x + c[2 * k + 1 - odd];
        return in_pairs<N / 2 + odd>(x * x, pairs);
    }
}
template <class V, class F, int N> INLINE V polynomial(V x, const F (&c)[N]) {
    V all[N];
#pragma GCC unroll 16
    for (int k = 0; k < N; k++) all[k] = V{} + c[k];
    return in_pairs<N>(x, all);
}

// exp x for x ≤ 0 or NaN.
template <class F, class V = typename Vectors<F>::V> INLINE V exponential(V x) {
    using U = typename Vectors<F>::U;
    using K = Constants<F>;
    constexpr F shift = K::INTEGER + (K::BIAS + K::SHIFT);
    x = Vectors<F>::max(Vectors<F>::splat(K::LEAST), x);
    V shifted = x * F(1.44269504088896340736) + shift, n = shifted - shift;
    V r = x - n * K::LOG2_HIGH - n * K::LOG2_LOW;
    V p = polynomial(r, K::EXP) * (r * r) + r + F(1);
    // By 2ⁿ, which is beyond the least exponent where the result is subnormal.
    return p * (V)((U)shifted << K::MANTISSA) * K::UNSHIFT;
}

// Of what is normal and positive, or NaN; plus that of 2 to the power of `exponent`.
template <class F, class V = typename Vectors<F>::V> INLINE V logarithm_of_normal(V x, V exponent) {
    using U = typename Vectors<F>::U;  // Those of a NaN may wrap around.
    using K = Constants<F>;
    constexpr typename Bits<F>::Unsigned one = 1, fraction = (one << K::MANTISSA) - 1;
    U bits = (U)x + (K::ONE - K::SQRT_HALF);
    V e = (V)((bits >> K::MANTISSA) | K::EXPONENT_BITS);
    e += exponent - (K::EXPONENT + K::BIAS);
    V f = (V)((bits & fraction) + K::SQRT_HALF) - F(1);
    V square = f * f * F(0.5), rest;
    if constexpr (sizeof(F) == 4) {
        rest = f * (f * f) * polynomial(f, K::LOG);
    } else {
        V s = f / (f + F(2)), z = s * s;
        rest = s * (square + z * polynomial(z, K::LOG));
    }
    V y = e * K::LOG2_HIGH - ((square - (rest + e * K::LOG2_LOW)) - f);
    return x <= std::numeric_limits<F>::max() ? y : x;  // ∞ and NaN stay.
}

template <class F, class V = typename Vectors<F>::V> INLINE V logarithm(V x) {
    using K = Constants<F>;
    const V none = {}, scale = none + K::SCALE, exponent = none - F(K::MANTISSA);
    const typename Vectors<F>::I is_tiny = x < K::TINY;  // Subnormal, 0 or negative.
    V y = logarithm_of_normal<F>(is_tiny ? x * scale : x, is_tiny ? exponent : none);
    const V nan = none + F(NAN), infinity = none + F(INFINITY);
    return x <= F(0) ? (x < F(0) ? nan : -infinity) : y;
}

#if defined(__x86_64__) && BYTES == 64
// A vector holds a table of 16, which leaves less to a polynomial.

// exp x = 2ⁿ exp r, where n is a multiple of 1/16: by its fraction 2ⁿ is in the table.
constexpr float POWERS[] = {1.0f,       1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f,
                            1.2968396f, 1.3542556f, 1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f,
                            1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
// (exp r − 1 − r) / r² for |r| ≤ log 2 / 32.
constexpr float EXP_OF_REST[] = {0.16666867f, 0.50000995f};

template <> INLINE Vectors<float>::V exponential<float>(Vectors<float>::V x) {
    using V = Vectors<float>::V;
    using K = Constants<float>;
    constexpr float shift = K::INTEGER / 16;
    x = (V)_mm512_max_ps(_mm512_set1_ps(K::LEAST), (__m512)x);
    const V shifted = x * 1.44269504f + shift, n = shifted - shift;
    const V r = x - n * K::LOG2_HIGH - n * K::LOG2_LOW;
    const V power = (V)_mm512_permutexvar_ps((__m512i)shifted, _mm512_loadu_ps(POWERS));
    const V rest = polynomial(r, EXP_OF_REST) * (r * r) + r;
    return (V)_mm512_scalef_ps((__m512)(power * rest + power), (__m512)n);
}

// log x = e log 2 + log c + log(1 + r) for x = 2ᵉ m, 1 ≤ m < 2 and r = m / c − 1: the first bits of
// m choose c. Each 1 / c is one whose log c is a float to within 1e-10. Around 1 nothing cancels:
// there c is 1 or 2, and log 2 the same float in both terms.
constexpr float INVERSES[] = {1.0f,        0.9144761f,  0.8645959f,  0.82066107f,
                              0.78044915f, 0.7444245f,  0.7110863f,  0.6810205f,
                              0.65325683f, 0.62713385f, 0.60379475f, 0.5820979f,
                              0.56145704f, 0.5422814f,  0.52460736f, 0.5f};
constexpr float LOGS[] = {0.0f,        0.08940395f, 0.14549306f, 0.19764508f,
                          0.24788569f, 0.2951438f,  0.34096152f, 0.38416287f,
                          0.42578492f, 0.4665953f,  0.50452095f, 0.54111665f,
                          0.57722f,    0.61197025f, 0.6451052f,  0.6931472f};
// (log(1 + r) − r) / r² for −1/32 ≤ r ≤ 1/16.
constexpr float LOG_OF_REST[] = {0.19024445f, -0.2501254f, 0.33334178f, -0.49999997f};

template <> INLINE Vectors<float>::V logarithm<float>(Vectors<float>::V x) {
    using V = Vectors<float>::V;
    const V e = (V)_mm512_getexp_ps((__m512)x);
    const V m = (V)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan);
    const __m512i first = _mm512_srli_epi32((__m512i)m, 19);
    const V r = m * (V)_mm512_permutexvar_ps(first, _mm512_loadu_ps(INVERSES)) - 1.0f;
    const V rest = polynomial(r, LOG_OF_REST) * (r * r) + r;
    return e * LOGS[15] + (V)_mm512_permutexvar_ps(first, _mm512_loadu_ps(LOGS)) + rest;
}
template <>
INLINE Vectors<float>::V logarithm_of_normal<float>(Vectors<float>::V x, Vectors<float>::V) {
    return logarithm<float>(x);
}
#endif

// ---- Storage

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class F, class T> INLINE F load_cast(T value) { return F(value); }
template <class F> INLINE F load_cast(Bool value) { return value.byte ? F(1) : F(0); }
template <class F> INLINE F load_cast(Bfloat16 value) {
    return as_float(uint32_t(value.bits) << 16);
}
template <class F> INLINE F load_cast(Float16 value) {
    // By way of an integer where it is subnormal, since a processor may be set to flush those.
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    uint32_t normal = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23);
    uint32_t subnormal = as_bits(float(int32_t(rest)) * 0x1p-24f);
    return as_float(sign | (rest < 0x400 ? subnormal : normal));
}

// To the nearest, ties to even; of a float64 by way of float32.
template <class T, class F> INLINE void store_cast(F value, T &to) { to = T(value); }
template <class F> INLINE void store_cast(F value, Bfloat16 &to) {
    uint32_t bits = as_bits(float(value));
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
template <class F> INLINE void store_cast(F value, Float16 &to) {
    uint32_t bits = as_bits(float(value)), rest = bits & 0x7fffffff;
    uint32_t normal = (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3f000000;
    uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t finite = rest < 0x38800000 ? subnormal : normal;
    to.bits = uint16_t(((bits >> 16) & 0x8000) | (rest < 0x477ff000 ? finite : large));
}

// n elements of a tensor, from `start` on, so many apart.
template <class F, class T>
void load_as(const void *from, int64_t start, int64_t n, F *to, int64_t stride) {
    const T *values = (const T *)from + start;
    if (stride != 1)
        for (int64_t i = 0; i < n; i++) to[i] = load_cast<F>(values[i * stride]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = load_cast<F>(values[i]);
}
template <class F, class T>
void store_as(const F *from, int64_t n, void *to, int64_t start, int64_t stride) {
    T *values = (T *)to + start;
    if (stride != 1)
        for (int64_t i = 0; i < n; i++) store_cast(from[i], values[i * stride]);
    else
        for (int64_t i = 0; i < n; i++) store_cast(from[i], values[i]);
}

// In the order of `Storage`.
template <class F> using Load = void (*)(const void *, int64_t, int64_t, F *, int64_t);
template <class F>
constexpr Load<F> LOADS[] = {
    load_as<F, float>,    load_as<F, double>,   load_as<F, Bfloat16>, load_as<F, Float16>,
    load_as<F, uint8_t>,  load_as<F, int8_t>,   load_as<F, int16_t>,  load_as<F, int32_t>,
    load_as<F, int64_t>,  load_as<F, uint16_t>, load_as<F, uint32_t>, load_as<F, uint64_t>,
    load_as<F, Bool>};
template <class F> using Store = void (*)(const F *, int64_t, void *, int64_t, int64_t);
template <class F>
constexpr Store<F> STORES[] = {store_as<F, float>, store_as<F, double>, store_as<F, Bfloat16>,
                               store_as<F, Float16>};
template <class T> constexpr Storage NATIVE = sizeof(T) == 4 ? FLOAT32 : FLOAT64;
template <> constexpr Storage NATIVE<Bfloat16> = BFLOAT16;

}  // namespace
}  // namespace NAMESPACE
