// What KVPrune accepts. Each function returns an empty string, or one line that says what is wrong and what was expected.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

namespace skipvision::tensorrt {

constexpr int32_t kInputs = 3;   // key [B, H, S, Dh], value [B, H, S, Dh], keep_index [B, K]
constexpr int32_t kOutputs = 2;  // key [B, H, K, Dh], value [B, H, K, Dh]

// Bytes of a key or value element, or 0 for a type that KVPrune does not take.
int64_t element_bytes(nvinfer1::DataType type);

// Exactly three inputs and two outputs.
std::string check_counts(int32_t inputs, int32_t outputs);

// key and value of one type (float32, float16, bfloat16), keep_index int64.
std::string check_types(nvinfer1::DataType key, nvinfer1::DataType value, nvinfer1::DataType keep_index);

// Ranks 4, 4 and 2.
std::string check_ranks(int32_t key, int32_t value, int32_t keep_index);

// Ranks, and that key and value agree, B is the same everywhere and K <= S. -1 stands for a length not known yet.
std::string check_dims(const nvinfer1::Dims& key, const nvinfer1::Dims& value, const nvinfer1::Dims& keep_index);

}  // namespace skipvision::tensorrt
