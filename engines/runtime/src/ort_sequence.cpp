#include "ort_sequence.h"

#include <algorithm>
#include <cstring>

#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

// Positions by which a buffer grows: a copy of the whole cache each time, so not few.
constexpr std::int64_t kRoom = 256;

/// `present.0.key` -> `past_key_values.0.key`.
std::string past_name(const std::string& present) {
  return "past_key_values." + present.substr(std::strlen("present."));
}

/// What both kinds of cache do alike: one token through the embeddings, logits out.
class OrtSequence : public Sequence {
 public:
  OrtSequence(const OrtGraph& embed, const OrtGraph& decode, Prefilled prefilled)
      : embed_(embed),
        decode_(decode),
        embed_binding_(embed.binding()),
        binding_(decode.binding()),
        features_(make_tensor(embed.input_dtype("image_features"), prefilled.image_features)),
        id_(1),
        position_(1) {
    for (std::size_t i = 0; i < prefilled.outputs.size(); ++i) {
      const std::string& name = (*prefilled.names)[i].name;
      if (name == "logits") {
        read_floats(prefilled.outputs[i], logits_);
      } else {
        present_.push_back(name);
        cache_.push_back(std::move(prefilled.outputs[i]));
      }
    }
    if (logits_.empty() || cache_.empty() || shape_of(cache_[0]).size() != 4)
      throw Error("decoder_prefill gives no logits or no K/V; export again");
    length_ = shape_of(cache_[0])[2];
    embeds_ =
        make_tensor(decode.input_dtype("inputs_embeds"), {1, 1, prefilled.image_features.back()});
    logits_tensor_ =
        make_tensor(decode.input_dtype("inputs_embeds"), {1, 1, std::int64_t(logits_.size())});
    embed_binding_.BindInput("input_ids", view(id_, {1, 1}));
    embed_binding_.BindInput("image_features", features_);
    embed_binding_.BindOutput("inputs_embeds", embeds_);
    binding_.BindInput("inputs_embeds", embeds_);
    binding_.BindInput("position_ids", view(position_, {1, 1}));
  }

  const std::vector<float>& logits() const override { return logits_; }
  std::int64_t length() const override { return length_; }

  void step(std::int64_t token, std::int64_t position) override {
    guarded("ONNX Runtime refuses the cache", [&] {
      id_[0] = token;
      position_[0] = position;
      embed_.run(embed_binding_);
      decode();
      ++length_;
    });
  }

 protected:
  /// Runs decode on what is bound.
  virtual void decode() = 0;

  void bind_mask() {
    std::int64_t total = length_ + 1;
    if (static_cast<std::int64_t>(mask_.size()) < total) mask_.resize(total + kRoom, 1);
    binding_.BindInput("attention_mask", view(mask_, {1, total}));
  }

  const OrtGraph& embed_;
  const OrtGraph& decode_;
  Ort::IoBinding embed_binding_;
  Ort::IoBinding binding_;
  Ort::Value features_, embeds_{nullptr}, logits_tensor_{nullptr};
  std::vector<std::int64_t> id_, position_, mask_;
  std::vector<std::string> present_;
  std::vector<Ort::Value> cache_;
  std::vector<float> logits_;
  std::int64_t length_ = 0;
};

class SharedSequence : public OrtSequence {
 public:
  SharedSequence(const OrtGraph& embed, const OrtGraph& decode, Prefilled prefilled)
      : OrtSequence(embed, decode, std::move(prefilled)), capacity_(length_) {
    binding_.BindOutput("logits", logits_tensor_);
  }

 private:
  void decode() override {
    if (length_ == capacity_) grow();
    bind_mask();
    decode_.run(binding_);
    read_floats(logits_tensor_, logits_);
  }

  void grow() {
    capacity_ += kRoom;
    for (std::size_t i = 0; i < cache_.size(); ++i) {
      Shape shape = shape_of(cache_[i]);
      std::size_t row = element_bytes(cache_[i]) * shape[3];
      std::size_t old_bytes = row * shape[2], new_bytes = row * capacity_;
      std::string dtype = element_bytes(cache_[i]) == 2 ? "float16" : "float";
      Ort::Value grown = make_tensor(dtype, {shape[0], shape[1], capacity_, shape[3]});
      auto* from = static_cast<const char*>(cache_[i].GetTensorRawData());
      auto* to = static_cast<char*>(grown.GetTensorMutableRawData());
      for (std::int64_t head = 0; head < shape[0] * shape[1]; ++head) {
        std::memcpy(to + head * new_bytes, from + head * old_bytes, row * length_);
        std::memset(to + head * new_bytes + row * length_, 0, new_bytes - row * length_);
      }
      binding_.BindInput(past_name(present_[i]).c_str(), grown);
      binding_.BindOutput(present_[i].c_str(), grown);
      cache_[i] = std::move(grown);
    }
  }

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
    decode_.run(binding_);
    std::vector<Ort::Value> outputs = binding_.GetOutputValues();
    for (std::size_t i = 0; i < cache_.size(); ++i) cache_[i] = std::move(outputs[i + 1]);
    read_floats(logits_tensor_, logits_);
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
