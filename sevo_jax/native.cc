// psi = sum_l c_l A^l x by Horner's rule, for a matrix A of compressed rows and one or more x.
//
// Each layer is one pass, y <- A s + c x, whose cost is that of gathering rows of s from
// memory. So a row is summed in registers, as many columns at a time as fit, while the rows
// that it needs next are on their way. Every row is summed by one thread in the order of its
// edges: the result does not depend on the number of threads.

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kEdges = 8192;  // in a piece of work
// Bytes of a table of messages from which on it is copied into large pages, read ahead as by `Far`,
// and taken in slices. On an AMD EPYC (Zen 2) psi takes 0.75 of the time so at 14 MB, as long at
// 7 MB, and 1.2 times as long at 3 MB.
constexpr size_t kLarge = 8 << 20;
// Bytes of a row of a slice. On that EPYC psi takes 0.7 and 0.8 of the time with slices at 10 and 16
// million edges and 64 columns, and 1.1 and 1.3 times as long with slices of 64 bytes.
constexpr int64_t kSlice = 128;

// How many edges ahead a row is asked for, and into which cache (of `__builtin_prefetch`, 3 is
// the first and 2 the second).
struct Near {
  static constexpr int64_t kAhead = 24;
  static constexpr int kCache = 3;
};
// An AMD EPYC (Zen 4) has more requests for memory on their way if they are for its second
// cache. A layer of a large table then takes 0.6 to 0.75 of the time; one of a small table takes
// 1.1 times as long. An older one (Zen 2) does not care. Other makers' have not been measured.
struct Far {
  static constexpr int64_t kAhead = 48;
  static constexpr int kCache = 2;
};

bool IsAmd() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

struct Bfloat16 {
  uint16_t bits;
};

// Bytes in a register. Sums in longer vectors would go through memory: with 64 bytes on an AMD
// EPYC without AVX-512 (Zen 2), psi on Beauty took 15 ms in place of 3.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
constexpr int kSums = 256 / kRegister < 8 ? 256 / kRegister : 8;  // of at least 16 registers

// N values of type T, a register of them where N is not 1, from memory and back.
template <typename T, int N>
using Vector __attribute__((vector_size(N * sizeof(T)))) = T;

template <typename T, int N>
inline Vector<T, N> Load(const T* from) {
  Vector<T, N> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T, int N>
inline Vector<T, N> Load(const Bfloat16* from) {
  static_assert(std::is_same_v<T, float>);
  const auto bits = __builtin_convertvector(
      (Load<uint16_t, N>(reinterpret_cast<const uint16_t*>(from))), Vector<uint32_t, N>);
  return reinterpret_cast<Vector<T, N>>(bits << 16);
}

template <typename T, int N>
inline void Store(Vector<T, N> value, T* to) {
  std::memcpy(to, &value, sizeof(value));
}

template <typename T, int N>
inline void Store(Vector<T, N> value, Bfloat16* to) {
  auto bits = reinterpret_cast<Vector<uint32_t, N>>(value);
  const auto nan = bits >> 16 | 0x40;  // which rounding could turn into a number
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
  bits = value == value ? bits : nan;
  const auto half = __builtin_convertvector(bits, Vector<uint16_t, N>);
  std::memcpy(to, &half, sizeof(half));
}

// y <- outer (A s) + inner x for d columns, where s and y may be of another type than x.
template <typename T, typename S, typename Y>
struct Layer {
  int64_t num_nodes, num_edges, d;
  const int32_t* splits;
  const int32_t* columns;
  const T* weights;
  const S* source;  // s [num_nodes, d]
  const T* outer;   // [1] or [d], or null for one
  const T* inner;   // [1] or [d]
  const T* x;       // [num_nodes, d], a row x_stride from the next
  Y* y;             // [num_nodes, d], a row y_stride from the next
  int64_t x_stride, y_stride;
  bool by_column;   // whether the factors are [d]
};

// Row `row` in M vectors of N columns from column `first` on.
template <int N, int M, typename Ahead, typename T, typename S, typename Y>
inline void Columns(const Layer<T, S, Y>& layer, int64_t row, int64_t first) {
  Vector<T, N> sum[M] = {};
  const int64_t end = layer.splits[row + 1];
  for (int64_t edge = layer.splits[row]; edge < end; ++edge) {
    if (edge + Ahead::kAhead < layer.num_edges) {
      const S* next = layer.source + layer.columns[edge + Ahead::kAhead] * layer.d + first;
      for (int64_t at = 0; at < M * N; at += 64 / sizeof(S))
        __builtin_prefetch(next + at, 0, Ahead::kCache);
    }
    const S* from = layer.source + layer.columns[edge] * layer.d + first;
    const T weight = layer.weights[edge];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m] += weight * Load<T, N>(from + m * N);
  }
  const T* x = layer.x + row * layer.x_stride + first;
  Y* y = layer.y + row * layer.y_stride + first;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    auto factor = [&](const T* c) {
      return layer.by_column ? Load<T, N>(c + first + m * N) : Vector<T, N>{} + c[0];
    };
    if (layer.outer) sum[m] *= factor(layer.outer);
    sum[m] += factor(layer.inner) * Load<T, N>(x + m * N);
    Store<T, N>(sum[m], y + m * N);
  }
}

// A pass over a row's edges takes M, M / 2 or 1 registers of columns. One that is wider than what is
// left of the row begins earlier, where it ends with the row, and computes some columns once more.
template <typename Ahead, typename T, typename S, typename Y>
void Rows(const Layer<T, S, Y>& layer, int64_t begin, int64_t end) {
  constexpr int64_t N = kRegister / sizeof(T), M = kSums, H = M / 2;
  const int64_t d = layer.d;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < d;) {
      const int64_t left = d - first;
      if (d >= M * N && left > H * N) {
        Columns<N, M, Ahead>(layer, row, std::min(first, d - M * N));
        first += M * N;
      } else if (d >= H * N && left > N) {
        Columns<N, H, Ahead>(layer, row, std::min(first, d - H * N));
        first += H * N;
      } else if (d >= N) {
        Columns<N, 1, Ahead>(layer, row, std::min(first, d - N));
        first += N;
      } else {
        Columns<1, 1, Ahead>(layer, row, first);
        first += 1;
      }
    }
  }
}

// Asks for a table in large pages: gathering rows from all over a table of small ones spends
// its time on translating their addresses too, and a fresh one on a fault for each page.
inline void LargePages(void* table, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(table);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Pieces of work that the calling thread and any idle ones of the pool take in turn. The
// caller waits for pieces alone, not for threads: those that come late find nothing to do.
class Pieces {
 public:
  Pieces(int64_t count, std::function<void(int64_t)> work) : count_(count), work_(work) {}

  void Take() {
    for (int64_t piece; (piece = next_.fetch_add(1)) < count_;) {
      work_(piece);
      if (done_.fetch_add(1) + 1 == count_) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_.load() == count_; });
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)> work_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

// work(0) .. work(count - 1), shared among the threads of the pool.
void Share(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> work) {
  auto pieces = std::make_shared<Pieces>(count, work);
  const int64_t helpers = std::min(pool.num_threads() - 1, count - 1);
  for (int64_t helper = 0; helper < helpers; ++helper)
    pool.Schedule([pieces] { pieces->Take(); });
  pieces->Take();
  pieces->Wait();
}

template <typename Ahead, typename T, typename S, typename Y>
void Apply(ffi::ThreadPool& pool, const Layer<T, S, Y>& layer) {
  // Rows are divided so that each piece has about as much to gather and to write.
  const int64_t total = layer.num_edges + layer.num_nodes;
  const int64_t count = std::max<int64_t>(1, total / kEdges);
  auto start = [&layer, total, count](int64_t piece) {
    int64_t low = 0, high = layer.num_nodes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const bool before = layer.splits[middle] + middle < piece * total / count;
      (before ? low : high) = middle + before;
    }
    return low;
  };
  Share(pool, count, [&layer, start, count](int64_t piece) {
    Rows<Ahead>(layer, start(piece), piece + 1 == count ? layer.num_nodes : start(piece + 1));
  });
}

// A copy of x [num_nodes, d], whose rows are `stride` apart, in the precision of the messages.
template <typename T, typename S>
void Copy(ffi::ThreadPool& pool, const T* x, int64_t stride, S* copy, int64_t num_nodes,
          int64_t d) {
  constexpr int N = kRegister / sizeof(T);
  const int64_t rows = (1 << 18) / d + 1;
  Share(pool, (num_nodes + rows - 1) / rows, [=](int64_t piece) {
    const int64_t end = std::min(num_nodes, (piece + 1) * rows);
    for (int64_t row = piece * rows; row < end; ++row) {
      const T* from = x + row * stride;
      S* to = copy + row * d;
      int64_t i = 0;
      for (; i + N <= d; i += N) Store<T, N>(Load<T, N>(from + i), to + i);
      for (; i < d; ++i) Store<T, 1>(Load<T, 1>(from + i), to + i);
    }
  });
}

template <ffi::DataType kType, ffi::DataType kMessage>
ffi::Error Polynomial(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> splits,
                      ffi::Buffer<ffi::S32> columns, ffi::Buffer<kType> weights,
                      ffi::Buffer<kType> coefficients, ffi::Buffer<kType> x,
                      ffi::ResultBuffer<kType> y, ffi::ResultBuffer<kMessage> scratch) {
  constexpr bool kSame = kType == kMessage;
  using T = ffi::NativeType<kType>;
  using S = std::conditional_t<kSame, T, Bfloat16>;
  const int64_t num_tables = coefficients.dimensions()[0], num_nodes = x.dimensions()[1];
  const int64_t d = x.dimensions()[2], size = num_nodes * d;
  const bool shared = x.dimensions()[0] == 1;  // one x with the coefficients of each table
  const int64_t num_layers = coefficients.dimensions()[1] - 1;
  const int64_t stride = coefficients.dimensions()[2];
  if (static_cast<int64_t>(splits.element_count()) != num_nodes + 1 ||
      static_cast<int64_t>(scratch->element_count()) != (kSame ? size : 2 * size) ||
      static_cast<int64_t>(y->element_count()) != num_tables * size ||
      (!shared && x.dimensions()[0] != num_tables) || (stride != 1 && stride != d) ||
      num_layers < 1)
    return ffi::Error::InvalidArgument("shapes do not fit together");
  const bool large = size * sizeof(S) >= kLarge;
  const bool far = large && IsAmd();  // other makers' have not been measured
  // All layers of a slice of columns come before those of the next: caches hold more of its rows
  // than of the table's. With two slices or more, scratch has room for both buffers of one.
  constexpr int64_t kColumns = kSlice / sizeof(S), kVector = kRegister / sizeof(T);
  const int64_t slice = far && d >= 2 * kColumns ? kColumns : d;
  S* const space = reinterpret_cast<S*>(scratch->untyped_data());
  LargePages(y->untyped_data(), y->size_bytes());
  LargePages(scratch->untyped_data(), scratch->size_bytes());
  auto take = [&](int64_t table, int64_t first, int64_t width) {
    const int64_t offset = stride > 1 ? first : 0;
    const T* const c = coefficients.typed_data() + table * (num_layers + 1) * stride + offset;
    const T* const from = x.typed_data() + (shared ? 0 : table * size) + first;
    T* const to = y->typed_data() + table * size + first;
    // Each layer but the last, 0, writes the buffer of its parity, from which the next one reads.
    // The result's own may be one of them if its rows follow each other as theirs do: layer 1
    // writes the other.
    S* buffers[2] = {space, space + num_nodes * width};
    if constexpr (kSame)
      if (width == d) buffers[0] = to, buffers[1] = space;
    // The first layer reads x from a copy, if it must be rounded or is worth large pages.
    const S* messages = buffers[num_layers % 2];
    if (kSame && !large)
      messages = reinterpret_cast<const S*>(from);
    else
      Copy(pool, from, d, buffers[num_layers % 2], num_nodes, width);
    const T* outer = c + num_layers * stride;
    auto layer = [&](int64_t l, auto* result, int64_t y_stride) {
      const Layer<T, S, std::remove_pointer_t<decltype(result)>> one{
          num_nodes, static_cast<int64_t>(columns.element_count()), width, splits.typed_data(),
          columns.typed_data(), weights.typed_data(), messages, outer, c + l * stride, from,
          result, d, y_stride, stride > 1};
      far ? Apply<Far>(pool, one) : Apply<Near>(pool, one);
      outer = nullptr;
    };
    for (int64_t l = num_layers - 1; l > 0; --l) {
      layer(l, buffers[l % 2], width);
      messages = buffers[l % 2];
    }
    layer(0, to, d);
  };
  // One table after the other: several together would not fit into the cache.
  for (int64_t table = 0; table < num_tables; ++table)
    for (int64_t begin = 0; begin < d; begin += slice) {
      // The last slice takes whole registers, too, and ends with the row.
      const int64_t left = (d - begin + kVector - 1) / kVector * kVector;
      const int64_t width = std::min(slice, left);
      take(table, std::min(begin, d - width), width);
    }
  return ffi::Error::Success();
}

}  // namespace

#define SEVO_POLYNOMIAL(name, type, message)                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (Polynomial<type, message>), \
                                ffi::Ffi::Bind()                 \
                                    .Ctx<ffi::ThreadPool>()      \
                                    .Arg<ffi::Buffer<ffi::S32>>() \
                                    .Arg<ffi::Buffer<ffi::S32>>() \
                                    .Arg<ffi::Buffer<type>>()    \
                                    .Arg<ffi::Buffer<type>>()    \
                                    .Arg<ffi::Buffer<type>>()    \
                                    .Ret<ffi::Buffer<type>>()    \
                                    .Ret<ffi::Buffer<message>>())

SEVO_POLYNOMIAL(sevo_polynomial_float32, ffi::F32, ffi::F32);
SEVO_POLYNOMIAL(sevo_polynomial_float64, ffi::F64, ffi::F64);
SEVO_POLYNOMIAL(sevo_polynomial_float32_bfloat16, ffi::F32, ffi::BF16);
