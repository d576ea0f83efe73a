// The kernel on a GPU: against the plain loop in every layout and width, then its bandwidth beside cudaMemcpy's.
//
//   kernel_test [--json FILE] [--quick] [--break]
//
// Exits 0; 1 on a mismatch; 2 on wrong arguments; 77 where there is no GPU. --quick leaves out the timing. --break
// compares with the kept positions shifted by one: it must exit 1, or the check proves nothing.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "plain_loop.h"

namespace {

using namespace skipvision::test;

constexpr int kNoGpu = 77;
constexpr int kRepeats = 30;

struct Options {
  std::string json;
  bool quick = false;
  int64_t shift = 0;
};

// A timed copy: bytes read plus bytes written, and the median times of the kernel and of cudaMemcpy.
struct Timing {
  Case sizes;
  double bytes;
  double kernel_ms;
  double memcpy_ms;
};

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Device memory; at least one byte, so that its pointer is not null.
class Memory {
 public:
  explicit Memory(int64_t bytes) { require(cudaMalloc(&data_, static_cast<size_t>(bytes) + 1), "cudaMalloc"); }
  Memory(const void* content, int64_t bytes) : Memory(bytes) {
    require(cudaMemcpy(data_, content, static_cast<size_t>(bytes), cudaMemcpyHostToDevice), "copy to the GPU");
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  std::vector<unsigned char> read(int64_t bytes) const {
    std::vector<unsigned char> content(static_cast<size_t>(bytes));
    require(cudaMemcpy(content.data(), data_, content.size(), cudaMemcpyDeviceToHost), "copy from the GPU");
    return content;
  }

 private:
  void* data_ = nullptr;
};

void prune(const skipvision_kv_prune_params& params, cudaStream_t stream) {
  const int status = skipvision_kv_prune(&params, stream);
  if (status == 0) return;
  std::printf("skipvision_kv_prune: %s\n", skipvision_kv_prune_error(status));
  std::exit(1);
}

bool equal_front(const std::vector<unsigned char>& a, const std::vector<unsigned char>& b, int64_t bytes) {
  return std::equal(a.begin(), a.begin() + bytes, b.begin());
}

bool case_is_right(const Case& c, int64_t shift, std::mt19937_64& random) {
  const auto keep = random_keep(c, random);
  const auto key = random_bytes(c.input_bytes(), random);
  const auto value = random_bytes(c.input_bytes(), random);
  const auto before = random_bytes(c.output_bytes(), random);
  const Memory key_in(key.data(), c.input_bytes()), value_in(value.data(), c.input_bytes());
  const Memory key_out(before.data(), c.output_bytes()), value_out(before.data(), c.output_bytes());
  const Memory index(keep.data(), static_cast<int64_t>(keep.size() * sizeof(int64_t)));
  const Memory& key_target = c.in_place() ? key_in : key_out;
  const Memory& value_target = c.in_place() ? value_in : value_out;
  prune(params_of(c, key_in.data(), value_in.data(), static_cast<const int64_t*>(index.data()), key_target.data(),
                  value_target.data()),
        nullptr);
  require(cudaDeviceSynchronize(), "the kernel");
  const int64_t bytes = checked_bytes(c);
  const auto wanted_key = expected_output(c, keep, key, c.in_place() ? key : before, shift);
  const auto wanted_value = expected_output(c, keep, value, c.in_place() ? value : before, shift);
  return equal_front(key_target.read(c.output_bytes()), wanted_key, bytes) &&
         equal_front(value_target.read(c.output_bytes()), wanted_value, bytes);
}

std::vector<Case> larger_cases() {
  std::vector<Case> cases;
  for (const Layout layout : {Layout::kOutOfPlace, Layout::kView, Layout::kPacked, Layout::kPadded}) {
    cases.push_back({1, 32, 640, 192, 128, 2, layout});
    cases.push_back({2, 32, 2400, 700, 128, 2, layout});
    cases.push_back({4, 8, 1500, 1499, 80, 4, layout});
    cases.push_back({1, 70000, 3, 2, 8, 2, layout});  // more heads than the grid has along y
  }
  return cases;
}

int check_all(int64_t shift) {
  std::mt19937_64 random(1);
  auto cases = many_cases();
  for (const Case& c : larger_cases()) cases.push_back(c);
  int failures = 0;
  for (const Case& c : cases) {
    if (case_is_right(c, shift, random)) continue;
    if (++failures <= 10) std::printf("MISMATCH: %s\n", c.text().c_str());
  }
  std::printf("%zu cases, %d mismatches\n", cases.size(), failures);
  return failures;
}

// Milliseconds between two events around work().
template <class Work>
double elapsed(cudaStream_t stream, cudaEvent_t start, cudaEvent_t stop, Work&& work) {
  float milliseconds = 0;
  require(cudaEventRecord(start, stream), "event");
  work();
  require(cudaEventRecord(stop, stream), "event");
  require(cudaEventSynchronize(stop), "timed work");
  require(cudaEventElapsedTime(&milliseconds, start, stop), "event");
  return milliseconds;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Kernel and memcpy of the same bytes take turns, so that a change of clocks meets both. In place every repeat finds
// what the last one left, which costs the same: only addresses matter.
Timing time_case(const Case& c, cudaStream_t stream) {
  std::mt19937_64 random(1);
  const auto keep = random_keep(c, random);
  const int64_t moved = c.batch * c.heads * c.kept * c.row_bytes();
  const Memory key(c.input_bytes()), value(c.input_bytes()), key_out(c.output_bytes()), value_out(c.output_bytes());
  const Memory index(keep.data(), static_cast<int64_t>(keep.size() * sizeof(int64_t)));
  const Memory plain(2 * moved), plain_out(2 * moved);
  const auto params =
      params_of(c, key.data(), value.data(), static_cast<const int64_t*>(index.data()),
                c.in_place() ? key.data() : key_out.data(), c.in_place() ? value.data() : value_out.data());
  cudaEvent_t start, stop;
  require(cudaEventCreate(&start), "event");
  require(cudaEventCreate(&stop), "event");
  std::vector<double> kernel, copy;
  for (int repeat = -3; repeat < kRepeats; ++repeat) {
    const double kernel_ms = elapsed(stream, start, stop, [&] { prune(params, stream); });
    const double copy_ms = elapsed(stream, start, stop, [&] {
      require(cudaMemcpyAsync(plain_out.data(), plain.data(), static_cast<size_t>(2 * moved),
                              cudaMemcpyDeviceToDevice, stream),
              "cudaMemcpyAsync");
    });
    if (repeat < 0) continue;
    kernel.push_back(kernel_ms);
    copy.push_back(copy_ms);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return {c, 4.0 * static_cast<double>(moved), median(kernel), median(copy)};
}

double gigabytes_per_second(double bytes, double milliseconds) { return bytes / milliseconds * 1e-6; }

std::vector<Timing> time_all() {
  cudaStream_t stream;
  require(cudaStreamCreate(&stream), "stream");
  std::vector<Timing> timings;
  const int64_t sizes[][4] = {{1, 32, 640, 192}, {1, 32, 2400, 600}, {8, 32, 2400, 600}, {16, 32, 4096, 2048}};
  for (const auto& s : sizes) {
    for (const Layout layout : {Layout::kOutOfPlace, Layout::kView, Layout::kPacked}) {
      const Timing t = time_case({s[0], s[1], s[2], s[3], 128, 2, layout}, stream);
      std::printf("%s: %.1f us, %.0f GB/s (cudaMemcpy %.1f us, %.0f GB/s)\n", t.sizes.text().c_str(),
                  t.kernel_ms * 1e3, gigabytes_per_second(t.bytes, t.kernel_ms), t.memcpy_ms * 1e3,
                  gigabytes_per_second(t.bytes, t.memcpy_ms));
      timings.push_back(t);
    }
  }
  cudaStreamDestroy(stream);
  return timings;
}

bool write_json(const std::string& path, const char* device, int mismatches, const std::vector<Timing>& timings) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (file == nullptr) return false;
  std::fprintf(file, "{\"device\": \"%s\", \"mismatches\": %d, \"repeats\": %d, \"timings\": [", device, mismatches,
               kRepeats);
  for (size_t i = 0; i < timings.size(); ++i) {
    const Timing& t = timings[i];
    const Case& c = t.sizes;
    std::fprintf(file,
                 "%s\n  {\"batch\": %lld, \"heads\": %lld, \"sequence\": %lld, \"kept\": %lld, \"head_size\": %lld, "
                 "\"element_bytes\": %lld, \"layout\": \"%s\", \"bytes\": %.0f, \"kernel_us\": %.2f, "
                 "\"kernel_gb_per_s\": %.1f, \"memcpy_us\": %.2f, \"memcpy_gb_per_s\": %.1f}",
                 i ? "," : "", (long long)c.batch, (long long)c.heads, (long long)c.sequence, (long long)c.kept,
                 (long long)c.size, (long long)c.element, name_of(c.layout), t.bytes, t.kernel_ms * 1e3,
                 gigabytes_per_second(t.bytes, t.kernel_ms), t.memcpy_ms * 1e3,
                 gigabytes_per_second(t.bytes, t.memcpy_ms));
  }
  std::fprintf(file, "\n]}\n");
  return std::fclose(file) == 0;
}

bool parse(int count, char** arguments, Options& options) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--break") {
      options.shift = 1;
    } else if (argument == "--json" && i + 1 < count) {
      options.json = arguments[++i];
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  if (!parse(count, arguments, options)) {
    std::printf("usage: kernel_test [--json FILE] [--quick] [--break]\n");
    return 2;
  }
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU (%s)\n", found == cudaSuccess ? "no device" : cudaGetErrorString(found));
    return kNoGpu;
  }
  cudaDeviceProp device{};
  require(cudaGetDeviceProperties(&device, 0), "device properties");
  std::printf("%s, %s\n", device.name, skipvision_kv_prune_version());
  const int mismatches = check_all(options.shift);
  const bool timed = !options.quick && mismatches == 0;
  const auto timings = timed ? time_all() : std::vector<Timing>{};
  if (!options.json.empty() && !write_json(options.json, device.name, mismatches, timings)) {
    std::printf("cannot write %s\n", options.json.c_str());
    return 2;
  }
  return mismatches == 0 ? 0 : 1;
}
