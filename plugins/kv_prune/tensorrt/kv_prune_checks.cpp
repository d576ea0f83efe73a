#include "kv_prune_checks.h"

namespace skipvision::tensorrt {

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

std::string text_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    default:
      return "DataType " + std::to_string(static_cast<int32_t>(type));
  }
}

std::string text_of(const Dims& dims) {
  std::string text;
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  return "[" + text + "]";
}

bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

}  // namespace

int64_t element_bytes(DataType type) {
  if (type == DataType::kFLOAT) return 4;
  return type == DataType::kHALF || type == DataType::kBF16 ? 2 : 0;
}

std::string check_counts(int32_t inputs, int32_t outputs) {
  if (inputs == kInputs && outputs == kOutputs) return "";
  return std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
         " outputs; expected key, value, keep_index and key, value";
}

std::string check_types(DataType key, DataType value, DataType keep_index) {
  if (element_bytes(key) == 0) return "key is " + text_of(key) + "; expected float32, float16 or bfloat16";
  if (value != key) return "value is " + text_of(value) + " and key " + text_of(key) + "; expected one type";
  if (keep_index != DataType::kINT64) return "keep_index is " + text_of(keep_index) + "; expected int64";
  return "";
}

std::string check_ranks(int32_t key, int32_t value, int32_t keep_index) {
  if (key == 4 && value == 4 && keep_index == 2) return "";
  return "key, value and keep_index have ranks " + std::to_string(key) + ", " + std::to_string(value) + " and " +
         std::to_string(keep_index) + "; expected 4 [B, H, S, Dh], 4 [B, H, S, Dh] and 2 [B, K]";
}

std::string check_dims(const Dims& key, const Dims& value, const Dims& keep_index) {
  const std::string ranks = check_ranks(key.nbDims, value.nbDims, keep_index.nbDims);
  if (!ranks.empty()) return ranks;
  for (int32_t i = 0; i < key.nbDims; ++i) {
    if (differ(key.d[i], value.d[i])) {
      return "key is " + text_of(key) + " and value " + text_of(value) + "; expected the same shape";
    }
  }
  if (differ(key.d[0], keep_index.d[0])) {
    return "key is " + text_of(key) + " and keep_index " + text_of(keep_index) + "; expected the same batch";
  }
  if (key.d[2] >= 0 && keep_index.d[1] > key.d[2]) {
    return "keep_index " + text_of(keep_index) + " keeps more than the positions of key " + text_of(key);
  }
  return "";
}

}  // namespace skipvision::tensorrt
