// Stand-ins for what TensorRT hands to a plugin, so that the plugin runs with no TensorRT library and no GPU.
#pragma once

#include <NvInfer.h>

#include <deque>
#include <string>
#include <vector>

#include "../kernel/kv_prune.h"

namespace skipvision::test {

// A length of a shape: a name, or a number where it is constant. Compared by address, as TensorRT's own.
class Length final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Length(int64_t value) : value_(value) { mImpl = this; }

 private:
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }
  int64_t value_;
};

// KVPrune needs no arithmetic on lengths; constants are all it may ask for.
class Builder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  int operations = 0;

 private:
  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return &lengths_.emplace_back(value); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                            const nvinfer1::IDimensionExpr&) override {
    ++operations;
    return nullptr;
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    ++operations;
    return nullptr;
  }
  std::deque<Length> lengths_;
};

// Keeps what the plugin logs.
class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity == Severity::kERROR) errors.emplace_back(message);
  }
  nvinfer1::ILogger* findLogger() override { return this; }
  std::vector<std::string> errors;
};

// The launcher is replaced too: it keeps its arguments and returns `status`.
struct Launches {
  std::vector<skipvision_kv_prune_params> params;
  std::vector<void*> streams;
  int status = 0;
};
inline Launches launches;

}  // namespace skipvision::test
