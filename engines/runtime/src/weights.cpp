#include "weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "json.h"
#include "ort_graph.h"
#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

/// One level of a protobuf message, field by field. Source: protobuf.dev, "Encoding".
class Message {
 public:
  Message(std::string_view data, const std::string& file) : rest_(data), file_(file) {}

  /// Goes to the next field; false at the end.
  bool next() {
    if (rest_.empty()) return false;
    std::uint64_t key = varint();
    number = static_cast<int>(key >> 3);
    switch (key & 7) {
      case 0:
        value = varint();
        bytes = {};
        break;
      case 1:
        bytes = take(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        bytes = take(4);
        break;
      default:
        fail();
    }
    return true;
  }

  std::uint64_t varint() {
    std::uint64_t result = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      auto byte = static_cast<std::uint8_t>(take(1)[0]);
      result |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return result;
    }
    fail();
  }

  bool empty() const { return rest_.empty(); }
  [[noreturn]] void fail() const {
    throw Error(file_ + " is altered: it is no ONNX graph; export again");
  }

  int number = 0;
  std::uint64_t value = 0;
  std::string_view bytes;

 private:
  std::string_view take(std::uint64_t count) {
    if (count > rest_.size()) fail();
    std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  std::string_view rest_;
  const std::string& file_;
};

// Field numbers of onnx.proto.
constexpr int kModelGraph = 7, kGraphInitializer = 5;
constexpr int kTensorDims = 1, kTensorType = 2, kTensorName = 8, kTensorExternal = 13;

ExternalTensor read_tensor(std::string_view data, const std::string& file) {
  ExternalTensor tensor;
  Message fields(data, file);
  while (fields.next()) {
    if (fields.number == kTensorName) tensor.name = fields.bytes;
    if (fields.number == kTensorType) tensor.dtype = static_cast<int>(fields.value);
    if (fields.number == kTensorDims && fields.bytes.empty())
      tensor.shape.push_back(static_cast<std::int64_t>(fields.value));
    if (fields.number == kTensorDims) {  // packed
      Message packed(fields.bytes, file);
      while (!packed.empty()) tensor.shape.push_back(static_cast<std::int64_t>(packed.varint()));
    }
    if (fields.number != kTensorExternal) continue;
    std::string key, value;
    Message entry(fields.bytes, file);
    while (entry.next()) (entry.number == 1 ? key : value) = entry.bytes;
    if (key == "location") tensor.file = value;
    if (key == "offset") tensor.offset = std::strtoull(value.c_str(), nullptr, 10);
    if (key == "length") tensor.bytes = std::strtoull(value.c_str(), nullptr, 10);
  }
  return tensor;
}

}  // namespace

std::vector<ExternalTensor> external_tensors(std::string_view model, const std::string& file) {
  std::vector<ExternalTensor> tensors;
  Message fields(model, file);
  while (fields.next()) {
    if (fields.number != kModelGraph) continue;
    Message graph(fields.bytes, file);
    while (graph.next()) {
      if (graph.number != kGraphInitializer) continue;
      ExternalTensor tensor = read_tensor(graph.bytes, file);
      if (!tensor.file.empty()) tensors.push_back(std::move(tensor));
    }
  }
  return tensors;
}

SharedWeights::SharedWeights()
    : packed_(nullptr, [](auto* own) { Ort::GetApi().ReleasePrepackedWeightsContainer(own); }) {
  OrtPrepackedWeightsContainer* container = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreatePrepackedWeightsContainer(&container));
  packed_.reset(container);
}

const SharedWeights::Mapping& SharedWeights::mapping(const std::filesystem::path& file) {
  Mapping& mapping = mappings_[file];
  if (mapping.data) return mapping;
  int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status {};
  bool found = descriptor >= 0 && ::fstat(descriptor, &status) == 0 && status.st_size > 0;
  auto bytes = static_cast<std::size_t>(status.st_size);
  void* data = found ? ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, descriptor, 0) : MAP_FAILED;
  if (descriptor >= 0) ::close(descriptor);
  if (data == MAP_FAILED) throw Error(file.string() + " cannot be mapped into memory");
  mapping.data = {data, [bytes](void* own) { ::munmap(own, bytes); }};
  mapping.bytes = bytes;
  return mapping;
}

void SharedWeights::add_to(Ort::SessionOptions& options, const std::filesystem::path& graph) {
  auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
  bool quantized = false;
  for (const ExternalTensor& tensor : external_tensors(read_file(graph), graph.string())) {
    std::filesystem::path beside = tensor.file;
    const Mapping& file = mapping(graph.parent_path() / beside.filename());
    if (beside != beside.filename() || tensor.offset > file.bytes ||
        tensor.bytes > file.bytes - tensor.offset)
      throw Error(graph.string() + " is altered: " + tensor.name + " is not within " + tensor.file +
                  "; export again");
    guarded("ONNX Runtime refuses " + tensor.name + " of " + graph.string(), [&] {
      tensors_.push_back(
          Ort::Value::CreateTensor(memory, static_cast<char*>(file.data.get()) + tensor.offset,
                                   tensor.bytes, tensor.shape.data(), tensor.shape.size(),
                                   static_cast<ONNXTensorElementDataType>(tensor.dtype)));
      options.AddInitializer(tensor.name.c_str(), tensors_.back());
    });
    quantized = quantized || (tensor.dtype != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
                              tensor.dtype != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  }
  if (!quantized) options.AddConfigEntry("session.disable_prepacking", "1");
}

}  // namespace skipvision
