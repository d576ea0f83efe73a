#include "ort_graph.h"

#include <algorithm>
#include <numeric>

#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

std::size_t count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::size_t{1},
                         [](std::size_t n, std::int64_t size) { return n * size; });
}

}  // namespace

Ort::Value view(std::vector<std::int64_t>& data, const Shape& shape) {
  auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
  return Ort::Value::CreateTensor<std::int64_t>(memory, data.data(), count(shape), shape.data(),
                                                shape.size());
}

Ort::Value make_tensor(const std::string& dtype, const Shape& shape) {
  auto type = dtype == "float16" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  Ort::AllocatorWithDefaultOptions allocator;
  return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type);
}

Ort::Value make_tensor(const std::string& dtype, const Shape& shape,
                       const std::vector<float>& data) {
  Ort::Value tensor = make_tensor(dtype, shape);
  if (data.size() != count(shape)) throw Error("a tensor has another size than its values");
  if (dtype == "float16")
    std::transform(data.begin(), data.end(), tensor.GetTensorMutableData<Ort::Float16_t>(),
                   [](float value) { return Ort::Float16_t(value); });
  else
    std::copy(data.begin(), data.end(), tensor.GetTensorMutableData<float>());
  return tensor;
}

void read_floats(const Ort::Value& tensor, std::vector<float>& values) {
  auto info = tensor.GetTensorTypeAndShapeInfo();
  values.resize(info.GetElementCount());
  if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    auto* data = tensor.GetTensorData<Ort::Float16_t>();
    std::transform(data, data + values.size(), values.begin(),
                   [](Ort::Float16_t value) { return value.ToFloat(); });
  } else {
    std::copy_n(tensor.GetTensorData<float>(), values.size(), values.begin());
  }
}

Shape shape_of(const Ort::Value& tensor) { return tensor.GetTensorTypeAndShapeInfo().GetShape(); }

std::size_t element_bytes(const Ort::Value& tensor) {
  auto type = tensor.GetTensorTypeAndShapeInfo().GetElementType();
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 4;
}

void check_onnxruntime() {
  const OrtApiBase* base = OrtGetApiBase();
  if (!base->GetApi(ORT_API_VERSION))
    throw Error(std::string("ONNX Runtime is version ") + base->GetVersionString() +
                ", expected 1." + std::to_string(ORT_API_VERSION) +
                " or newer, which this was compiled for");
}

void throw_ort_error(const std::string& what, const std::exception& error) {
  std::string message = error.what();
  throw Error(what + ": " + message.substr(0, message.find('\n')));
}

OrtGraph::OrtGraph(const Ort::Env& env, const std::filesystem::path& folder, const GraphInfo& info,
                   const Ort::SessionOptions& options, OrtPrepackedWeightsContainer* packed)
    : file_((folder / info.file).string()), info_(&info) {
  guarded("ONNX Runtime cannot load " + file_,
          [&] { session_ = Ort::Session(env, file_.c_str(), options, packed); });
}

std::vector<Ort::Value> OrtGraph::run(const Feeds& feeds) const {
  std::vector<const char*> inputs, outputs;
  std::vector<const OrtValue*> values;
  for (const auto& [name, value] : feeds) {
    inputs.push_back(name.c_str());
    values.push_back(value);
  }
  std::vector<Ort::Value> results;
  std::vector<OrtValue*> raw(info_->outputs.size());
  for (const TensorInfo& output : info_->outputs) outputs.push_back(output.name.c_str());
  guarded("ONNX Runtime failed on " + file_, [&] {
    Ort::ThrowOnError(Ort::GetApi().Run(session_, nullptr, inputs.data(), values.data(),
                                        values.size(), outputs.data(), outputs.size(), raw.data()));
  });
  for (OrtValue* value : raw) results.emplace_back(value);
  return results;
}

void OrtGraph::run(const Ort::IoBinding& binding) const {
  guarded("ONNX Runtime failed on " + file_,
          [&] { session_.Run(Ort::RunOptions{nullptr}, binding); });
}

Ort::IoBinding OrtGraph::binding() const { return Ort::IoBinding(session_); }

const std::string& OrtGraph::input_dtype(const std::string& name) const {
  for (const TensorInfo& input : info_->inputs)
    if (input.name == name) return input.dtype;
  throw Error(file_ + " has no input " + name + "; export again");
}

}  // namespace skipvision
