// Products of float32 matrices by oneDNN's kernels. Torch has them and takes MKL's instead, which
// leave half of an AMD processor's vectors unused, and more than half where matrices are small.

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace at::native::cpublas {
void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t row_of_a, int64_t row_of_b, int64_t row_of_c,
    bool add, const float* a, const float* b, float* c, bool packed);
}

// c = a b for each of a batch: (m × k)(k × n), the numbers of a row side by side. Strides are in
// numbers, and 0 where all of the batch share a matrix. Each thread takes as many rows as another.
extern "C" void koi_products(
    const float* a, const float* b, float* c, int64_t batch, int64_t m, int64_t n, int64_t k,
    int64_t batch_of_a, int64_t row_of_a, int64_t batch_of_b, int64_t row_of_b, int threads) {
  const int64_t wanted = threads / std::gcd(batch, static_cast<int64_t>(threads));
  const int64_t parts = std::clamp<int64_t>(m / 8, 1, wanted);
  const auto run = [&](int64_t unit) {
    const int64_t i = unit / parts, part = unit % parts;
    const int64_t first = m * part / parts, end = m * (part + 1) / parts;
    at::native::cpublas::brgemm(
        end - first, n, k, row_of_a, row_of_b, n, false, a + i * batch_of_a + first * row_of_a,
        b + i * batch_of_b, c + (i * m + first) * n, false);
  };
  const int64_t units = batch * parts;
  if (threads < 2 || units < 2) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t unit = 0; unit < units; ++unit) run(unit);
}
