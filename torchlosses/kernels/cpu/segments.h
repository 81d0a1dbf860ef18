// Groups of samples, and the segments that threads are given.

namespace NAMESPACE {
namespace {

// Looks up the labels and weights of samples.
template <class F> void prepare(Job &job, Group<F> &group) {
    const F *sample_weight = job.weighs_elements ? nullptr : (const F *)job.sample_weight;
    const F *weight = job.only_target_class ? (const F *)job.weight : nullptr;
    const F *upstream = (const F *)job.upstream;
    const F factor = F((upstream && !job.has_upstreams ? *upstream : F(1)) / job.divisor);
    const F lift = F(job.weighs_elements ? 1 : job.lift);
    if (!job.has_upstreams || job.per_element()) upstream = nullptr;
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
    const int n = group.count;
    for (int j = 0; j < n; j++) group.scale[j] = lift;
    for (int j = 0; j < n && sample_weight; j++) group.scale[j] *= sample_weight[group.first + j];
    for (int j = 0; j < n && weight; j++)
        if (group.label[j] >= 0) group.scale[j] *= weight[group.label[j]];
    for (int j = 0; j < n; j++) group.factor[j] = group.scale[j] * factor;
    for (int j = 0; j < n && upstream; j++) group.factor[j] *= upstream[group.first + j];
    for (int j = group.count; j < end; j++) {
        group.scale[j] = group.factor[j] = group.loss[j] = 0;
        group.label[j] = -1;
    }
}

template <class F, bool SAMPLES_IN_LANES, class T, bool INDEX, Kind KIND>
void run_loss(Tile<F, SAMPLES_IN_LANES, T> &tile) {
    const Job &job = tile.job;
    if constexpr (!COUPLES_CLASSES[KIND])
        elementwise<F, SAMPLES_IN_LANES, T, INDEX, KIND>(job, tile);
    else if (INDEX && job.only_target_class) logits_of_class<F, SAMPLES_IN_LANES, T>(job, tile);
    else logits<F, SAMPLES_IN_LANES, T, INDEX>(job, tile);
}

template <class F, bool SAMPLES_IN_LANES, class T>
void run_tile(const Job &job, Group<F> &group, const Room<F> &room, int index) {
    Tile<F, SAMPLES_IN_LANES, T> tile(job, group, room, index);
    if (!SAMPLES_IN_LANES && job.is_index && group.label[index] < 0) {
        void *losses = job.per_element() && job.reduction == NONE ? job.losses : nullptr;
        group.loss[index] = 0;
        while (tile.next()) {
            const auto slope = tile.output_grad_input();
            const auto loss = tile.output(losses, NATIVE<F>, room.exponentials);
            if (slope) std::memset(slope.start, 0, tile.count * sizeof(T));
            if (loss) std::memset(loss.start, 0, tile.count * sizeof(F));
            tile.store_grad_input();
        }
        return;
    }
    switch (job.kind) {
#define RUN(KIND, ...)                                               \
    case KIND:                                                       \
        return job.is_index ? run_loss<F, SAMPLES_IN_LANES, T, true, KIND>(tile) \
                            : run_loss<F, SAMPLES_IN_LANES, T, false, KIND>(tile);
        LOSSES(RUN)
#undef RUN
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
            STORES<F>[storage](nans, n, tensor, job.offset(sample, c), job.inner);
        }
    };
    load_labels(job, group.first, group.count, labels);
    for (int j = 0; j < group.count; j++) {
        if (group.label[j] >= 0 || labels[j] == job.ignore_index) continue;
        group.loss[j] = nan;
        fill(job.grad_input, job.input_storage, group.first + j);
        if (job.per_element() && job.reduction == NONE)
            fill(job.losses, NATIVE<F>, group.first + j);
    }
}

template <class F> double sum_losses(const Group<F> &group) {
    using D = Vectors<double>;
    typedef F Part __attribute__((vector_size(D::W * sizeof(F)), aligned(sizeof(F))));
    typename D::V total{};
    for (int j = 0; j < group.count; j += D::W)
        total += __builtin_convertvector(*(const Part *)(group.loss + j), typename D::V);
    return D::reduce_add(total);
}

// Segments `begin` to `end` of a job.
template <class F, class T> void run_segments(int64_t begin, int64_t end, void *context) {
    constexpr int W = Vectors<F>::W;
    Job &job = *(Job *)context;
    const int64_t most = job.samples < job.group ? job.samples : job.group;
    const int64_t width = job.samples_in_lanes ? (most + 15) / 16 * 16 : 1;
    int64_t block = BLOCK + Vectors<F>::W, row = job.classes * width;
    if (job.samples_in_lanes) block = row < ROOM ? row : ROOM;
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
    for (int64_t segment = begin; segment < end; segment++) {
        int64_t last = (segment + 1) * job.segment;
        if (last > job.samples) last = job.samples;
        double total = 0;
        for (int64_t sample = segment * job.segment; sample < last; sample += group.count) {
            int64_t n = last - sample < job.group ? last - sample : job.group;
            bool is_few = false;
            if (job.samples_in_lanes && job.inner >= SIDE_BY_SIDE) {
                const int64_t left = job.inner - sample % job.inner;
                if (left < n) n = left;
                if (n > W && job.classes >= LEAST_ROW) n -= n % W;  // Full vectors, then the rest.
                is_few = n < W && n <= FEW && job.classes >= LEAST_ROW;
            }
            group.first = sample;
            group.count = int(n);
            prepare(job, group);
            if (job.reads_one()) probabilities_of_class<F, T>(job, group);
            else if (job.samples_in_lanes && !is_few) run_tile<F, true, T>(job, group, room, 0);
            else for (int j = 0; j < n; j++) run_tile<F, false, T>(job, group, room, j);
            if (group.has_bad) spoil(job, group);
            total += sum_losses(group);
            if (job.reduction == NONE && !job.per_element())
                std::memcpy((F *)job.losses + sample, group.loss, n * sizeof(F));
        }
        job.sums[segment] = total;
    }
    std::free(memory);
    if (job.streams) Vectors<F>::end_streams();
}

}  // namespace

// How a job is cut into groups, and what runs its segments.
void plan(Job &job) {
    if (job.is_flat) {  // Rows of any length will do, and the last takes what remains.
        const int width = BYTES / (job.is_double ? 8 : 4);
        job.inner = 1;
        job.classes = job.elements < width ? 1 : job.elements < 4096 ? job.elements : 4096;
        job.samples = job.elements / job.classes;
        job.weighs_elements &= job.classes > 1;
    }
    job.samples_in_lanes = job.inner > 1 || job.classes < (job.is_flat ? 2 : LEAST_ROW);
    if (job.inner <= FEW && job.classes > ROOM / 16) job.samples_in_lanes = false;
    job.group = 64;
    if (job.samples_in_lanes) {
        const int64_t fitting = ROOM / job.classes / 16 * 16;
        job.group = fitting < 16 ? 16 : fitting > GROUP ? GROUP : fitting;
        if (job.inner < SIDE_BY_SIDE) {
            if (job.group > 64) job.group = 64;
            job.group = job.group / job.inner * job.inner;
        }
    }
    const bool is_half = job.input_storage == BFLOAT16 && !job.is_double &&
                         (job.is_index || job.target_storage == BFLOAT16);
    job.run = job.is_double ? run_segments<double, double>
              : is_half     ? run_segments<float, Bfloat16>
                            : run_segments<float, float>;
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
