#include "ort_sequence.h"

#include <algorithm>
#include <cstring>

#include "skipvision/skipvision.h"
#include "stopwatch.h"

namespace skipvision {
namespace {

// Positions by which a buffer grows: a copy of the whole cache each time, so not few.
constexpr std::int64_t kRoom = 256;

/// What both kinds of cache do alike: a token of each row through the embeddings, logits out.
class OrtSequence : public Sequence {
 public:
  OrtSequence(const OrtGraph& embed, const OrtGraph& decode, Prefilled prefilled)
      : embed_(embed),
        decode_(decode),
        embed_binding_(embed.binding()),
        binding_(decode.binding()),
        features_(make_tensor(embed.input_dtype("image_features"), prefilled.image_features)),
        padding_(std::move(prefilled.padding)),
        ids_(padding_.size()),
        positions_(padding_.size()) {
    for (std::size_t i = 0; i < prefilled.outputs.size(); ++i) {
      const std::string& name = (*prefilled.names)[i].name;
      if (name == "logits") {
        first_logits_ = std::move(prefilled.outputs[i]);
      } else {
        present_.push_back(name);
        cache_.push_back(std::move(prefilled.outputs[i]));
      }
    }
    if (!first_logits_ || cache_.empty() || shape_of(cache_[0]).size() != 4)
      throw Error("decoder_prefill gives no logits or no K/V; export again");
    read(first_logits_);
    length_ = shape_of(cache_[0])[2];
    hidden_ = prefilled.image_features.back();
    vocabulary_ = logits_.size / padding_.size();
    embed_binding_.BindInput("image_features", features_);
    bind_rows();
  }

  Logits logits(std::size_t row) const override {
    return {logits_.data + row * vocabulary_, vocabulary_};
  }
  std::int64_t length(std::size_t row) const override { return length_ - padding_[row]; }
  double graph_ms() const override { return graph_ms_; }

  bool keep(const std::vector<std::size_t>& rows) override {
    guarded("ONNX Runtime refuses the cache", [&] {
      for (std::size_t i = 0; i < cache_.size(); ++i) cache_[i] = front_rows(i, rows);
      for (std::size_t i = 0; i < rows.size(); ++i) padding_[i] = padding_[rows[i]];
      for (auto* list : {&padding_, &ids_, &positions_}) list->resize(rows.size());
      bind_rows();
    });
    return true;
  }

  void step(const std::vector<std::int64_t>& tokens,
            const std::vector<std::int64_t>& positions) override {
    guarded("ONNX Runtime refuses the cache", [&] {
      graph_ms_ = 0;
      // Into the memory that is bound.
      std::copy(tokens.begin(), tokens.end(), ids_.begin());
      std::copy(positions.begin(), positions.end(), positions_.begin());
      run(embed_, embed_binding_);
      decode();
      ++length_;
      read(logits_tensor_);
    });
  }

 protected:
  /// Runs decode on what is bound.
  virtual void decode() = 0;

  /// Tensors of as many rows as there are.
  virtual void bind_rows() {
    auto rows = static_cast<std::int64_t>(padding_.size());
    const std::string& dtype = decode_.input_dtype("inputs_embeds");
    embeds_ = make_tensor(dtype, {rows, 1, hidden_});
    logits_tensor_ = make_tensor(dtype, {rows, 1, static_cast<std::int64_t>(vocabulary_)});
    embed_binding_.BindInput("input_ids", view(ids_, {rows, 1}));
    embed_binding_.BindOutput("inputs_embeds", embeds_);
    binding_.BindInput("inputs_embeds", embeds_);
    binding_.BindInput("position_ids", view(positions_, {rows, 1}));
  }

  /// These rows of a cached tensor, moved to the front of its own memory.
  Ort::Value front_rows(std::size_t index, const std::vector<std::size_t>& rows) {
    Shape shape = shape_of(cache_[index]);
    std::size_t bytes = element_bytes(cache_[index]) * shape[1] * shape[2] * shape[3];
    auto* data = static_cast<char*>(cache_[index].GetTensorMutableRawData());
    for (std::size_t i = 0; i < rows.size(); ++i)
      if (i != rows[i]) std::memcpy(data + i * bytes, data + rows[i] * bytes, bytes);
    auto type = cache_[index].GetTensorTypeAndShapeInfo().GetElementType();
    owners_.resize(cache_.size());
    // A view of a view needs the first one's memory only.
    if (!owners_[index] || owners_[index].GetTensorRawData() != data)
      owners_[index] = std::move(cache_[index]);
    shape[0] = static_cast<std::int64_t>(rows.size());
    auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
    return Ort::Value::CreateTensor(memory, data, bytes * rows.size(), shape.data(), shape.size(),
                                    type);
  }

  void run(const OrtGraph& graph, const Ort::IoBinding& binding) {
    Stopwatch watch;
    graph.run(binding);
    graph_ms_ += watch.lap();
  }

  /// 0 at the padding. A shared cache has none, its graph takes the sum of each row only.
  void bind_mask() {
    auto rows = static_cast<std::int64_t>(padding_.size());
    std::int64_t total = length_ + 1;
    mask_.assign(static_cast<std::size_t>(rows * total), 1);
    for (std::int64_t row = 0; row < rows; ++row)
      std::fill_n(mask_.begin() + row * total, padding_[row], 0);
    binding_.BindInput("attention_mask", view(mask_, {rows, total}));
  }

  /// Without a copy where they are float32.
  void read(const Ort::Value& tensor) {
    if (element_bytes(tensor) == sizeof(float)) {
      logits_ = {tensor.GetTensorData<float>(),
                 tensor.GetTensorTypeAndShapeInfo().GetElementCount()};
      return;
    }
    read_floats(tensor, converted_);
    logits_ = converted_;
  }

  const OrtGraph& embed_;
  const OrtGraph& decode_;
  Ort::IoBinding embed_binding_;
  Ort::IoBinding binding_;
  Ort::Value features_, embeds_{nullptr}, first_logits_{nullptr}, logits_tensor_{nullptr};
  std::vector<std::int64_t> padding_, ids_, positions_, mask_;
  std::vector<std::string> present_;
  std::vector<Ort::Value> cache_;
  std::vector<Ort::Value> owners_;  // of the memory that cached tensors are views of, if they are
  std::int64_t hidden_ = 0;
  std::size_t vocabulary_ = 0;
  Logits logits_{nullptr, 0};
  std::vector<float> converted_;
  std::int64_t length_ = 0;  // of the longest row
  double graph_ms_ = 0;
};

class SharedSequence : public OrtSequence {
 public:
  SharedSequence(const OrtGraph& embed, const OrtGraph& decode, Prefilled prefilled)
      : OrtSequence(embed, decode, std::move(prefilled)), capacity_(length_) {
    binding_.BindOutput("logits", logits_tensor_);
  }

 private:
  void bind_rows() override {
    OrtSequence::bind_rows();
    binding_.BindOutput("logits", logits_tensor_);
    if (packed_) bind_cache();
  }

  void bind_cache() {
    for (std::size_t i = 0; i < cache_.size(); ++i) {
      binding_.BindInput(past_name(present_[i]).c_str(), cache_[i]);
      binding_.BindOutput(present_[i].c_str(), cache_[i]);
    }
  }

  void decode() override {
    if (length_ == capacity_) grow();
    bind_mask();
    run(decode_, binding_);
  }

  void grow() {
    capacity_ += kRoom;
    for (std::size_t i = 0; i < cache_.size(); ++i) {
      Shape shape = shape_of(cache_[i]);
      std::size_t position = element_bytes(cache_[i]) * shape[3];
      std::size_t old_bytes = position * shape[2], new_bytes = position * capacity_;
      std::string dtype = element_bytes(cache_[i]) == 2 ? "float16" : "float";
      Ort::Value grown = make_tensor(dtype, {shape[0], shape[1], capacity_, shape[3]});
      auto* from = static_cast<const char*>(cache_[i].GetTensorRawData());
      auto* to = static_cast<char*>(grown.GetTensorMutableRawData());
      for (std::int64_t head = 0; head < shape[0] * shape[1]; ++head) {
        std::int64_t padding = padding_[head / shape[1]];
        std::size_t bytes = position * (length_ - padding);
        std::memcpy(to + head * new_bytes,
                    from + head * old_bytes + (packed_ ? 0 : position * padding), bytes);
        std::memset(to + head * new_bytes + bytes, 0, new_bytes - bytes);
      }
      cache_[i] = std::move(grown);
    }
    packed_ = true;
    owners_.clear();
    bind_cache();
  }

  bool packed_ = false;  // each row's K and V are at the front of its buffer
  std::int64_t capacity_;
};

class JoinedSequence : public OrtSequence {
 public:
  using OrtSequence::OrtSequence;

 private:
  void decode() override {
    bind_mask();
    auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
    binding_.ClearBoundOutputs();
    binding_.BindOutput("logits", logits_tensor_);
    for (std::size_t i = 0; i < cache_.size(); ++i) {
      binding_.BindInput(past_name(present_[i]).c_str(), cache_[i]);
      binding_.BindOutput(present_[i].c_str(), memory);
    }
    run(decode_, binding_);
    std::vector<Ort::Value> outputs = binding_.GetOutputValues();
    for (std::size_t i = 0; i < cache_.size(); ++i) cache_[i] = std::move(outputs[i + 1]);
  }
};

}  // namespace

std::unique_ptr<Sequence> make_sequence(const OrtGraph& embed, const OrtGraph& decode, bool shared,
                                        Prefilled prefilled) {
  return guarded("ONNX Runtime refuses the cache", [&]() -> std::unique_ptr<Sequence> {
    if (shared) return std::make_unique<SharedSequence>(embed, decode, std::move(prefilled));
    return std::make_unique<JoinedSequence>(embed, decode, std::move(prefilled));
  });
}

}  // namespace skipvision
