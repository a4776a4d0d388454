// relevance_feedback for one instruction set. A step reads the documents once: each block of columns takes its gradient
// from all of them, makes its Adam step, and adds its share to the next step's dot products while it is still in L1.

template <class T>
struct RelevanceFeedback {
  static constexpr int kBlockVectors = 64 / kWidth;  // 256 bytes of a float32 row: 100 documents fill half of L1
  static constexpr int64_t kBlockColumns = kBlockVectors * kWidth;

  const RelevanceFeedbackArgs& args;
  const FeedbackTask& task;
  const int64_t count;
  // Arrays over documents are in the order of the task, padded because vectors may start at any of them.
  float *moments, *squares;  // [size], of Adam
  float* sums;               // [documents][lanes] of the dot products
  float* dots;               // [documents] P q
  float* slopes;             // [documents] d loss / d dots
  float* targets;            // [documents] kl: probabilities of the teacher; weighted_ranknet: ranks
  int64_t* lower;            // [documents] weighted_ranknet: where the lower scores of the teacher begin
  int64_t pairs = 0;
  float scale;

  RelevanceFeedback(const RelevanceFeedbackArgs& args, const FeedbackTask& task, Arena& arena)
      : args(args), task(task), count(task.num_documents), scale(args.scale) {
    const int64_t padded = args.num_documents + kWidth;
    moments = arena.take<float>(args.size);
    squares = arena.take<float>(args.size);
    sums = arena.take<float>(args.num_documents * kWidth);
    dots = arena.take<float>(padded);
    slopes = arena.take<float>(padded);
    targets = arena.take<float>(padded);
    lower = arena.take<int64_t>(args.num_documents);
  }

  static size_t scratch_bytes(const RelevanceFeedbackArgs& args) {
    Arena arena{nullptr, 0};
    RelevanceFeedback(args, FeedbackTask{}, arena);
    return arena.used;
  }

  // torch.optim.Adam; the powers of beta are those of the step.
  struct Adam {
    static constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;
    double power1 = 1.0, power2 = 1.0;
    float step_size = 0.0f, square_scale = 0.0f;

    void advance(double learning_rate) {
      power1 *= kBeta1;
      power2 *= kBeta2;
      step_size = static_cast<float>(learning_rate / (1.0 - power1));
      square_scale = static_cast<float>(1.0 / __builtin_sqrt(1.0 - power2));
    }

    Vec apply(Vec query, Vec gradient, Vec& moment, Vec& square) const {
      constexpr float kRest1 = 1.0 - kBeta1, kRest2 = 1.0 - kBeta2;
      moment = fmadd(set1(kRest1), sub(gradient, moment), moment);
      square = fmadd(mul(set1(kRest2), gradient), gradient, mul(set1(float{kBeta2}), square));
      const Vec root = fmadd(sqrt(square), set1(square_scale), set1(float{kEpsilon}));
      return fmadd(set1(-step_size), div(moment, root), query);
    }
  };

  const T* row(int64_t i) const { return static_cast<const T*>(task.documents) + task.order[i] * args.document_stride; }

  // Vectors of one block; only the last block of a row is not whole.
  template <bool kWhole, class E>
  static Vec load_vector(const E* block, int v, int64_t columns) {
    if constexpr (kWhole) return load(block + v * kWidth);
    return load_partial(block + v * kWidth, static_cast<int>(columns - v * kWidth));
  }
  template <bool kWhole>
  static void store_vector(float* block, Vec x, int v, int64_t columns) {
    if constexpr (kWhole) return store(block + v * kWidth, x);
    store_partial(block + v * kWidth, x, static_cast<int>(columns - v * kWidth));
  }

  // Updates the columns of the query where `adam` is given, then adds their part of the dot products to the sums.
  template <bool kWhole>
  void visit_block(int64_t column, int64_t columns, const Adam* adam) {
    Vec query[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) query[v] = load_vector<kWhole>(task.query + column, v, columns);
    if (adam) {
      Vec gradient[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) gradient[v] = zero();
      for (int64_t i = 0; i < count; ++i) {
        const Vec slope = set1(slopes[i]);
        const T* const document = row(i) + column;
        for (int v = 0; v < kBlockVectors; ++v)
          gradient[v] = fmadd(slope, load_vector<kWhole>(document, v, columns), gradient[v]);
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        Vec moment = load_vector<kWhole>(moments + column, v, columns);
        Vec square = load_vector<kWhole>(squares + column, v, columns);
        query[v] = adam->apply(query[v], gradient[v], moment, square);
        store_vector<kWhole>(moments + column, moment, v, columns);
        store_vector<kWhole>(squares + column, square, v, columns);
        store_vector<kWhole>(task.query + column, query[v], v, columns);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* const document = row(i) + column;
      Vec sum = zero();  // of the block alone: rounding errors grow with its length and the number of blocks
      for (int v = 0; v < kBlockVectors; ++v) sum = fmadd(query[v], load_vector<kWhole>(document, v, columns), sum);
      store(sums + i * kWidth, add(load(sums + i * kWidth), sum));
    }
  }

  void visit_documents(const Adam* adam) {
    for (int64_t i = 0; i < count; ++i) store(sums + i * kWidth, zero());
    int64_t column = 0;
    for (; column + kBlockColumns <= args.size; column += kBlockColumns) visit_block<true>(column, kBlockColumns, adam);
    if (column < args.size) visit_block<false>(column, args.size - column, adam);
    for (int64_t i = 0; i < count; ++i) dots[i] = reduce_add(load(sums + i * kWidth));
  }

  float range_of_dots() const {
    float low = dots[0], high = dots[0];
    for (int64_t i = 0; i < count; ++i) {
      if (dots[i] != dots[i]) return dots[i];  // comparisons would drop a NaN
      low = smaller(low, dots[i]);
      high = larger(high, dots[i]);
    }
    return high - low;
  }

  // Writes out_i = exp(factor (x_i - highest)), whose padding is 0, and returns the sum.
  float exponentials(const float* x, float highest, float factor, float* out) const {
    Vec sum = zero();
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec e = exp(mul(set1(factor), sub(load(x + i), set1(highest))));
      const Vec kept = keep(e, 0, static_cast<int>(smaller(count - i, int64_t{kWidth})), zero());
      store(out + i, kept);
      sum = add(sum, kept);
    }
    return reduce_add(sum);
  }

  void prepare_kl() {
    for (int64_t i = 0; i < count; ++i) targets[i] = task.teacher[i];
    const float sum = exponentials(targets, targets[0], 1.0f, targets);
    for (int64_t i = 0; i < count; ++i) targets[i] /= sum;
  }

  // d loss / d dots = scale (softmax(scale dots) - targets)
  void kl_slopes() {
    float highest = dots[0];
    for (int64_t i = 1; i < count; ++i) highest = larger(highest, dots[i]);
    const Vec inverse = set1(1.0f / exponentials(dots, highest, scale, slopes));
    for (int64_t i = 0; i < count; i += kWidth)
      store(slopes + i, mul(set1(scale), sub(mul(load(slopes + i), inverse), load(targets + i))));
  }

  void prepare_ranknet() {
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      while (end < count && task.teacher[end] == task.teacher[begin]) ++end;
      for (int64_t i = begin; i < end; ++i) {
        targets[i] = static_cast<float>(begin + 1);
        lower[i] = end;
      }
      pairs += (end - begin) * (count - end);
    }
  }

  // A pair pulls its documents apart by scale / pairs * sigmoid(scale (dot_j - dot_i)) / (r_i + r_j): one division.
  void ranknet_slopes() {
    for (int64_t i = 0; i < count + kWidth; ++i) slopes[i] = 0.0f;
    const Vec unit = set1(scale / static_cast<float>(pairs));
    for (int64_t i = 0; i < count; ++i) {
      const Vec dot = set1(dots[i]), rank = set1(targets[i]);
      Vec sum = zero();
      for (int64_t j = lower[i]; j < count; j += kWidth) {
        // Beyond 80 the sigmoid is below any float that the sums could notice. NaN passes min.
        const Vec margin = min(set1(80.0f), mul(set1(scale), sub(dot, load(dots + j))));
        const Vec ranks = add(rank, load(targets + j));
        const Vec pull = keep(div(unit, mul(ranks, add(set1(1.0f), exp(margin)))), 0,
                              static_cast<int>(smaller(count - j, int64_t{kWidth})), zero());
        store(slopes + j, add(load(slopes + j), pull));
        sum = add(sum, pull);
      }
      slopes[i] -= reduce_add(sum);
    }
  }

  void optimise() {
    visit_documents(nullptr);
    if (scale == 0.0f) {
      const float range = range_of_dots(), range_of_teacher = task.teacher[0] - task.teacher[count - 1];
      if (range == 0.0f || range_of_teacher == 0.0f) return;
      scale = 0.5f * range_of_teacher / range;
    }
    for (int64_t i = 0; i < args.size; ++i) moments[i] = squares[i] = 0.0f;
    const bool kl = args.loss == FeedbackLoss::kKl;
    kl ? prepare_kl() : prepare_ranknet();
    Adam adam;
    for (int64_t step = 0; step < args.num_steps; ++step) {
      adam.advance(args.learning_rate);
      kl ? kl_slopes() : ranknet_slopes();
      visit_documents(&adam);
    }
  }

  static void run(const RelevanceFeedbackArgs& args, const FeedbackTask& task, void* scratch) {
    Arena arena{static_cast<char*>(scratch), 0};
    RelevanceFeedback(args, task, arena).optimise();
  }

  static FeedbackKernels kernels() { return {scratch_bytes, run}; }
};
