// The losses, compiled once for each instruction set: job.h includes this file with NAMESPACE and
// BYTES, the width of a vector, defined.

namespace NAMESPACE {
namespace {

// ---- Vectors

template <class F> struct Bits;
template <> struct Bits<float> {
    using Signed = int32_t;
    using Unsigned = uint32_t;
};
template <> struct Bits<double> {
    using Signed = int64_t;
    using Unsigned = uint64_t;
};

template <class F> struct Vectors {
    static constexpr int W = BYTES / sizeof(F);
    typedef F V __attribute__((vector_size(BYTES)));
    typedef typename Bits<F>::Signed I __attribute__((vector_size(BYTES)));
    typedef typename Bits<F>::Unsigned U __attribute__((vector_size(BYTES)));

    // In memory, at any element; not copied as bytes, which a compiler takes to change anything.
    typedef V Stored __attribute__((aligned(sizeof(F))));
    typedef I StoredI __attribute__((aligned(sizeof(F))));

    static INLINE V load(const F *from) { return *(const Stored *)from; }
    static INLINE I load(const typename Bits<F>::Signed *from) { return *(const StoredI *)from; }
    static INLINE void store(F *to, V value) { *(Stored *)to = value; }
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
    static void end_streams() { std::atomic_thread_fence(std::memory_order_seq_cst); }
    static INLINE V splat(F value) { return V{} + value; }
    static INLINE I lanes() {
        I value;
        for (int k = 0; k < W; k++) value[k] = k;
        return value;
    }
    static INLINE V larger(V a, V b) { return a > b ? a : b; }  // Of a NaN and b it is b.
    static INLINE F sum(V value) {
        for (int half = W / 2; half; half /= 2)
            for (int k = 0; k < half; k++) value[k] += value[k + half];
        return value[0];
    }
    static INLINE F largest(V value) {
        for (int half = W / 2; half; half /= 2)
            for (int k = 0; k < half; k++)
                value[k] = value[k] > value[k + half] ? value[k] : value[k + half];
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

// c₀ xⁿ + c₁ xⁿ⁻¹ + …, in pairs, pairs of these and so on: shorter to wait for than one by one.
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

// Of what is at most 0, as a softmax takes it, or NaN.
template <class F, class V = typename Vectors<F>::V> INLINE V exponential(V x) {
    using U = typename Vectors<F>::U;
    using K = Constants<F>;
    constexpr F shift = K::INTEGER + (K::BIAS + K::SHIFT);
    x = Vectors<F>::larger(Vectors<F>::splat(K::LEAST), x);
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

// ---- Storage

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct Bool {
    uint8_t byte;  // Any but 0 is true.
};

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

template <class F, class T> INLINE F widened(T value) { return F(value); }
template <class F> INLINE F widened(Bool value) { return value.byte ? F(1) : F(0); }
template <class F> INLINE F widened(Bfloat16 value) { return as_float(uint32_t(value.bits) << 16); }
template <class F> INLINE F widened(Float16 value) {
    // By way of an integer where it is subnormal, since a processor may be set to flush those.
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    uint32_t normal = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23);
    uint32_t subnormal = as_bits(float(int32_t(rest)) * 0x1p-24f);
    return as_float(sign | (rest < 0x400 ? subnormal : normal));
}

// To the nearest, ties to even; of a float64 by way of float32.
template <class T, class F> INLINE void narrow(F value, T &to) { to = T(value); }
template <class F> INLINE void narrow(F value, Bfloat16 &to) {
    uint32_t bits = as_bits(float(value));
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
template <class F> INLINE void narrow(F value, Float16 &to) {
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
        for (int64_t i = 0; i < n; i++) to[i] = widened<F>(values[i * stride]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = widened<F>(values[i]);
}
template <class F, class T>
void store_as(const F *from, int64_t n, void *to, int64_t start, int64_t stride) {
    T *values = (T *)to + start;
    if (stride != 1)
        for (int64_t i = 0; i < n; i++) narrow(from[i], values[i * stride]);
    else
        for (int64_t i = 0; i < n; i++) narrow(from[i], values[i]);
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
template <class F> constexpr Storage OWN = sizeof(F) == 4 ? FLOAT32 : FLOAT64;

// ---- Tiles

constexpr int GROUP = 256;        // Samples whose labels and weights are looked up together, at most.
constexpr int SIDE_BY_SIDE = 16;  // From here on neighbouring samples are read as they lie.
constexpr int FEW = 8;            // So few neighbours, of many classes, are faster one by one.
constexpr int64_t BLOCK = 1024;   // Classes of a row that are summed in one register.
constexpr int64_t ROOM = 8192;   // Elements of a tile of samples side by side, at most.
constexpr int64_t ROW = 32768;    // Elements whose exponentials are kept between passes, at most.

// What is known of each sample of a group; the last lanes may belong to none.
template <class F> struct Group {
    int64_t first;
    int count;
    bool keeps_all, has_bad;
    int64_t label[GROUP];                        // −1 where a sample does not count.
    F scale[GROUP], factor[GROUP], loss[GROUP];  // Of a sample's loss, and of its slopes.
};

// The buffers of a thread, for one block of each tensor and for the exponentials of whole rows.
template <class F> struct Room {
    F *input, *target, *grad_input, *grad_target, *storage, *exponentials, *gated;
};

// The place of a vector in a block: its class or that of its first lane, and its number among the
// vectors of samples. In a last vector that overlaps the one before, the first lanes have been seen.
template <class F, bool OVERLAPS> struct At {
    int64_t k, v;
    int seen;
    INLINE typename Vectors<F>::V unseen(typename Vectors<F>::V value) const {
        if constexpr (!OVERLAPS) return value;
        using Lane = typename Bits<F>::Signed;
        return Vectors<F>::lanes() >= Lane(seen) ? value : typename Vectors<F>::V{};
    }
    // What is written over what was read must not be taken for it once more.
    INLINE typename Vectors<F>::V unseen(typename Vectors<F>::V value, const F *seen_before) const {
        if constexpr (!OVERLAPS) return value;
        using Lane = typename Bits<F>::Signed;
        return Vectors<F>::lanes() >= Lane(seen) ? value : Vectors<F>::load(seen_before);
    }
};

// A block of a tensor as F: in its own memory or in a buffer, with so many elements from class to
// class.
template <class F> struct Block {
    F *start;
    int64_t stride;
    bool streams;  // What is set goes past the cache.

    INLINE explicit operator bool() const { return start; }
    template <class At> INLINE F *place(At at) const {
        return start + at.k * stride + at.v * Vectors<F>::W;
    }
    template <class At> INLINE typename Vectors<F>::V get(At at) const {
        return Vectors<F>::load(place(at));
    }
    template <class At> INLINE void set(At at, typename Vectors<F>::V value) const {
        value = at.unseen(value, place(at));
        streams ? Vectors<F>::stream(place(at), value) : Vectors<F>::store(place(at), value);
    }
};

// The samples that are worked on together, and the block of their classes that is at hand: one
// sample with its classes in the lanes of a vector, or many samples side by side.
template <class F, bool SIDE> struct Tile {
    using S = Vectors<F>;
    using V = typename S::V;
    using I = typename S::I;
    using Lane = typename Bits<F>::Signed;
    static constexpr int W = S::W, VECTORS = SIDE ? GROUP / W : 1;

    const Job &job;
    Group<F> &group;
    const Room<F> &room;
    int64_t first;       // Its first sample,
    int index;           // and the place of that in the group.
    int width, vectors;  // Samples in buffers, full vectors of them; and the number of vectors.
    int64_t classes, begin = 0, count = 0;  // Of all and of this block.
    Lane label[SIDE ? GROUP : W];           // Each lane's class, counted from this block's first,
    Lane counts[SIDE ? GROUP : 1];          // and whether it counts, as a mask.

    Tile(const Job &job, Group<F> &group, const Room<F> &room, int index)
        : job(job), group(group), room(room), first(group.first + index), index(index) {
        width = SIDE ? (group.count + W - 1) / W * W : 1;
        vectors = SIDE ? width / W : 1;
        // The last row of a flat tensor takes what remains.
        const bool is_last = !SIDE && first == job.samples - 1;
        classes = is_last ? job.elements - first * job.classes : job.classes;
        if (SIDE && !group.keeps_all)
            for (int k = 0; k < width; k++) counts[k] = group.label[k] < 0 ? 0 : -1;
    }

    // Goes on to the next block, if there is one; a block of a row has a vector's lanes at least.
    bool next() {
        begin += count;
        const int64_t left = classes - begin, most = SIDE ? ROOM / width : BLOCK;
        count = left < most + (SIDE ? 1 : W) ? left : most;
        if (count <= 0) {
            begin = count = 0;
            return false;
        }
        if (job.is_index)
            for (int k = 0; k < (SIDE ? width : W); k++) {
                const int64_t c = group.label[SIDE ? k : index] - begin;
                label[k] = Lane(c >= 0 && c < count ? c : -1);
            }
        return true;
    }

    // The block of a tensor where it is in memory, if that can be: in F and full vectors.
    bool is_direct(Storage storage) const {
        if (storage != OWN<F>) return false;
        return SIDE ? job.inner >= SIDE_BY_SIDE && group.count == width : job.inner == 1;
    }
    Block<F> direct(const void *tensor) const {
        return {(F *)tensor + job.place(first, begin), SIDE ? job.inner : 1, false};
    }
    // In a buffer for whole rows.
    Block<F> whole(F *buffer) const { return {buffer + begin * width, width, false}; }

    Block<F> load(const void *tensor, Storage storage, F *buffer) const {
        if (is_direct(storage)) return direct(tensor);
        each_part([&](int64_t start, int64_t place, int64_t items, int64_t n) INLINED {
            if (is_contiguous()) {
                LOADS<F>[storage](tensor, start, n, buffer + place, stride());
                return;
            }
            const F *values = (const F *)tensor + start;
            if (storage != OWN<F>) LOADS<F>[storage](tensor, start, n, room.storage, 1);
            if (storage != OWN<F>) values = room.storage;
            permute(items, [&](int64_t i, int64_t j) INLINED { buffer[place + j] = values[i]; });
        });
        if (group.count < width && SIDE)
            for (int64_t k = 0; k < count; k++)
                for (int j = group.count; j < width; j++) buffer[k * width + j] = 0;
        return {buffer, width, false};
    }
    // Where the block of a result is to be written, before `store` takes it to its place.
    Block<F> place(void *tensor, Storage storage, F *buffer) const {
        if (!tensor) return {nullptr, 0, false};
        if (!is_direct(storage)) return {buffer, width, false};
        Block<F> block = direct(tensor);
        const int64_t size = SIDE ? block.stride : count;
        block.streams = job.streams && size % W == 0 && (uintptr_t)block.start % BYTES == 0;
        return block;
    }
    void store(void *tensor, Storage storage, const F *buffer) const {
        if (!tensor || is_direct(storage)) return;
        each_part([&](int64_t start, int64_t place, int64_t items, int64_t n) INLINED {
            if (is_contiguous()) {
                STORES<F>[storage](buffer + place, n, tensor, start, stride());
                return;
            }
            F *values = storage == OWN<F> ? (F *)tensor + start : room.storage;
            permute(items, [&](int64_t i, int64_t j) INLINED { values[i] = buffer[place + j]; });
            if (storage != OWN<F>) STORES<F>[storage](values, n, tensor, start, 1);
        });
    }

    // Whether a part has the same order in the buffer as in memory.
    bool is_contiguous() const { return !SIDE || job.inner >= SIDE_BY_SIDE; }
    // From element to element of a part, in memory.
    int64_t stride() const { return SIDE ? 1 : job.inner; }
    // Calls a body for the parts of the block that lie together in memory: their first element,
    // its place in the buffer, and the numbers of outer items and of elements.
    template <class Body> INLINE void each_part(Body body) const {
        if constexpr (!SIDE) {
            body(job.place(first, begin), int64_t(0), int64_t(1), count);
        } else if (is_contiguous()) {
            for (int64_t k = 0; k < count; k++)
                body(job.place(first, begin + k), k * width, int64_t(1), int64_t(group.count));
        } else {
            const int64_t items = group.count / job.inner;
            const int64_t each = count == classes ? items : 1;
            for (int64_t o = 0; o < items; o += each)
                body(job.place(first + o * job.inner, begin), o * job.inner, each,
                     each * count * job.inner);
        }
    }
    // Calls a body for each element of such a part, with its place in memory and in the buffer.
    template <class Body> INLINE void permute(int64_t items, Body body) const {
        const int64_t count = this->count, inner = job.inner, width = this->width;
        if (inner == 1) {
            for (int64_t k = 0; k < count; k++)
                for (int64_t o = 0; o < items; o++) body(o * count + k, k * width + o);
            return;
        }
        int64_t i = 0;
        for (int64_t o = 0; o < items; o++)
            for (int64_t k = 0; k < count; k++)
                for (int64_t j = 0; j < inner; j++) body(i++, k * width + o * inner + j);
    }

    // Calls a body for each vector, with the accumulator of its samples.
    template <class A, class Body> INLINE void fold(A *total, Body body) const {
        const int64_t count = this->count, vectors = this->vectors;
        if constexpr (SIDE) {
            for (int64_t k = 0; k < count; k++)
                for (int64_t v = 0; v < vectors; v++) body(total[v], At<F, false>{k, v, 0});
        } else {
            A a = total[0];
            int64_t k = 0;
            for (; k + W <= count; k += W) body(a, At<F, false>{k, 0, 0});
            if (k < count) body(a, At<F, true>{count - W, 0, int(k + W - count)});
            total[0] = a;
        }
    }
    // Likewise, with accumulators that are 0 at the start of each block.
    template <class A, class Body> INLINE void add(A *total, Body body) const {
        A part[VECTORS];
        for (int v = 0; v < vectors; v++) part[v] = A{};
        fold(part, body);
        for (int v = 0; v < vectors; v++) total[v] += part[v];
    }
    template <class Body> INLINE void each(Body body) const {
        char none[VECTORS];
        fold(none, [&](char, auto at) INLINED { body(at); });
    }

    // What each sample has, as a vector; that of a row is loaded once.
    struct OfSample {
        const F *values;
        V own;
        template <class At> INLINE V operator()(At at) const {
            return SIDE ? S::load(values + at.v * W) : own;
        }
    };
    INLINE OfSample of_sample(const F *values) const { return {values, S::splat(values[index])}; }
    // What each class has.
    template <class At> INLINE V of_class(const F *values, At at) const {
        return SIDE ? S::splat(values[begin + at.k]) : S::load(values + begin + at.k);
    }
    template <class At> INLINE V one_hot(At at, V on, V off) const {
        const I own = SIDE ? I{} + Lane(at.k) : S::lanes() + Lane(at.k);
        return own == S::load(label + at.v * W) ? on : off;
    }
    // A value of samples that count, and else 0.
    template <class At> INLINE V kept(V value, At at) const {
        if (!SIDE || group.keeps_all) return value;
        return S::load(counts + at.v * W) ? value : V{};
    }
    // From a sum per lane to one per sample, in all its lanes.
    static INLINE V over_lanes(V value) { return SIDE ? value : S::splat(S::sum(value)); }

    template <class Body> INLINE void each_sample(Body body) const {
        for (int64_t v = 0; v < vectors; v++) body(v, At<F, false>{0, v, 0});
    }
    template <class At> INLINE void set_loss(V loss, At at) const {
        loss = kept(loss * of_sample(group.scale)(at), at);
        if constexpr (SIDE) S::store(group.loss + at.v * W, loss);
        else group.loss[index] = loss[0];
    }
};

// ---- The losses

template <class F, bool SIDE, bool INDEX> void squares(const Job &job, Tile<F, SIDE> &tile) {
    using S = Vectors<F>;
    using V = typename S::V;
    const Room<F> &room = tile.room;
    Group<F> &group = tile.group;
    const bool has_losses = job.reduction == NONE;
    void *each_loss = has_losses ? job.losses : nullptr;
    const auto scale = tile.of_sample(group.scale), factor = tile.of_sample(group.factor);
    const V one = S::splat(1), zero = {}, lift = S::splat(F(job.lift));
    V losses[Tile<F, SIDE>::VECTORS] = {};
    while (tile.next()) {
        const auto y = tile.load(job.input, job.input_storage, room.input);
        Block<F> t{}, w{}, u{};
        if (!INDEX) t = tile.load(job.target, job.target_storage, room.target);
        if (job.weighs_elements) w = tile.direct(job.sample_weight);
        if (has_losses && job.has_upstreams) u = tile.load(job.upstream, OWN<F>, room.gated);
        const auto slope = tile.place(job.grad_input, job.input_storage, room.grad_input);
        const auto slope_t = tile.place(job.grad_target, job.target_storage, room.grad_target);
        const auto loss = tile.place(each_loss, OWN<F>, room.exponentials);
        const auto difference = [&](auto at) INLINED {
            return y.get(at) - (INDEX ? tile.one_hot(at, one, zero) : t.get(at));
        };
        const auto half_square = [](V d) INLINED { return d * F(0.5) * d; };
        // Apart, so that nothing is decided for each vector in the loops that training runs.
        if (w || u || loss || slope_t) {
            tile.add(losses, [&](V &total, auto at) INLINED {
                V d = difference(at), f = factor(at), term = half_square(d);
                if (w) {
                    const V weight = w.get(at) * lift;
                    term = weight * d * (d * F(0.5)), f *= weight;
                }
                if (u) f *= u.get(at);
                if (loss) loss.set(at, tile.kept(scale(at) * term, at));
                total += at.unseen(term);
                if (slope) slope.set(at, tile.kept(d * f, at));
                if (slope_t) slope_t.set(at, -d * f);
            });
        } else if (slope) {
            tile.add(losses, [&](V &total, auto at) INLINED {
                V d = difference(at);
                total += at.unseen(half_square(d));
                slope.set(at, tile.kept(d * factor(at), at));
            });
        } else {
            tile.add(losses, [&](V &total, auto at) INLINED {
                total += at.unseen(half_square(difference(at)));
            });
        }
        tile.store(job.grad_input, job.input_storage, room.grad_input);
        tile.store(job.grad_target, job.target_storage, room.grad_target);
        tile.store(each_loss, OWN<F>, room.exponentials);
    }
    tile.each_sample([&](int64_t v, auto at) INLINED {
        tile.set_loss(tile.over_lanes(losses[v]), at);
    });
}

// Targets as the cross-entropy takes them: smoothed, and made on the spot from class indices.
template <class F, bool SIDE, bool INDEX> struct Soft {
    using S = Vectors<F>;
    using V = typename S::V;
    const Tile<F, SIDE> &tile;
    const F *weight;
    const typename Tile<F, SIDE>::OfSample factor;
    V rest, uniform, on;
    bool is_smooth;
    Block<F> target{};

    Soft(const Job &job, const Tile<F, SIDE> &tile)
        : tile(tile), weight((const F *)job.weight), factor(tile.of_sample(tile.group.factor)),
          rest(S::splat(F(1 - job.smoothing))), uniform(S::splat(F(job.uniform))),
          on(rest + uniform), is_smooth(job.is_smooth) {
        if (!INDEX) target = tile.load(job.target, job.target_storage, tile.room.target);
    }
    template <class At> INLINE V value(At at) const {
        if constexpr (INDEX) return tile.one_hot(at, on, uniform);
        V t = target.get(at);
        return is_smooth ? t * rest + uniform : t;
    }
    template <class At> INLINE V weighted(V t, At at) const {
        return weight ? t * tile.of_class(weight, at) : t;
    }
    // The gradient by a target.
    template <class At> INLINE V slope(V log, At at) const {
        return weighted(log, at) * -rest * factor(at);
    }
};

template <class F, bool SIDE, bool INDEX> void probabilities(const Job &job, Tile<F, SIDE> &tile) {
    using V = typename Vectors<F>::V;
    const Room<F> &room = tile.room;
    const V delta = V{} + F(job.delta), one = V{} + F(1);
    const bool is_guarded = job.is_guarded;
    V losses[Tile<F, SIDE>::VECTORS] = {};
    while (tile.next()) {
        const auto y = tile.load(job.input, job.input_storage, room.input);
        const Soft<F, SIDE, INDEX> soft(job, tile);
        const auto slope = tile.place(job.grad_input, job.input_storage, room.grad_input);
        const auto slope_t = tile.place(job.grad_target, job.target_storage, room.grad_target);
        tile.add(losses, [&](V &total, auto at) INLINED {
            V guarded = y.get(at) + delta, t = soft.value(at), wt = soft.weighted(t, at);
            // Without a guard 0·log 0 is 0, but a class weight of 0 leaves it NaN.
            if (!is_guarded) guarded = ((t == F(0)) & (guarded == F(0))) ? one : guarded;
            V log = logarithm<F>(guarded);
            total -= at.unseen(wt * log);
            if (slope) slope.set(at, tile.kept(-wt * soft.factor(at) / guarded, at));
            if (slope_t) slope_t.set(at, soft.slope(log, at));
        });
        tile.store(job.grad_input, job.input_storage, room.grad_input);
        tile.store(job.grad_target, job.target_storage, room.grad_target);
    }
    tile.each_sample([&](int64_t v, auto at) INLINED {
        tile.set_loss(tile.over_lanes(losses[v]), at);
    });
}

// The exponentials of a tile's logits, less the greatest, and their sums.
template <class F, bool SIDE> struct Softmax {
    using S = Vectors<F>;
    using V = typename S::V;
    Tile<F, SIDE> &tile;
    const Job &job;
    const bool keeps;  // The exponentials, for later passes.
    V most[Tile<F, SIDE>::VECTORS], sum[Tile<F, SIDE>::VECTORS];

    Softmax(const Job &job, Tile<F, SIDE> &tile, bool is_needed)
        : tile(tile), job(job), keeps(is_needed && tile.classes * tile.width <= ROW) {
        // What has to be brought together, or converted, is kept from the first pass on.
        const bool copies = keeps && (SIDE || !tile.is_direct(job.input_storage));
        for (int v = 0; v < tile.vectors; v++) most[v] = S::splat(-F(INFINITY)), sum[v] = V{};
        while (tile.next()) {
            const auto x = logits(), copy = kept();
            tile.fold(most, [&](V &m, auto at) INLINED {
                V z = x.get(at);
                m = S::larger(z, m);
                if (copies) copy.set(at, z);
            });
        }
        if (!SIDE) most[0] = S::splat(S::largest(most[0]));
        while (tile.next()) {
            const auto e = kept(), x = copies ? e : logits();
            tile.add(sum, [&](V &total, auto at) INLINED {
                V value = exponential<F>(x.get(at) - most[at.v]);
                if (keeps) e.set(at, value);
                total += at.unseen(value);
            });
        }
        for (int v = 0; v < tile.vectors; v++) sum[v] = tile.over_lanes(sum[v]);
    }
    Block<F> logits() const { return tile.load(job.input, job.input_storage, tile.room.input); }
    Block<F> kept() const { return tile.whole(tile.room.exponentials); }
    // Of the block at hand, from what is kept or else from logits.
    INLINE Block<F> source() const { return keeps ? kept() : logits(); }
    template <class At> INLINE V exponent(const Block<F> &source, At at) const {
        V value = source.get(at);
        return keeps ? value : exponential<F>(value - most[at.v]);
    }
};

template <class F, bool SIDE, bool INDEX> void logits(const Job &job, Tile<F, SIDE> &tile) {
    using S = Vectors<F>;
    using V = typename S::V;
    struct Sums {
        V loss, gated;
        INLINE void operator+=(const Sums &part) { loss += part.loss, gated += part.gated; }
    };
    const Room<F> &room = tile.room;
    const V delta = V{} + F(job.delta), least = V{} - F(INFINITY);
    const bool is_guarded = job.is_guarded, is_learning = job.grad_input != nullptr;
    const auto factor = tile.of_sample(tile.group.factor);
    const Softmax<F, SIDE> softmax(job, tile, true);
    const bool keeps = softmax.keeps && is_learning;
    V inverse[Tile<F, SIDE>::VECTORS], log_sum[Tile<F, SIDE>::VECTORS];
    Sums sums[Tile<F, SIDE>::VECTORS];
    tile.each_sample([&](int64_t v, auto) INLINED {
        inverse[v] = F(1) / softmax.sum[v];
        log_sum[v] = logarithm<F>(softmax.sum[v]);
        sums[v] = Sums{V{}, V{}};
    });
    while (tile.next()) {
        const auto x = is_guarded ? softmax.source() : softmax.logits();
        const Soft<F, SIDE, INDEX> soft(job, tile);
        const auto gated = tile.whole(room.gated);
        const auto slope_t = tile.place(job.grad_target, job.target_storage, room.grad_target);
        tile.add(sums, [&](Sums &total, auto at) INLINED {
            V t = soft.value(at), wt = soft.weighted(t, at), log, g = wt;
            if (is_guarded) {
                V p = softmax.exponent(x, at) * inverse[at.v], guarded = p + delta;
                log = logarithm_of_normal<F>(guarded, V{});
                if (is_learning) g = wt * (p / guarded);
            } else {
                log = x.get(at) - softmax.most[at.v] - log_sum[at.v];
                log = ((t == F(0)) & (log == least)) ? V{} : log;
            }
            total.loss -= at.unseen(wt * log);
            total.gated += at.unseen(g);
            if (keeps) gated.set(at, g);
            if (slope_t) slope_t.set(at, soft.slope(log, at));
        });
        tile.store(job.grad_target, job.target_storage, room.grad_target);
    }
    tile.each_sample([&](int64_t v, auto at) INLINED {
        tile.set_loss(tile.over_lanes(sums[v].loss), at);
        sums[v].gated = tile.over_lanes(sums[v].gated);
    });
    if (!is_learning) return;
    while (tile.next()) {
        const auto x = softmax.source();
        const auto slope = tile.place(job.grad_input, job.input_storage, room.grad_input);
        const auto write = [&](auto gated) INLINED {
            tile.each([&](auto at) INLINED {
                V p = softmax.exponent(x, at) * inverse[at.v];
                V g = (p * sums[at.v].gated - gated(p, at)) * factor(at);
                slope.set(at, tile.kept(g, at));
            });
        };
        if (keeps) {
            const auto gated = tile.whole(room.gated);
            write([&](V, auto at) INLINED { return gated.get(at); });
        } else {
            const Soft<F, SIDE, INDEX> soft(job, tile);
            write([&](V p, auto at) INLINED {
                V wt = soft.weighted(soft.value(at), at);
                return is_guarded ? wt * (p / (p + delta)) : wt;
            });
        }
        tile.store(job.grad_input, job.input_storage, room.grad_input);
    }
}

// −log(p_c + δ) of one class per sample.
template <class F, bool SIDE> void logits_of_class(const Job &job, Tile<F, SIDE> &tile) {
    using S = Vectors<F>;
    using V = typename S::V;
    const Room<F> &room = tile.room;
    const Group<F> &group = tile.group;
    const Softmax<F, SIDE> softmax(job, tile, SIDE || job.grad_input);
    const bool is_kept = softmax.keeps && job.is_guarded;
    V gates[Tile<F, SIDE>::VECTORS], factors[Tile<F, SIDE>::VECTORS];
    tile.each_sample([&](int64_t v, auto at) INLINED {
        F z[S::W] = {};  // Of the class, or its exponential.
        for (int k = 0; k < (SIDE ? S::W : 1); k++) {
            const int j = SIDE ? int(v) * S::W + k : tile.index;
            const int64_t c = group.label[j];
            if (c < 0) continue;
            if (is_kept) z[k] = room.exponentials[c * tile.width + (SIDE ? j : 0)];
            else LOADS<F>[job.input_storage](job.input, job.place(group.first + j, c), 1, z + k, 1);
        }
        V value = SIDE ? S::load(z) : S::splat(z[0]), gate = S::splat(1), log;
        if (!is_kept) value -= softmax.most[v];
        if (job.is_guarded) {
            V p = (is_kept ? value : exponential<F>(value)) / softmax.sum[v];
            V guarded = p + F(job.delta);
            log = logarithm<F>(guarded);
            gate = p / guarded;
        } else {
            log = value - logarithm<F>(softmax.sum[v]);
        }
        tile.set_loss(-log, at);
        gates[v] = gate * tile.of_sample(group.factor)(at);
        factors[v] = gates[v] / softmax.sum[v];
    });
    if (!job.grad_input) return;
    while (tile.next()) {
        const auto x = softmax.source();
        const auto slope = tile.place(job.grad_input, job.input_storage, room.grad_input);
        tile.each([&](auto at) INLINED {
            V g = softmax.exponent(x, at) * factors[at.v] - tile.one_hot(at, gates[at.v], V{});
            slope.set(at, tile.kept(g, at));
        });
        tile.store(job.grad_input, job.input_storage, room.grad_input);
    }
}

// Sets `size` bytes to 0.
template <class F> void clear(char *start, int64_t size, bool streams) {
    int64_t i = 0;
    if (streams && (uintptr_t)start % BYTES == 0)
        for (; i + BYTES <= size; i += BYTES)
            Vectors<F>::stream((F *)(start + i), typename Vectors<F>::V{});
    std::memset(start + i, 0, size - i);
}

// −log(y_c + δ) of one class per sample; no other element is read.
template <class F> void probabilities_of_class(const Job &job, Group<F> &group) {
    using S = Vectors<F>;
    using V = typename S::V;
    F y[GROUP];
    for (int j = 0; j < (group.count + S::W - 1) / S::W * S::W; j++) {
        const int64_t c = group.label[j];
        y[j] = 1;
        if (c < 0) continue;
        LOADS<F>[job.input_storage](job.input, job.place(group.first + j, c), 1, y + j, 1);
    }
    for (int j = 0; j < group.count; j += S::W) {
        V guarded = S::load(y + j) + F(job.delta);
        S::store(group.loss + j, -logarithm<F>(guarded) * S::load(group.scale + j));
        S::store(y + j, -S::load(group.factor + j) / guarded);
    }
    for (int j = 0; j < group.count; j++)
        if (group.label[j] < 0) group.loss[j] = 0;
    if (!job.grad_input) return;
    const int64_t size = SIZES[job.input_storage];
    char *grad = (char *)job.grad_input;
    if (job.inner == 1)
        clear<F>(grad + job.place(group.first, 0) * size, group.count * job.classes * size,
                 job.streams);
    for (int j = 0; job.inner > 1 && j < group.count;) {
        const int64_t sample = group.first + j, left = job.inner - sample % job.inner;
        const int64_t n = left < group.count - j ? left : group.count - j;
        for (int64_t c = 0; c < job.classes; c++)
            std::memset(grad + job.place(sample, c) * size, 0, n * size);
        j += int(n);
    }
    for (int j = 0; j < group.count; j++) {
        const int64_t c = group.label[j];
        if (c < 0) continue;
        STORES<F>[job.input_storage](y + j, 1, grad, job.place(group.first + j, c), 1);
    }
}

// ---- Groups and stretches

// Looks up the labels and weights of samples.
template <class F> void prepare(Job &job, Group<F> &group) {
    const F *sample_weight = job.weighs_elements ? nullptr : (const F *)job.sample_weight;
    const F *weight = job.is_of_class ? (const F *)job.weight : nullptr;
    const F *upstream = (const F *)job.upstream;
    const F factor = F((upstream && !job.has_upstreams ? *upstream : F(1)) / job.divisor);
    const F lift = F(job.weighs_elements ? 1 : job.lift);
    if (!job.has_upstreams || job.kind == SQUARES) upstream = nullptr;
    const int end = (group.count + 15) / 16 * 16;  // Of the widest vectors.
    group.keeps_all = group.count == end;
    group.has_bad = false;
    if (job.is_index) {
        load_labels(job, group.first, group.count, group.label);
        for (int j = 0; j < group.count; j++) {
            const int64_t c = group.label[j];
            if (c >= 0 && c < job.classes && c != job.ignore_index) continue;
            if (c != job.ignore_index) {
                job.note_bad(group.first + j);
                group.has_bad = true;
            }
            group.label[j] = -1;
            group.keeps_all = false;
        }
    } else {
        std::memset(group.label, 0, group.count * sizeof(int64_t));
    }
    for (int j = 0; j < group.count; j++) {
        F scale = sample_weight ? sample_weight[group.first + j] * lift : lift;
        if (weight && group.label[j] >= 0) scale *= weight[group.label[j]];
        group.scale[j] = scale;
        group.factor[j] = scale * factor * (upstream ? upstream[group.first + j] : F(1));
    }
    for (int j = group.count; j < end; j++) {
        group.scale[j] = group.factor[j] = 0;
        group.label[j] = -1;
    }
}

template <class F, bool SIDE> void run_tile(Tile<F, SIDE> tile) {
    const Job &job = tile.job;
    const Room<F> &room = tile.room;
    if (!SIDE && job.is_index && tile.group.label[tile.index] < 0) {
        void *losses = job.kind == SQUARES && job.reduction == NONE ? job.losses : nullptr;
        tile.group.loss[tile.index] = 0;
        while (tile.next()) {
            const auto slope = tile.place(job.grad_input, job.input_storage, room.grad_input);
            const auto loss = tile.place(losses, OWN<F>, room.exponentials);
            if (slope) std::memset(slope.start, 0, tile.count * sizeof(F));
            if (loss) std::memset(loss.start, 0, tile.count * sizeof(F));
            tile.store(job.grad_input, job.input_storage, room.grad_input);
        }
    } else if (job.kind == SQUARES) {
        job.is_index ? squares<F, SIDE, true>(job, tile) : squares<F, SIDE, false>(job, tile);
    } else if (job.kind == PROBABILITIES) {
        job.is_index ? probabilities<F, SIDE, true>(job, tile)
                     : probabilities<F, SIDE, false>(job, tile);
    } else if (job.is_of_class) {
        logits_of_class<F, SIDE>(job, tile);
    } else {
        job.is_index ? logits<F, SIDE, true>(job, tile) : logits<F, SIDE, false>(job, tile);
    }
}

// Makes NaN of the losses and slopes of samples whose class is none.
template <class F> void spoil(const Job &job, Group<F> &group) {
    constexpr int MOST = 64;
    const F nan = std::numeric_limits<F>::quiet_NaN();
    F nans[MOST];
    int64_t labels[GROUP];
    for (F &each : nans) each = nan;
    const auto fill = [&](void *tensor, Storage storage, int64_t sample) {
        for (int64_t c = 0; tensor && c < job.classes; c += MOST) {
            const int64_t n = job.classes - c < MOST ? job.classes - c : MOST;
            STORES<F>[storage](nans, n, tensor, job.place(sample, c), job.inner);
        }
    };
    load_labels(job, group.first, group.count, labels);
    for (int j = 0; j < group.count; j++) {
        if (group.label[j] >= 0 || labels[j] == job.ignore_index) continue;
        group.loss[j] = nan;
        fill(job.grad_input, job.input_storage, group.first + j);
        if (job.kind == SQUARES && job.reduction == NONE)
            fill(job.losses, OWN<F>, group.first + j);
    }
}

// Stretches `begin` to `end` of a job.
template <class F> void run_stretches(int64_t begin, int64_t end, void *context) {
    constexpr int W = Vectors<F>::W;
    Job &job = *(Job *)context;
    const int64_t most = job.samples < job.group ? job.samples : job.group;
    const int64_t width = job.is_side_by_side ? (most + 15) / 16 * 16 : 1;
    int64_t block = BLOCK + Vectors<F>::W, row = job.classes * width;
    if (job.is_side_by_side) block = row < ROOM ? row : ROOM;
    row = row > ROW ? ROW : row < block ? block : row;
    F *memory = (F *)std::malloc((5 * block + 2 * row) * sizeof(F));
    if (!memory) return job.note_bad(NO_MEMORY);
    F *rows = memory + 5 * block;
    const Room<F> room = {memory,
                          memory + block,
                          memory + 2 * block,
                          memory + 3 * block,
                          memory + 4 * block,
                          rows,
                          rows + row};
    Group<F> group;
    for (int64_t stretch = begin; stretch < end; stretch++) {
        int64_t last = (stretch + 1) * job.stretch;
        if (last > job.samples) last = job.samples;
        double total = 0;
        for (int64_t sample = stretch * job.stretch; sample < last; sample += group.count) {
            int64_t n = last - sample < job.group ? last - sample : job.group;
            bool is_few = false;
            if (job.is_side_by_side && job.inner >= SIDE_BY_SIDE) {
                const int64_t left = job.inner - sample % job.inner;
                if (left < n) n = left;
                if (n > W && job.classes >= LEAST_ROW) n -= n % W;  // Full vectors, then the rest.
                is_few = n < W && n <= FEW && job.classes >= LEAST_ROW;
            }
            group.first = sample;
            group.count = int(n);
            prepare(job, group);
            if (job.is_of_class && job.kind == PROBABILITIES) probabilities_of_class(job, group);
            else if (job.is_side_by_side && !is_few) run_tile(Tile<F, true>(job, group, room, 0));
            else for (int j = 0; j < n; j++) run_tile(Tile<F, false>(job, group, room, j));
            if (group.has_bad) spoil(job, group);
            for (int j = 0; j < n; j++) total += group.loss[j];
            if (job.reduction == NONE && job.kind != SQUARES)
                std::memcpy((F *)job.losses + sample, group.loss, n * sizeof(F));
        }
        job.sums[stretch] = total;
    }
    std::free(memory);
    if (job.streams) Vectors<F>::end_streams();
}

}  // namespace

// How a job is cut into groups, and what runs its stretches.
void plan(Job &job) {
    if (job.is_elementwise) {  // Rows of any length will do, and the last takes what remains.
        const int width = BYTES / (job.is_double ? 8 : 4);
        job.inner = 1;
        job.classes = job.elements < width ? 1 : job.elements < 4096 ? job.elements : 4096;
        job.samples = job.elements / job.classes;
        job.weighs_elements &= job.classes > 1;
    }
    job.is_side_by_side = job.inner > 1 || job.classes < (job.is_elementwise ? 2 : LEAST_ROW);
    if (job.inner <= FEW && job.classes > ROOM / 16) job.is_side_by_side = false;
    job.group = 64;
    if (job.is_side_by_side) {
        const int64_t fitting = ROOM / job.classes / 16 * 16;
        job.group = fitting < 16 ? 16 : fitting > GROUP ? GROUP : fitting;
        if (job.inner < SIDE_BY_SIDE) {
            if (job.group > 64) job.group = 64;
            job.group = job.group / job.inner * job.inner;
        }
    }
    job.run = job.is_double ? run_stretches<double> : run_stretches<float>;
}

// For the tests: exp or log of n numbers.
template <class F> void apply(bool is_log, const F *from, F *to, int64_t n) {
    using S = Vectors<F>;
    F buffer[S::W] = {};
    for (int64_t i = 0; i < n; i += S::W) {
        const int64_t size = (n - i < S::W ? n - i : S::W) * sizeof(F);
        std::memcpy(buffer, from + i, size);
        const auto x = S::load(buffer);
        S::store(buffer, is_log ? logarithm<F>(x) : exponential<F>(x));
        std::memcpy(to + i, buffer, size);
    }
}
void apply(bool is_log, bool is_double, const void *from, void *to, int64_t n) {
    if (is_double) apply(is_log, (const double *)from, (double *)to, n);
    else apply(is_log, (const float *)from, (float *)to, n);
}

}  // namespace NAMESPACE
