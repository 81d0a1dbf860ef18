// The losses. job.h includes the list, and kernels.h the rest, for each instruction set.

#ifndef LOSSES
// Name, whether there is a loss for each element, and whether the slope of an element depends on
// its whole row. If not, the loss has a `Term`.
#define LOSSES(X)                                   \
    X(SQUARES, "squares", true, false)              \
    X(PROBABILITIES, "probabilities", false, false) \
    X(LOGITS, "logits", false, true)
#else

namespace NAMESPACE {
namespace {

// Targets: smoothed, and made on the spot from class indices.
template <class F, bool SAMPLES_IN_LANES, class T, bool INDEX> struct Soft {
    using S = Vectors<F>;
    using V = typename S::V;
    const Tile<F, SAMPLES_IN_LANES, T> &tile;
    const F *weight;
    V rest, uniform, on;
    bool is_smooth;
    Block<F, T> target{};

    Soft(const Job &job, const Tile<F, SAMPLES_IN_LANES, T> &tile)
        : tile(tile), weight((const F *)job.weight), rest(S::splat(F(1 - job.smoothing))),
          uniform(S::splat(F(job.uniform))), on(rest + uniform), is_smooth(job.is_smooth) {
        if (!INDEX) target = tile.load_target();
    }
    template <class At> INLINE V value(At at) const {
        if constexpr (INDEX) return tile.one_hot(at, on, uniform);
        V t = target.get(at);
        return is_smooth ? t * rest + uniform : t;
    }
    template <class At> INLINE V weighted(V t, At at) const {
        return weight ? t * tile.of_class(weight, at) : t;
    }
    // From the derivative by a smoothed target to that by the target.
    INLINE V slope(V by_soft) const { return by_soft * rest; }
};

// An element's part of a loss that does not couple classes: its value times a weight, and its
// derivatives by input and target times a factor. To add such a loss, add its term and a line to
// `LOSSES`.
template <class F, Kind> struct Term;

// The parameters of losses, where no store can change them.
template <class F> struct Parameters {
    typename Vectors<F>::V delta;
    bool is_guarded;
    explicit Parameters(const Job &job)
        : delta(Vectors<F>::splat(F(job.delta))), is_guarded(job.is_guarded) {}
};

template <class F> struct Term<F, SQUARES> {
    using V = typename Vectors<F>::V;
    V difference;

    INLINE Term(const Parameters<F> &, V y, V t) : difference(y - t) {}
    INLINE V value(V weight) const { return weight * difference * (difference * F(0.5)); }
    INLINE V by_input(V factor) const { return difference * factor; }
    INLINE V by_target(V factor) const { return -difference * factor; }
};

template <class F> struct Term<F, PROBABILITIES> {
    using V = typename Vectors<F>::V;
    V t, guarded, log;

    INLINE Term(const Parameters<F> &given, V y, V t) : t(t), guarded(y + given.delta) {
        // Without a guard 0·log 0 is 0, but a class weight of 0 leaves it NaN.
        if (!given.is_guarded)
            guarded = ((t == F(0)) & (guarded == F(0))) ? Vectors<F>::splat(1) : guarded;
        log = logarithm<F>(guarded);
    }
    INLINE V value(V weight) const { return -(weight * t) * log; }
    INLINE V by_input(V factor) const { return -t * factor / guarded; }
    INLINE V by_target(V factor) const { return -log * factor; }
};

template <class F, bool SAMPLES_IN_LANES, class T, bool INDEX, Kind KIND>
void elementwise(const Job &job, Tile<F, SAMPLES_IN_LANES, T> &tile) {
    using S = Vectors<F>;
    using V = typename S::V;
    const Room<F> &room = tile.room;
    void *each_loss = job.per_element() && job.reduction == NONE ? job.losses : nullptr;
    const bool has_upstreams = each_loss && job.has_upstreams;
    const auto scale = tile.of_sample(tile.group.scale), factor = tile.of_sample(tile.group.factor);
    const V lift = S::splat(F(job.lift));
    const Parameters<F> given(job);
    V losses[Tile<F, SAMPLES_IN_LANES, T>::VECTORS] = {};
    while (tile.next()) {
        const auto y = tile.load_input();
        const Soft<F, SAMPLES_IN_LANES, T, INDEX> soft(job, tile);
        Block<F> w{}, u{};
        if (job.weighs_elements) w = tile.template direct<F>(job.sample_weight);
        if (has_upstreams) u = tile.load(job.upstream, NATIVE<F>, room.gated);
        const auto slope = tile.output_grad_input();
        const auto slope_t = tile.output_grad_target();
        const auto loss = tile.output(each_loss, NATIVE<F>, room.exponentials);
        // Apart, so that nothing is decided for each vector in the loops that training runs.
        if (w || u || loss || slope_t || soft.weight) {
            tile.add(losses, [&](V &total, auto at) INLINED {
                const Term<F, KIND> term(given, y.get(at), soft.value(at));
                V weight = soft.weighted(S::splat(1), at), f = factor(at);
                if (w) weight *= w.get(at) * lift;
                f *= weight;
                if (u) f *= u.get(at);
                const V value = term.value(weight);
                if (loss) loss.set(at, tile.masked(scale(at) * value, at));
                total += at.unseen(value);
                if (slope) slope.set(at, tile.masked(term.by_input(f), at));
                if (slope_t) slope_t.set(at, soft.slope(term.by_target(f)));
            });
        } else if (slope) {
            tile.add(losses, [&](V &total, auto at) INLINED {
                const Term<F, KIND> term(given, y.get(at), soft.value(at));
                total += at.unseen(term.value(S::splat(1)));
                slope.set(at, tile.masked(term.by_input(factor(at)), at));
            });
        } else {
            tile.add(losses, [&](V &total, auto at) INLINED {
                const Term<F, KIND> term(given, y.get(at), soft.value(at));
                total += at.unseen(term.value(S::splat(1)));
            });
        }
        tile.store_grad_input();
        tile.store_grad_target();
        tile.store(each_loss, NATIVE<F>, room.exponentials);
    }
    tile.each_sample([&](int64_t v, auto at) INLINED {
        tile.set_loss(tile.over_lanes(losses[v]), at);
    });
}

// The exponentials of a tile's logits, less the greatest.
template <class F, bool SAMPLES_IN_LANES, class T> struct Softmax {
    using S = Vectors<F>;
    using V = typename S::V;
    Tile<F, SAMPLES_IN_LANES, T> &tile;
    const bool keeps;   // The exponentials, for later passes;
    const bool copies;  // and the logits in their place, if they have to be brought together or
                        // converted.
    V most[Tile<F, SAMPLES_IN_LANES, T>::VECTORS];

    // Of a block.
    struct Source {
        const Softmax &softmax;
        Block<F> saved;
        Block<F, T> logits;

        template <class At> INLINE V difference(At at) const {
            return (softmax.copies ? saved.get(at) : logits.get(at)) - softmax.most[at.v];
        }
        template <class At> INLINE V exponent(At at) const {
            return softmax.keeps ? saved.get(at) : exponential<F>(difference(at));
        }
        template <class At> INLINE V make_exponent(V difference, At at) const {
            const V value = exponential<F>(difference);
            if (softmax.keeps) saved.set(at, value);
            return value;
        }
    };

    Softmax(const Job &job, Tile<F, SAMPLES_IN_LANES, T> &tile, bool is_needed)
        : tile(tile), keeps(is_needed && tile.classes * tile.width <= ROW),
          copies(keeps && (SAMPLES_IN_LANES || !tile.template is_direct<T>(job.input_storage))) {
        for (int v = 0; v < tile.vectors; v++) most[v] = S::splat(-F(INFINITY));
        while (tile.next()) {
            const auto x = tile.load_input();
            const auto copy = saved_exponentials();
            if constexpr (!SAMPLES_IN_LANES && sizeof(T) < sizeof(F))
                if (!copies && tile.count >= 2 * S::W) {
                    most[0] = S::max(max_of_pairs(x.start, tile.count), most[0]);
                    continue;
                }
            tile.fold(most, [&](V &m, auto at) INLINED {
                V z = x.get(at);
                m = S::max(z, m);
                if (copies) copy.set(at, z);
            });
        }
        if (!SAMPLES_IN_LANES) most[0] = S::splat(S::reduce_max(most[0]));
    }
    // The maximum of elements that lie two in a lane; the last lanes overlap those before.
    static INLINE V max_of_pairs(const T *from, int64_t count) {
        V low = S::splat(-F(INFINITY)), high = low;
        for (int64_t k = 0; k < count; k += 2 * S::W) {
            const int64_t at = k + 2 * S::W <= count ? k : count - 2 * S::W;
            const auto bits = (typename S::U)S::load((const F *)(from + at));
            low = S::max((V)(bits << 16), low);
            high = S::max((V)(bits & 0xffff0000), high);
        }
        return S::max(low, high);
    }
    Block<F> saved_exponentials() const { return tile.whole(tile.room.exponentials); }
    // Of the block at hand: with what has been saved, or else with logits.
    Source source(bool has_saved = true) const {
        const bool needs_logits = !(has_saved ? keeps : copies);
        return {*this, saved_exponentials(), needs_logits ? tile.load_input() : Block<F, T>{}};
    }
};

template <class F, bool SAMPLES_IN_LANES, class T, bool INDEX>
void logits(const Job &job, Tile<F, SAMPLES_IN_LANES, T> &tile) {
    using S = Vectors<F>;
    using V = typename S::V;
    struct Sums {
        V exponents, loss, gated;
        INLINE void operator+=(const Sums &part) {
            exponents += part.exponents, loss += part.loss, gated += part.gated;
        }
    };
    const Room<F> &room = tile.room;
    const V delta = V{} + F(job.delta), least = V{} - F(INFINITY);
    const bool is_guarded = job.is_guarded, is_learning = job.grad_input != nullptr;
    const auto factor = tile.of_sample(tile.group.factor);
    const Softmax<F, SAMPLES_IN_LANES, T> softmax(job, tile, true);
    const bool is_at_hand =
        INDEX || (!SAMPLES_IN_LANES && tile.template is_direct<T>(job.target_storage));
    const bool keeps = softmax.keeps && is_learning && (is_guarded || !is_at_hand);
    constexpr int VECTORS = Tile<F, SAMPLES_IN_LANES, T>::VECTORS;
    V inverse[VECTORS], log_sum[VECTORS];
    Sums sums[VECTORS];
    for (int v = 0; v < tile.vectors; v++) sums[v] = Sums{};
    while (tile.next()) {
        const auto x = softmax.source(false);
        if (is_guarded) {
            tile.add(sums, [&](Sums &total, auto at) INLINED {
                total.exponents += at.unseen(x.make_exponent(x.difference(at), at));
            });
            continue;
        }
        const Soft<F, SAMPLES_IN_LANES, T, INDEX> soft(job, tile);
        const auto gated = tile.whole(room.gated);
        tile.add(sums, [&](Sums &total, auto at) INLINED {
            const V t = soft.value(at), wt = soft.weighted(t, at), z = x.difference(at);
            total.exponents += at.unseen(x.make_exponent(z, at));
            total.loss -= at.unseen(wt * (((t == F(0)) & (z == least)) ? V{} : z));
            total.gated += at.unseen(wt);
            if (keeps) gated.set(at, wt);
        });
    }
    tile.each_sample([&](int64_t v, auto) INLINED {
        const V sum = tile.over_lanes(sums[v].exponents);
        inverse[v] = F(1) / sum;
        log_sum[v] = logarithm<F>(sum);
    });
    while (is_guarded && tile.next()) {
        const auto x = softmax.source();
        const Soft<F, SAMPLES_IN_LANES, T, INDEX> soft(job, tile);
        const auto gated = tile.whole(room.gated);
        const auto slope_t = tile.output_grad_target();
        tile.add(sums, [&](Sums &total, auto at) INLINED {
            const V wt = soft.weighted(soft.value(at), at), p = x.exponent(at) * inverse[at.v];
            const V guarded = p + delta, log = logarithm_of_normal<F>(guarded, V{});
            const V g = is_learning ? wt * (p / guarded) : V{};
            total.loss -= at.unseen(wt * log);
            total.gated += at.unseen(g);
            if (keeps) gated.set(at, g);
            if (slope_t) slope_t.set(at, soft.slope(soft.weighted(-log, at) * factor(at)));
        });
        tile.store_grad_target();
    }
    while (!is_guarded && job.grad_target && tile.next()) {
        const auto x = tile.load_input();
        const Soft<F, SAMPLES_IN_LANES, T, INDEX> soft(job, tile);
        const auto slope_t = tile.output_grad_target();
        tile.each([&](auto at) INLINED {
            const V t = soft.value(at), log = x.get(at) - softmax.most[at.v] - log_sum[at.v];
            const V finite = ((t == F(0)) & (log == least)) ? V{} : log;
            slope_t.set(at, soft.slope(soft.weighted(-finite, at) * factor(at)));
        });
        tile.store_grad_target();
    }
    tile.each_sample([&](int64_t v, auto at) INLINED {
        sums[v].gated = tile.over_lanes(sums[v].gated);
        const V loss = tile.over_lanes(sums[v].loss);
        tile.set_loss(is_guarded ? loss : loss + log_sum[v] * sums[v].gated, at);
    });
    if (!is_learning) return;
    while (tile.next()) {
        const auto x = softmax.source();
        const auto slope = tile.output_grad_input();
        const auto write = [&](auto gated) INLINED {
            tile.each([&](auto at) INLINED {
                V p = x.exponent(at) * inverse[at.v];
                V g = (p * sums[at.v].gated - gated(p, at)) * factor(at);
                slope.set(at, tile.masked(g, at));
            });
        };
        if (keeps) {
            const auto gated = tile.whole(room.gated);
            write([&](V, auto at) INLINED { return gated.get(at); });
        } else {
            const Soft<F, SAMPLES_IN_LANES, T, INDEX> soft(job, tile);
            write([&](V p, auto at) INLINED {
                V wt = soft.weighted(soft.value(at), at);
                return is_guarded ? wt * (p / (p + delta)) : wt;
            });
        }
        tile.store_grad_input();
    }
}

// −log(p_c + δ) of one class per sample.
template <class F, bool SAMPLES_IN_LANES, class T>
void logits_of_class(const Job &job, Tile<F, SAMPLES_IN_LANES, T> &tile) {
    using S = Vectors<F>;
    using V = typename S::V;
    const Group<F> &group = tile.group;
    const Softmax<F, SAMPLES_IN_LANES, T> softmax(job, tile, SAMPLES_IN_LANES || job.grad_input);
    struct Sums {
        V exponents, own;  // The other has one summand: what the sample's class has.
        INLINE void operator+=(const Sums &part) { exponents += part.exponents, own += part.own; }
    };
    constexpr int VECTORS = Tile<F, SAMPLES_IN_LANES, T>::VECTORS;
    Sums sums[VECTORS];
    for (int v = 0; v < tile.vectors; v++) sums[v] = Sums{};
    while (tile.next()) {
        const auto x = softmax.source(false);
        tile.add(sums, [&](Sums &total, auto at) INLINED {
            const V z = x.difference(at);
            total.exponents += at.unseen(x.make_exponent(z, at));
            if (SAMPLES_IN_LANES) total.own += tile.one_hot(at, z, V{});
        });
    }
    if (!SAMPLES_IN_LANES) {
        F z;
        const int64_t offset = job.offset(tile.first, group.label[tile.index]);
        LOADS<F>[job.input_storage](job.input, offset, 1, &z, 1);
        sums[0].own = S::splat(z) - softmax.most[0];
    }
    V gates[VECTORS], factors[VECTORS];
    V own{};  // The slope of the one sample's class.
    tile.each_sample([&](int64_t v, auto at) INLINED {
        const V total = tile.over_lanes(sums[v].exponents), exponent = exponential<F>(sums[v].own);
        V gate = S::splat(1), log;
        if (job.is_guarded) {
            V p = exponent / total, guarded = p + F(job.delta);
            log = logarithm<F>(guarded);
            gate = p / guarded;
        } else {
            log = sums[v].own - logarithm<F>(total);
        }
        tile.set_loss(-log, at);
        gates[v] = gate * tile.of_sample(group.factor)(at);
        factors[v] = gates[v] / total;
        own = exponent * factors[v] - gates[v];
    });
    if (!job.grad_input) return;
    while (tile.next()) {
        const auto x = softmax.source();
        const auto slope = tile.output_grad_input();
        tile.each([&](auto at) INLINED {
            V g = x.exponent(at) * factors[at.v];
            if (SAMPLES_IN_LANES) g -= tile.one_hot(at, gates[at.v], V{});
            slope.set(at, tile.masked(g, at));
        });
        const int64_t c = group.label[tile.index] - tile.begin;
        if (!SAMPLES_IN_LANES && c >= 0 && c < tile.count) store_cast(own[0], slope.start[c]);
        tile.store_grad_input();
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

// Sets the slopes of samples side by side: each by its class, and 0 by all others.
template <class F, class T>
void spread(const F *slope, const int64_t *label, int n, T *to, int64_t classes, int64_t stride,
            bool streams) {
    using S = Vectors<F>;
    using V = typename S::V;
    using Lane = typename Bits<F>::Signed;
    Lane own[GROUP];
    for (int j = 0; j < n; j++) own[j] = Lane(label[j]);
    streams &= stride % S::W == 0 && (uintptr_t)to % (S::W * sizeof(T)) == 0;
    for (int64_t c = 0; c < classes; c++, to += stride) {
        int j = 0;
        for (; j + S::W <= n; j += S::W) {
            const auto is_own = S::load(own + j) == Lane(c);
            const V value = is_own ? S::load(slope + j) : V{};
            streams ? S::stream(to + j, value) : S::store(to + j, value);
        }
        for (; j < n; j++) store_cast(own[j] == c ? slope[j] : F(0), to[j]);
    }
}

// −log(y_c + δ) of one class per sample; no other element is read.
template <class F, class T> void probabilities_of_class(const Job &job, Group<F> &group) {
    using S = Vectors<F>;
    using V = typename S::V;
    const bool is_native = job.input_storage == NATIVE<T>;
    const int64_t size = SIZES[job.input_storage];
    char *grad = (char *)job.grad_input;
    // Calls a body for the samples that lie side by side: the first, how many, and their place.
    const auto each_part = [&](auto body) INLINED {
        for (int j = 0, n; j < group.count; j += n) {
            const int64_t sample = group.first + j, left = group.count - j;
            const int64_t most = job.inner == 1 ? 1 : job.inner - sample % job.inner;
            n = int(most < left ? most : left);
            body(j, n, job.offset(sample, 0));
        }
    };
    F y[GROUP];
    for (int j = 0; j < GROUP; j += S::W) S::store(y + j, S::splat(1));
    each_part([&](int first, int n, int64_t start) INLINED {
        for (int j = first; j < first + n; j++, start++) {
            const int64_t c = group.label[j], at = start + c * job.inner;
            if (c < 0) continue;
            if (is_native) y[j] = load_cast<F>(((const T *)job.input)[at]);
            else LOADS<F>[job.input_storage](job.input, at, 1, y + j, 1);
        }
    });
    for (int j = 0; j < group.count; j += S::W) {
        V guarded = S::load(y + j) + F(job.delta);
        S::store(group.loss + j, -logarithm<F>(guarded) * S::load(group.scale + j));
        S::store(y + j, -S::load(group.factor + j) / guarded);
    }
    for (int j = 0; j < group.count; j++)
        if (group.label[j] < 0) group.loss[j] = 0;
    if (!grad) return;
    if (job.inner == 1)
        clear<F>(grad + job.offset(group.first, 0) * size, group.count * job.classes * size,
                 job.streams);
    each_part([&](int first, int n, int64_t start) INLINED {
        if (is_native && job.inner >= SIDE_BY_SIDE && job.classes <= ROOM)
            return spread(y + first, group.label + first, n, (T *)grad + start, job.classes,
                          job.inner, job.streams);
        for (int64_t c = 0; c < job.classes && job.inner > 1; c++)
            std::memset(grad + (start + c * job.inner) * size, 0, n * size);
        for (int j = first; j < first + n; j++, start++) {
            const int64_t c = group.label[j];
            if (c >= 0) STORES<F>[job.input_storage](y + j, 1, grad, start + c * job.inner, 1);
        }
    });
}

}  // namespace
}  // namespace NAMESPACE

#endif
