// Runs calls of the CUDA launchers from a file on the simulated device, each argument in a buffer of exactly its size.
//
//   driver CALLS RESULTS multiprocessors shared_bytes grid_x order capability
//
// A call: the launcher's name, its integers, its real numbers, its buffers. A list is its length (int64), then its
// items. A buffer is a kind (0 null, 1 read, 2 written, 3 both), a size in bytes, and the bytes unless it is only
// written; it starts as NaN bits then. RESULTS gets all written buffers, one after the other.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <string>
#include <vector>

#include "cuda_shim.h"
#include "planted_products.h"
#include "sampling.cuh"
#include "vqfast.h"

namespace {

struct Call {
  std::vector<int64_t> ints;
  std::vector<double> reals;
  std::vector<void *> buffers;

  vqfast_dtype dtype() const { return (vqfast_dtype)ints[0]; }
  // A view from six integers: batch, rows, three strides, offset of its first element in bytes.
  vqfast_rows rows(int first, int buffer) const {
    return {static_cast<const char *>(buffers[buffer]) + ints[first + 5],
            ints[first],
            ints[first + 1],
            ints[first + 2],
            ints[first + 3],
            ints[first + 4]};
  }
  template <typename T>
  T *at(int buffer) const {
    return static_cast<T *>(buffers[buffer]);
  }
  // A family's tables from two integers, T and columns, and from buffers for the levels, the noise and its running sum.
  vqfast_levels levels(int first, int buffer, bool draws) const {
    return {at<double>(buffer), ints[first], ints[first + 1], at<double>(buffer + 1),
            draws ? at<double>(buffer + 2) : nullptr};
  }
  // A step's matrices from two strides, and from buffers for the prior, the likelihood and the transposed prior.
  vqfast_step step(int first, int buffer) const {
    return {at<double>(buffer), at<double>(buffer + 1), at<double>(buffer + 2), ints[first], ints[first + 1]};
  }
};

constexpr int kDevice = 1;
constexpr int64_t kFar = ((int64_t)1 << 31) + 8;  // elements between the rows of `far_rows`

int fail(const std::string &what) {
  fprintf(stderr, "driver: %s\n", what.c_str());
  exit(2);
}

// Exactly as large as asked for, so that the sanitizer sees the first byte beyond.
void *poisoned(int64_t bytes) {
  void *memory = malloc(bytes);
  memset(memory, 0xff, bytes);
  return memory;
}

void run(int code) {
  if (code != VQFAST_OK) fail("error code " + std::to_string(code));
  if (shim_current_device != 0) fail("the launcher left another device current");
}

// Where `locate` finds each target in one row of scores.
void locate_all(const float *scores, int K, const double *targets, int count, int *codes) {
  VQFAST_SHARED(float, partial, [32]);
  VQFAST_SHARED(double, warps, [32]);
  VQFAST_SHARED(int, found, [2]);
  vqfast::SoftmaxRow<float, 4, vqfast::LikelyCodes<float>> row({scores, nullptr, 1}, K, nullptr);
  row.scale(vqfast::block_reduce(row.largest(), vqfast::Max(), partial), 1);
  row.weigh({});
  for (int i = 0; i < count; ++i) {
    const int code = vqfast::locate(row, vqfast::Apart<float>{vqfast::kNoCode, 0}, targets[i], warps, found);
    if (threadIdx.x == 0) codes[i] = code;
    __syncthreads();
  }
}

// A kernel that writes past the end of its buffer, one that leaves out a barrier and one whose threads part at one.
void planted_overrun(int *out, int n) { out[threadIdx.x * n / 64] = 0; }
void planted_shared_overrun(int *out) {
  VQFAST_SHARED(int, values, [64]);
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
void planted_race(int *out) {
  VQFAST_SHARED(int, values, [64]);
  values[threadIdx.x] = (int)threadIdx.x;
  out[threadIdx.x] = values[63 - threadIdx.x];
}
void planted_divergence(int *out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0;
}

template <typename... P>
int start(void (*kernel)(P...), P... arguments) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(64);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

const std::map<std::string, void (*)(const Call &)> kLaunchers = {
    {"nearest",
     [](const Call &c) {
       const vqfast_rows x = c.rows(1, 0);
       const int64_t D = c.ints[7], K = c.ints[8], heads = c.ints[11], stride_head = c.ints[12];
       int64_t bytes;
       run(vqfast_cuda_nearest_scratch(x.batch * x.rows, D, K, kDevice, &bytes));
       void *scratch = poisoned(bytes);
       run(vqfast_cuda_nearest(c.dtype(), (vqfast_metric)c.ints[9], (int)c.ints[10], x, heads, stride_head, D,
                               c.buffers[1], K, c.at<uint8_t>(2), nullptr, c.at<int64_t>(3), c.at<int64_t>(4), scratch,
                               kDevice, nullptr));
       free(scratch);
     }},
    {"lookup",
     [](const Call &c) {
       run(vqfast_cuda_lookup(c.dtype(), c.rows(1, 0), c.ints[7], c.buffers[1], c.ints[8], c.at<int64_t>(2),
                              c.buffers[3], c.buffers[4], c.at<int64_t>(5), kDevice, nullptr));
     }},
    {"lookup_backward",
     [](const Call &c) {
       run(vqfast_cuda_lookup_backward(c.dtype(), c.rows(1, 0), c.buffers[1], c.rows(7, 2), c.ints[13], c.buffers[3],
                                       c.ints[14], c.at<int64_t>(4), c.buffers[5], kDevice, nullptr));
     }},
    {"codebook_stats",
     [](const Call &c) {
       const vqfast_rows x = c.rows(1, 0);
       const int64_t D = c.ints[7], K = c.ints[8];
       int64_t bytes;
       run(vqfast_cuda_codebook_stats_scratch(c.dtype(), x.batch * x.rows, D, K, &bytes));
       void *scratch = poisoned(bytes);
       run(vqfast_cuda_codebook_stats(c.dtype(), x, D, c.at<int64_t>(1), c.buffers[2], K, c.buffers[3], c.buffers[4],
                                      scratch, kDevice, nullptr));
       free(scratch);
     }},
    {"q_sample",
     [](const Call &c) {
       run(vqfast_cuda_q_sample(c.at<int64_t>(0), c.at<int64_t>(1), c.levels(0, 2, true), c.ints[2], c.ints[3],
                                c.ints[4], c.at<int64_t>(5), c.at<int64_t>(6), kDevice, nullptr));
     }},
    {"posterior",
     [](const Call &c) {
       run(vqfast_cuda_posterior(c.dtype(), c.buffers[0], c.at<int64_t>(1), c.at<int64_t>(2), c.at<int64_t>(3),
                                 c.levels(1, 4, false), c.ints[3], c.ints[4], c.ints[5], (int)c.ints[6], c.buffers[6],
                                 kDevice, nullptr));
     }},
    {"posterior_backward",
     [](const Call &c) {
       run(vqfast_cuda_posterior_backward(c.dtype(), c.buffers[0], c.buffers[1], c.at<int64_t>(2), c.at<int64_t>(3),
                                          c.at<int64_t>(4), c.levels(1, 5, false), c.ints[3], c.ints[4], c.ints[5],
                                          (int)c.ints[6], c.buffers[7], kDevice, nullptr));
     }},
    {"diffusion_loss",
     [](const Call &c) {
       run(vqfast_cuda_diffusion_loss(c.dtype(), c.buffers[0], c.at<int64_t>(1), c.at<int64_t>(2), c.at<int64_t>(3),
                                      c.at<int64_t>(4), c.levels(1, 5, false), c.ints[3], c.ints[4], c.ints[5],
                                      c.at<double>(7), (int)c.ints[6], c.reals[0], c.buffers[8], c.buffers[9], kDevice,
                                      nullptr));
     }},
    {"scale_rows",
     [](const Call &c) {
       run(vqfast_cuda_scale_rows(c.dtype(), c.buffers[0], c.ints[1], c.ints[2], c.buffers[1], c.ints[3], kDevice,
                                  nullptr));
     }},
    {"p_sample",
     [](const Call &c) {
       run(vqfast_cuda_p_sample(c.dtype(), c.buffers[0], c.buffers[1], c.at<int64_t>(2), c.at<int64_t>(3),
                                c.at<int64_t>(4), c.levels(1, 5, true), c.ints[3], c.ints[4], c.ints[5],
                                c.at<int64_t>(8), (int)c.ints[6], c.reals[0], c.reals[1], c.ints[7], c.reals[2],
                                c.at<int64_t>(9), c.at<int64_t>(10), kDevice, nullptr));
     }},
    {"matrix_loss",
     [](const Call &c) {
       run(vqfast_cuda_matrix_loss(c.dtype(), c.buffers[0], c.at<int64_t>(1), c.at<int64_t>(2), c.at<int64_t>(3),
                                   c.step(1, 4), c.ints[3], c.ints[4], c.ints[5], c.at<double>(7), (int)c.ints[6],
                                   c.reals[0], c.buffers[8], c.buffers[9], kDevice, nullptr));
     }},
    {"matrix_sample",
     [](const Call &c) {
       run(vqfast_cuda_matrix_sample(c.dtype(), c.buffers[0], c.buffers[1], c.at<int64_t>(2), c.at<int64_t>(3),
                                     c.step(1, 4), c.ints[3], c.ints[4], c.ints[5], c.at<int64_t>(7), (int)c.ints[6],
                                     c.reals[0], c.reals[1], c.ints[7], c.reals[2], c.at<int64_t>(8), c.at<int64_t>(9),
                                     kDevice, nullptr));
     }},
    {"pack",
     [](const Call &c) {
       const int64_t *size = c.ints.data() + 7;  // D, B, Hc, Wc, G, region, capacity
       void *scratch = poisoned((size[1] * size[4] * size[2] + size[1]) * 8);
       run(vqfast_cuda_pack(c.ints[0], c.rows(1, 0), size[0], c.at<int64_t>(1), size[1], size[2], size[3], size[4],
                            size[5], size[6], c.buffers[2], c.at<int32_t>(3), c.at<int64_t>(4), c.at<int64_t>(5),
                            scratch, kDevice, nullptr));
       free(scratch);
     }},
    {"unpack",
     [](const Call &c) {
       const int64_t *size = c.ints.data() + 7;  // D, B, Hc, Wc, G, replicate
       void *scratch = poisoned((size[1] * size[2] * size[3] << 2 * (size[4] - 1)) * 8);
       run(vqfast_cuda_unpack(c.ints[0], c.rows(1, 0), size[0], c.at<int32_t>(1), c.at<int64_t>(2), c.at<int64_t>(3),
                              c.at<int64_t>(4), size[1], size[2], size[3], size[4], size[5], c.buffers[5], scratch,
                              kDevice, nullptr));
       free(scratch);
     }},
    {"unpack_backward",
     [](const Call &c) {
       const int64_t *size = c.ints.data() + 7;  // D, T, B, Hc, Wc, G
       void *scratch = poisoned((size[2] * size[3] * size[4] << 2 * (size[5] - 1)) * 8);
       run(vqfast_cuda_unpack_backward(c.dtype(), c.rows(1, 0), size[0], c.at<int32_t>(1), c.at<int64_t>(2),
                                       c.at<int64_t>(3), size[1], c.at<int64_t>(4), size[2], size[3], size[4], size[5],
                                       c.buffers[5], scratch, kDevice, nullptr));
       free(scratch);
     }},
    {"position_mask",
     [](const Call &c) {
       run(vqfast_cuda_position_mask(c.at<int64_t>(0), c.at<int64_t>(1), c.at<int64_t>(2), c.ints[0], c.ints[1],
                                     c.ints[2], c.ints[3], c.ints[4], c.ints[5], c.at<uint8_t>(3), kDevice, nullptr));
     }},
    {"grain_entropy",
     [](const Call &c) {
       const int64_t *size = c.ints.data() + 1;  // B, C, H, W, four strides, P, bins
       run(vqfast_cuda_grain_entropy(c.dtype(), c.buffers[0], size[0], size[1], size[2], size[3], size + 4, size[8],
                                     size[9], c.reals[0], c.reals[1], c.reals[2], c.buffers[1], kDevice, nullptr));
     }},
    // Search, lookup and statistics of float32 rows that lie more than 2^31 elements apart, in memory that is mapped
    // but, for the rows, never touched.
    {"far_rows",
     [](const Call &c) {
       const int64_t N = c.ints[0], D = c.ints[1], K = c.ints[2], bytes = (kFar * (N - 1) + D) * 4;
       const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
       float *x = static_cast<float *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
       if (x == MAP_FAILED) fail("no address space");
       for (int64_t n = 0; n < N; ++n) memcpy(x + n * kFar, c.at<float>(0) + n * D, D * 4);
       const vqfast_rows view = {x, 1, N, 0, kFar, 1};
       int64_t size;
       run(vqfast_cuda_nearest_scratch(N, D, K, kDevice, &size));
       void *scratch = poisoned(size);
       run(vqfast_cuda_nearest(VQFAST_F32, VQFAST_L2, 1, view, 1, 0, D, c.buffers[1], K, nullptr, nullptr,
                               c.at<int64_t>(2), nullptr, scratch, kDevice, nullptr));
       free(scratch);
       run(vqfast_cuda_lookup(VQFAST_F32, view, D, c.buffers[1], K, c.at<int64_t>(2), c.buffers[3], c.buffers[4],
                              c.at<int64_t>(5), kDevice, nullptr));
       run(vqfast_cuda_codebook_stats_scratch(VQFAST_F32, N, D, K, &size));
       scratch = poisoned(size);
       run(vqfast_cuda_codebook_stats(VQFAST_F32, view, D, c.at<int64_t>(2), nullptr, K, c.buffers[6], c.buffers[7],
                                      scratch, kDevice, nullptr));
       free(scratch);
       munmap(x, bytes);
     }},
    {"locate",
     [](const Call &c) {
       run(start(locate_all, c.at<const float>(0), (int)c.ints[0], c.at<const double>(1), (int)c.ints[1],
                 c.at<int>(2)));
     }},
    {"planted_overrun", [](const Call &c) { run(start(planted_overrun, c.at<int>(0), (int)c.ints[0])); }},
    {"planted_shared_overrun", [](const Call &c) { run(start(planted_shared_overrun, c.at<int>(0))); }},
    {"planted_race", [](const Call &c) { run(start(planted_race, c.at<int>(0))); }},
    {"planted_divergence", [](const Call &c) { run(start(planted_divergence, c.at<int>(0))); }},
    {"planted_products",
     [](const Call &c) {
       run(planted_products((int)c.ints[0], (int)c.ints[1], (int)c.ints[2], c.buffers[0], c.buffers[1],
                            c.at<float>(2)));
     }},
    {"wrong_device",
     [](const Call &c) { run(vqfast_cuda_scale_rows(c.dtype(), c.buffers[0], 1, 1, c.buffers[1], 0, 7, nullptr)); }},
};

FILE *in, *out;

void read(void *to, int64_t bytes) {
  if (bytes > 0 && fread(to, 1, bytes, in) != (size_t)bytes) fail("the calls end early");
}
int64_t read_int() {
  int64_t v;
  read(&v, sizeof v);
  return v;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 8) fail("usage: driver CALLS RESULTS multiprocessors shared_bytes grid_x order capability");
  in = fopen(argv[1], "rb");
  out = fopen(argv[2], "wb");
  if (!in || !out) fail("cannot open the files");
  shim::settings.multiprocessors = atoi(argv[3]);
  shim::settings.shared_bytes = atoi(argv[4]);
  shim::settings.grid_x = atoi(argv[5]);
  shim::settings.order = (unsigned)atoi(argv[6]);
  shim::settings.capability = atoi(argv[7]);
  for (int64_t calls = read_int(); calls > 0; --calls) {
    std::string name(read_int(), ' ');
    read(&name[0], name.size());
    Call call;
    call.ints.resize(read_int());
    read(call.ints.data(), call.ints.size() * 8);
    call.reals.resize(read_int());
    read(call.reals.data(), call.reals.size() * 8);
    std::vector<int64_t> kinds(read_int()), sizes(kinds.size());
    for (size_t i = 0; i < kinds.size(); ++i) {
      kinds[i] = read_int();
      sizes[i] = read_int();
      call.buffers.push_back(kinds[i] == 0 ? nullptr : poisoned(sizes[i]));
      if (kinds[i] & 1) read(call.buffers[i], sizes[i]);
    }
    if (!kLaunchers.count(name)) fail("no launcher " + name);
    kLaunchers.at(name)(call);
    for (size_t i = 0; i < kinds.size(); ++i) {
      if (kinds[i] & 2) fwrite(call.buffers[i], 1, sizes[i], out);
      free(call.buffers[i]);
    }
  }
  return fclose(out);
}
