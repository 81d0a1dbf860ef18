// Tiles: some classes of some samples, as the losses see them.

namespace NAMESPACE {
namespace {

constexpr int GROUP = 256;        // Most samples whose labels and weights are looked up together.
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
// vectors of samples. Where a last vector overlaps the one before, its first lanes have been seen.
template <class F, bool OVERLAPS> struct At {
    int64_t k, v;
    int seen;
    INLINE typename Vectors<F>::V unseen(typename Vectors<F>::V value) const {
        if constexpr (!OVERLAPS) return value;
        using Lane = typename Bits<F>::Signed;
        return Vectors<F>::lanes() >= Lane(seen) ? value : typename Vectors<F>::V{};
    }
    // In place: lanes that were written before must not be read again.
    template <class T>
    INLINE typename Vectors<F>::V unseen(typename Vectors<F>::V value, const T *seen_before) const {
        if constexpr (!OVERLAPS) return value;
        using Lane = typename Bits<F>::Signed;
        return Vectors<F>::lanes() >= Lane(seen) ? value : Vectors<F>::load(seen_before);
    }
};

// A block of a tensor as T: in its own memory or in a buffer, with so many elements from class to
// class. Its vectors are those of F.
template <class F, class T = F> struct Block {
    T *start;
    int64_t stride;
    bool streams;  // What is set goes past the cache.

    INLINE explicit operator bool() const { return start; }
    template <class At> INLINE T *pointer(At at) const {
        return start + at.k * stride + at.v * Vectors<F>::W;
    }
    template <class At> INLINE typename Vectors<F>::V get(At at) const {
        return Vectors<F>::load(pointer(at));
    }
    template <class At> INLINE void set(At at, typename Vectors<F>::V value) const {
        value = at.unseen(value, pointer(at));
        streams ? Vectors<F>::stream(pointer(at), value) : Vectors<F>::store(pointer(at), value);
    }
};

// The samples that are worked on together, and the block of their classes that is at hand: one
// sample with its classes in the lanes of a vector, or many samples side by side. T is F, or what
// input and target are stored as where vectors are made of that right away.
template <class F, bool SAMPLES_IN_LANES, class T> struct Tile {
    using S = Vectors<F>;
    using V = typename S::V;
    using I = typename S::I;
    using Lane = typename Bits<F>::Signed;
    static constexpr int W = S::W, VECTORS = SAMPLES_IN_LANES ? GROUP / W : 1;

    const Job &job;
    Group<F> &group;
    const Room<F> &room;
    int64_t first;       // Its first sample,
    int index;           // and the place of that in the group.
    int width, vectors;  // Samples in buffers, full vectors of them; and the number of vectors.
    int64_t classes, begin = 0, count = 0;  // Of all and of this block.
    // Each lane's class, counted from this block's first, and whether it counts, as a mask.
    Lane label[SAMPLES_IN_LANES ? GROUP : W], counts[SAMPLES_IN_LANES ? GROUP : 1];

    Tile(const Job &job, Group<F> &group, const Room<F> &room, int index)
        : job(job), group(group), room(room), first(group.first + index), index(index) {
        width = SAMPLES_IN_LANES ? (group.count + W - 1) / W * W : 1;
        vectors = SAMPLES_IN_LANES ? width / W : 1;
        // The last row of a flat tensor takes what remains.
        const bool is_last = !SAMPLES_IN_LANES && first == job.samples - 1;
        classes = is_last ? job.elements - first * job.classes : job.classes;
        if (SAMPLES_IN_LANES && !group.keeps_all)
            for (int k = 0; k < width; k++) counts[k] = group.label[k] < 0 ? 0 : -1;
    }

    // Goes on to the next block, if there is one; a block of a row has a vector's lanes at least.
    bool next() {
        begin += count;
        const int64_t left = classes - begin, most = SAMPLES_IN_LANES ? ROOM / width : BLOCK;
        count = left < most + (SAMPLES_IN_LANES ? 1 : W) ? left : most;
        if (count <= 0) {
            begin = count = 0;
            return false;
        }
        if (job.is_index)
            for (int k = 0; k < (SAMPLES_IN_LANES ? width : W); k++) {
                const int64_t c = group.label[SAMPLES_IN_LANES ? k : index] - begin;
                label[k] = Lane(c >= 0 && c < count ? c : -1);
            }
        return true;
    }

    // Whether the block of a tensor is used where it is in memory: as E and in full vectors.
    template <class E> bool is_direct(Storage storage) const {
        if (storage != NATIVE<E>) return false;
        if (!SAMPLES_IN_LANES) return job.inner == 1;
        return job.inner >= SIDE_BY_SIDE && group.count == width;
    }
    template <class E> Block<F, E> direct(const void *tensor) const {
        return {(E *)tensor + job.offset(first, begin), SAMPLES_IN_LANES ? job.inner : 1, false};
    }
    // In a buffer for whole rows.
    Block<F> whole(F *buffer) const { return {buffer + begin * width, width, false}; }

    template <class E> Block<F, E> load(const void *tensor, Storage storage, E *buffer) const {
        if (is_direct<E>(storage)) return direct<E>(tensor);
        each_part([&](int64_t start, int64_t at, int64_t items, int64_t n) INLINED {
            const E *values = (const E *)tensor + start;
            if (is_contiguous()) {
                if constexpr (sizeof(E) == sizeof(F))
                    LOADS<F>[storage](tensor, start, n, buffer + at, stride());
                else
                    for (int64_t i = 0; i < n; i++) buffer[at + i] = values[i * stride()];
                return;
            }
            if constexpr (sizeof(E) == sizeof(F))
                if (storage != NATIVE<F>) {
                    LOADS<F>[storage](tensor, start, n, room.storage, 1);
                    values = room.storage;
                }
            if (are_rows(items)) return to_columns(values, buffer);
            permute(items, [&](int64_t i, int64_t j) INLINED { buffer[at + j] = values[i]; });
        });
        if (group.count < width && SAMPLES_IN_LANES)
            for (int64_t k = 0; k < count; k++)
                for (int j = group.count; j < width; j++) buffer[k * width + j] = E{};
        return {buffer, width, false};
    }
    // Where the block of a result is to be written, before `store` takes it to its place.
    template <class E> Block<F, E> output(void *tensor, Storage storage, E *buffer) const {
        if (!tensor) return {nullptr, 0, false};
        if (!is_direct<E>(storage)) return {buffer, width, false};
        Block<F, E> block = direct<E>(tensor);
        const int64_t size = SAMPLES_IN_LANES ? block.stride : count;
        block.streams =
            job.streams && size % W == 0 && (uintptr_t)block.start % (W * sizeof(E)) == 0;
        return block;
    }
    template <class E> void store(void *tensor, Storage storage, const E *buffer) const {
        if (!tensor || is_direct<E>(storage)) return;
        each_part([&](int64_t start, int64_t at, int64_t items, int64_t n) INLINED {
            E *values = (E *)tensor + start;
            if (is_contiguous()) {
                if constexpr (sizeof(E) == sizeof(F))
                    STORES<F>[storage](buffer + at, n, tensor, start, stride());
                else
                    for (int64_t i = 0; i < n; i++) values[i * stride()] = buffer[at + i];
                return;
            }
            if constexpr (sizeof(E) == sizeof(F))
                if (storage != NATIVE<F>) values = room.storage;
            if (are_rows(items)) to_rows(buffer, values);
            else
                permute(items, [&](int64_t i, int64_t j) INLINED { values[i] = buffer[at + j]; });
            if constexpr (sizeof(E) == sizeof(F))
                if (storage != NATIVE<F>) STORES<F>[storage](values, n, tensor, start, 1);
        });
    }
    // The blocks of a call's tensors.
    Block<F, T> load_input() const {
        return load(job.input, job.input_storage, (T *)room.input);
    }
    Block<F, T> load_target() const {
        return load(job.target, job.target_storage, (T *)room.target);
    }
    Block<F, T> output_grad_input() const {
        return output(job.grad_input, job.input_storage, (T *)room.grad_input);
    }
    Block<F, T> output_grad_target() const {
        return output(job.grad_target, job.target_storage, (T *)room.grad_target);
    }
    void store_grad_input() const {
        store(job.grad_input, job.input_storage, (const T *)room.grad_input);
    }
    void store_grad_target() const {
        store(job.grad_target, job.target_storage, (const T *)room.grad_target);
    }

    // Whether a part has the same order in the buffer as in memory.
    bool is_contiguous() const { return !SAMPLES_IN_LANES || job.inner >= SIDE_BY_SIDE; }
    // From element to element of a part, in memory.
    int64_t stride() const { return SAMPLES_IN_LANES ? 1 : job.inner; }
    // Calls a body for the parts of the block that lie together in memory: their first element,
    // its place in the buffer, and the numbers of outer items and of elements.
    template <class Body> INLINE void each_part(Body body) const {
        if constexpr (!SAMPLES_IN_LANES) {
            body(job.offset(first, begin), int64_t(0), int64_t(1), count);
        } else if (is_contiguous()) {
            for (int64_t k = 0; k < count; k++)
                body(job.offset(first, begin + k), k * width, int64_t(1), int64_t(group.count));
        } else {
            const int64_t items = group.count / job.inner;
            const int64_t each = count == classes ? items : 1;
            for (int64_t o = 0; o < items; o += each)
                body(job.offset(first + o * job.inner, begin), o * job.inner, each,
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

    // Whether a part is all rows of the group, and those are not too short to be transposed.
    bool are_rows(int64_t items) const {
        return job.inner == 1 && items == group.count && 4 * count > W;
    }
    // The same of whole rows, in registers. What is read or written beyond a row's end belongs to
    // rows after it, and those are written later.
    template <class E> void to_columns(const E *rows, E *columns) const {
        const int64_t end = group.count * count;
        for (int o = 0; o < width; o += W)
            for (int64_t k = 0; k < count; k += W) {
                typename S::U block[W];
                for (int r = 0; r < W; r++) {
                    const int64_t first = (o + r) * count + k;
                    if (first + W <= end) {
                        block[r] = S::load_bits(rows + first);
                    } else {
                        E last[W] = {};
                        if (first < end) std::memcpy(last, rows + first, (end - first) * sizeof(E));
                        block[r] = S::load_bits(last);
                    }
                }
                S::transpose(block);
                for (int c = 0; c < W && k + c < count; c++)
                    S::store_bits(columns + (k + c) * width + o, block[c]);
            }
    }
    template <class E> void to_rows(const E *columns, E *rows) const {
        const int64_t end = group.count * count;
        for (int o = 0; o < width; o += W)
            for (int64_t k = (count - 1) / W * W; k >= 0; k -= W) {
                typename S::U block[W];
                for (int c = 0; c < W; c++)
                    block[c] = S::load_bits(columns + (k + c < count ? k + c : k) * width + o);
                S::transpose(block);
                for (int r = 0; r < W && o + r < group.count; r++) {
                    const int64_t first = (o + r) * count + k;
                    if (first + W <= end) {
                        S::store_bits(rows + first, block[r]);
                    } else {
                        E last[W];
                        S::store_bits(last, block[r]);
                        std::memcpy(rows + first, last, (end - first) * sizeof(E));
                    }
                }
            }
    }

    // Calls a body for each vector, with the accumulator of its samples.
    template <class A, class Body> INLINE void fold(A *total, Body body) const {
        const int64_t count = this->count, vectors = this->vectors;
        if constexpr (SAMPLES_IN_LANES) {
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
            return SAMPLES_IN_LANES ? S::load(values + at.v * W) : own;
        }
    };
    INLINE OfSample of_sample(const F *values) const { return {values, S::splat(values[index])}; }
    // What each class has.
    template <class At> INLINE V of_class(const F *values, At at) const {
        return SAMPLES_IN_LANES ? S::splat(values[begin + at.k]) : S::load(values + begin + at.k);
    }
    template <class At> INLINE V one_hot(At at, V on, V off) const {
        const I own = SAMPLES_IN_LANES ? I{} + Lane(at.k) : S::lanes() + Lane(at.k);
        return own == S::load(label + at.v * W) ? on : off;
    }
    // A value of samples that count, and else 0.
    template <class At> INLINE V masked(V value, At at) const {
        if (!SAMPLES_IN_LANES || group.keeps_all) return value;
        return S::load(counts + at.v * W) ? value : V{};
    }
    // From a sum per lane to one per sample, in all its lanes.
    static INLINE V over_lanes(V value) {
        return SAMPLES_IN_LANES ? value : S::splat(S::reduce_add(value));
    }

    template <class Body> INLINE void each_sample(Body body) const {
        for (int64_t v = 0; v < vectors; v++) body(v, At<F, false>{0, v, 0});
    }
    template <class At> INLINE void set_loss(V loss, At at) const {
        loss = masked(loss * of_sample(group.scale)(at), at);
        if constexpr (SAMPLES_IN_LANES) S::store(group.loss + at.v * W, loss);
        else group.loss[index] = loss[0];
    }
};

}  // namespace
}  // namespace NAMESPACE
