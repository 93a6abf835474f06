#include "loss.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

namespace mixloader {
namespace {

// Logits worth starting a thread for: some 80 microseconds of work, where a
// thread takes 20 to 50 to start. One that is started anew needs no care when
// a process forks, and has the rounding mode of its caller.
constexpr std::size_t kThreadLogits = 1 << 17;
// Threads take rows of so many bytes of gradient at a time: those of a huge
// page, which the kernel would zero twice if two threads came to it at once.
constexpr std::size_t kShareBytes = 1 << 21;

// As STATISTICS in mixloader/stats.py, in its order.
enum Statistic : std::size_t {
  kTokens,
  kLoss,
  kLossSquared,
  kExcess,
  kEntropy,
  kCorrect,
  kEl2n,
  kBytes,
  kBad
};
static_assert(kBad + 1 == kStatistics);
constexpr std::array<double, kStatistics> kScales{
    1, 0x1p24, 0x1p16, 0x1p24, 0x1p24, 1, 0x1p24, 1, 1};
constexpr std::array<double, kStatistics> kClamps{
    1, 0x1p10, 0x1p20, 0x1p10, 0x1p10, 1, 2, 0x1p16, 1};

// What is known of a row with a valid target.
struct RowLoss {
  float nll = 0.0f;
  float loss = 0.0f;  // as returned
  float entropy = 0.0f;
  float el2n = 0.0f;
  bool correct = false;
};

class LossRows {
 public:
  LossRows(const LossCall& call, const LossLevel& level)
      : call_(call),
        kernels_(level.kernels[static_cast<std::size_t>(call.type)]),
        row_bytes_(call.classes * (call.type == LogitType::kFloat32 ? 4 : 2)) {}

  std::size_t row_bytes() const { return row_bytes_; }

  // One row, counted in `sums`.
  void compute(std::size_t row, std::span<std::int64_t> sums) const;

 private:
  bool is_valid(std::int64_t target) const;
  float weight(std::size_t row, std::int64_t domain) const;
  RowLoss loss(const RowSums& sums, float weight) const;
  void write_gradient(std::size_t row, std::size_t target, float weight) const;
  void count(std::size_t row, std::int64_t target, std::int64_t domain,
             const RowLoss& found, std::span<std::int64_t> sums) const;

  const LossCall& call_;
  const RowKernels kernels_;
  const std::size_t row_bytes_;
};

bool LossRows::is_valid(std::int64_t target) const {
  return target >= 0 && static_cast<std::uint64_t>(target) < call_.classes &&
         target != call_.options.ignore_index;
}

void LossRows::compute(std::size_t row, std::span<std::int64_t> sums) const {
  const std::int64_t target = call_.targets[row];
  const std::int64_t domain = call_.domain_ids.size() > 0
                                  ? call_.domain_ids[row / call_.rows_per_id]
                                  : -1;
  RowLoss found;
  if (is_valid(target)) {
    const auto y = static_cast<std::size_t>(target);
    const float factor = weight(row, domain);
    if (!call_.losses.empty()) {
      const LossOptions& options = call_.options;
      const bool all = options.label_smoothing > 0.0f ||
                       (options.distribution && !sums.empty());
      const RowSums of_row = kernels_.sums(call_.logits[row], call_.classes, y,
                                           options.softcap, all);
      call_.tops[row] = of_row.top;
      call_.totals[row] = of_row.total;
      found = loss(of_row, factor);
    }
    if (call_.gradient) write_gradient(row, y, factor);
  } else if (call_.gradient) {
    std::memset(call_.gradient[row], 0, row_bytes_);
  }
  if (!call_.losses.empty()) call_.losses[row] = found.loss;
  if (!sums.empty()) count(row, target, domain, found, sums);
}

float LossRows::weight(std::size_t row, std::int64_t domain) const {
  float result = call_.token_weights.empty() ? 1.0f : call_.token_weights[row];
  const auto& weights = call_.domain_weights;
  if (domain >= 0 && static_cast<std::uint64_t>(domain) < weights.size()) {
    result *= weights[static_cast<std::size_t>(domain)];
  }
  return result;
}

RowLoss LossRows::loss(const RowSums& sums, float weight) const {
  const LossOptions& options = call_.options;
  const float log_total = std::log(sums.total);
  RowLoss result;
  result.nll = log_total - (sums.target - sums.top);
  float loss = result.nll;
  if (options.label_smoothing > 0.0f) {
    loss = (1.0f - options.label_smoothing) * loss +
           options.label_smoothing * (log_total + sums.spread);
  }
  if (options.z_loss > 0.0f) {
    const float lse = sums.top + log_total;
    loss += options.z_loss * lse * lse;
  }
  result.loss = loss * weight;
  if (options.distribution) {
    const float p = std::exp(sums.target - sums.top) / sums.total;
    const float missing = (1.0f - p) * (1.0f - p);
    // The other classes' squares: of a sum of 1 - p they are no more than its
    // square, whatever was rounded.
    const float others = std::clamp(
        sums.second / (sums.total * sums.total) - p * p, 0.0f, missing);
    result.entropy = log_total - sums.first / sums.total;
    result.el2n = std::sqrt(missing + others);
    result.correct = sums.target >= sums.top;
  }
  return result;
}

void LossRows::write_gradient(std::size_t row, std::size_t target,
                              float weight) const {
  const LossOptions& options = call_.options;
  const float top = call_.tops[row];
  const float total = call_.totals[row];
  const float scale = call_.scale[call_.scale.size() > 1 ? row : 0] * weight;
  float of_p = scale / total;
  if (options.z_loss > 0.0f) {
    of_p *= 1.0f + 2.0f * options.z_loss * (top + std::log(total));
  }
  RowGradient factors{top, of_p, 0.0f, scale, target};
  if (options.label_smoothing > 0.0f) {
    factors.everywhere =
        scale * options.label_smoothing / static_cast<float>(call_.classes);
    factors.at_target = scale * (1.0f - options.label_smoothing);
  }
  kernels_.gradient(call_.logits[row], call_.gradient[row], call_.classes,
                    factors, options.softcap);
}

// The arithmetic of stats.add_tokens, unit for unit.
void LossRows::count(std::size_t row, std::int64_t target, std::int64_t domain,
                     const RowLoss& found, std::span<std::int64_t> sums) const {
  const std::size_t domains = sums.size() / kStatistics - 1;
  const bool in_domain =
      domain >= 0 && static_cast<std::uint64_t>(domain) < domains;
  std::int64_t* const cells =
      &sums[(in_domain ? static_cast<std::size_t>(domain) : domains) *
            kStatistics];
  bool good =
      is_valid(target) && std::isfinite(found.nll) && std::isfinite(found.loss);
  double excess = 0.0;
  if (!call_.reference_losses.empty()) {
    const float reference = call_.reference_losses[row];
    good = good && std::isfinite(reference);
    excess = static_cast<double>(found.nll) - static_cast<double>(reference);
  }
  if (target != call_.options.ignore_index &&
      (!good || (domain != -1 && !in_domain))) {
    ++cells[kBad];
  }
  if (!good || !in_domain) return;
  const auto add = [cells](Statistic column, double value) {
    const double clamped = std::clamp(value, 0.0, kClamps[column]);
    cells[column] +=
        static_cast<std::int64_t>(std::floor(clamped * kScales[column] + 0.5));
  };
  const double nats = std::min<double>(found.nll, kClamps[kLoss]);
  add(kTokens, 1.0);
  add(kLoss, nats);
  add(kLossSquared, nats * nats);
  add(kExcess, excess);
  if (call_.options.distribution) {
    add(kEntropy, found.entropy);
    add(kCorrect, found.correct ? 1.0 : 0.0);
    add(kEl2n, found.el2n);
  }
  if (!call_.token_bytes.empty()) {
    add(kBytes, call_.token_bytes[static_cast<std::size_t>(target)]);
  }
}

}  // namespace

std::span<const LossLevel* const> loss_levels() {
  static const std::vector<const LossLevel*> levels = [] {
    std::vector<const LossLevel*> result{&kLossBase};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      result.push_back(&kLossAvx2);
      if (__builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")) {
        result.push_back(&kLossAvx512);
      }
    }
#endif
    return result;
  }();
  return levels;
}

void compute_loss(const LossCall& call, const LossLevel& level,
                  unsigned threads) {
  const LossRows rows(call, level);
  const std::size_t n = call.targets.size();
  const std::size_t helpers =
      std::clamp<std::size_t>(n * call.classes / kThreadLogits, 1,
                              std::max(threads, 1U)) -
      1;
  // Small enough that no thread is left waiting long for the last.
  const std::size_t share = std::clamp<std::size_t>(
      kShareBytes / rows.row_bytes(), 1, n / (8 * (helpers + 1)) + 1);
  std::atomic<std::size_t> next{0};
  const auto work = [&](std::span<std::int64_t> sums) {
    for (;;) {
      const std::size_t begin = next.fetch_add(share);
      if (begin >= n) break;
      const std::size_t end = std::min(n, begin + share);
      for (std::size_t row = begin; row < end; ++row) rows.compute(row, sums);
    }
  };
  // Integers of their own for each thread, added up at the end.
  std::vector<std::vector<std::int64_t>> tables(
      helpers, std::vector<std::int64_t>(call.sums.size()));
  {
    std::vector<std::jthread> started;
    started.reserve(helpers);
    try {
      for (auto& table : tables) {
        started.emplace_back([&work, &table] { work(table); });
      }
    } catch (const std::system_error&) {
      // Fewer threads do the same work.
    }
    work(call.sums);
  }
  for (const auto& table : tables) {
    for (std::size_t i = 0; i < table.size(); ++i) call.sums[i] += table[i];
  }
}

}  // namespace mixloader
